"""Datasets in the forms that people have: the same targets and numbers as from COCO's JSON, and as other libraries."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conditional_detr.data.annotations import GROUPING
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.formats.conversion import convert_data
from conditional_detr.data.formats.reading import open_data, recognise
from conditional_detr.data.report import check_data
from conditional_detr.evaluation.coco import METRICS, evaluate_detections
from helpers import coco, formats


@pytest.fixture
def plain():
    """A dataset of three images, one without annotations, and the folder of their images."""
    content = coco.content()
    content["annotations"] = [a for a in content["annotations"] if not a.get("iscrowd")]
    return content


@pytest.fixture
def images(tmp_path):
    return coco.write(tmp_path / "source")[1]


def boxes_of(data):
    """Return sorted (class name, x0, y0, w, h) by the name of each image."""
    found = {Path(info["file_name"]).name: [] for info in data.images.values()}
    for annotation in data.annotations:
        name = Path(data.images[annotation["image_id"]]["file_name"]).name
        found[name].append((data.categories[annotation["category_id"]], *annotation["bbox"]))
    return in_order(found)


def in_order(found):
    """Sort images by name and boxes by class and position, to a millionth of a pixel."""
    return {name: sorted(found[name], key=lambda box: (box[0], *np.round(box[1:], 6))) for name in sorted(found)}


def assert_same_boxes(got, expected, tolerance=1e-9):
    assert list(got) == list(expected)
    for name, boxes in expected.items():
        assert [box[0] for box in got[name]] == [box[0] for box in boxes], name
        np.testing.assert_allclose([box[1:] for box in got[name]], [box[1:] for box in boxes], atol=tolerance)


# ---- the same data in every form


@pytest.fixture(scope="module")
def bccd(shared):
    """The content of the splits of BCCD, the folder of its images."""
    folder = shared / "data" / "bccd"
    contents = {split: json.loads((folder / f"instances_{split}.json").read_text()) for split in ("train", "val")}
    return contents, folder / "images"


def targets_of(data):
    """Return the classes, sorted boxes cx cy w h in pixels of each image, as training gets them."""
    found = {}
    for i, (image_id, info) in enumerate(data.annotations.images.items()):
        rows = np.column_stack([data._labels[image_id], data._boxes[image_id]])
        found[Path(data.describe(i)).name] = rows[np.lexsort(rows.T)]
        assert (info["height"], info["width"]) == (480, 640)
    return found


def fake_results(data):
    """Return detections that do not depend on ids: moved boxes, some of the wrong class, scores all different."""
    ids = {name: i for i, name in data.categories.items()}
    results = []
    for image_id, info in data.images.items():
        random = np.random.default_rng(int(Path(info["file_name"]).stem[-5:]))
        for name, *bbox in boxes_of(data)[Path(info["file_name"]).name]:
            moved = (np.array(bbox) + random.normal(0, 5, 4)).clip(1).tolist()
            label = ids[name if random.uniform() < 0.9 else "WBC"]
            score = float(random.uniform())
            results.append({"image_id": image_id, "category_id": label, "bbox": moved, "score": score})
    return results


@pytest.mark.parametrize("form", list(formats.WRITERS))
@pytest.mark.filterwarnings(f"ignore:.*{GROUPING}")
def test_bccd_in_every_form(bccd, tmp_path, form):
    contents, images = bccd
    folder = formats.WRITERS[form](tmp_path / form, contents, images)
    for split in contents:
        expected = CocoData(contents[split], images)
        given = open_data(folder, split=split)
        names = expected.class_names
        got, wanted = targets_of(CocoData(*given, class_names=names)), targets_of(expected)
        assert got.keys() == wanted.keys()
        assert sum(map(len, got.values())) == {"train": 2804, "val": 1137}[split]  # of the data's README
        for name, target in wanted.items():
            np.testing.assert_allclose(got[name], target, atol=0.01)
    truth = open_data(contents["val"], images).annotations
    expected = evaluate_detections(truth, fake_results(truth)).metrics
    assert 0.2 < expected["AP"] < 0.8
    data = open_data(folder, split="val").annotations
    metrics = evaluate_detections(folder, fake_results(data)).metrics
    np.testing.assert_allclose([metrics[m] for m in METRICS], [expected[m] for m in METRICS], rtol=0, atol=1e-10)
    report = check_data(folder, split="val")
    assert report.problems == {}
    assert report.annotations == 1137


@pytest.mark.parametrize("form", list(formats.WRITERS))
def test_conversion_to_coco_and_back(plain, images, tmp_path, form):
    """What convert-data writes reads as the original did, with the folder that it names."""
    folder = formats.WRITERS[form](tmp_path / form, {"train": plain, "test": plain}, images)
    written = convert_data(folder, tmp_path / "out")
    assert sorted(file.path.name for file in written) == ["instances_test.json", "instances_train.json"]
    for file in written:
        data = open_data(file.path, file.images).annotations
        assert_same_boxes(boxes_of(data), boxes_of(open_data(plain, images).annotations))
        assert json.loads(file.path.read_text())["images"][0].keys() >= {"id", "file_name"}


# ---- other libraries' readers

LABELS = {
    "10.txt": "0 0.5 0.25 0.125 0.3\n1 0.1 0.9 0.2 0.1 0.75\n",  # a box; one with a score
    "11.txt": "1 0.1 0.1 0.5 0.2 0.4 0.7 0.05 0.3\n",  # a polygon
    "12.txt": "",
}


@pytest.fixture
def yolo(images, tmp_path):
    folder = tmp_path / "yolo"
    formats.link_images(coco.content(), images, folder / "images")
    (folder / "labels").mkdir()
    for name, text in LABELS.items():
        (folder / "labels" / name).write_text(text)
    (folder / "data.yaml").write_text("train: images\nnames: {0: cat, 1: dog}\n")
    return folder


def as_supervision_shows(dataset):
    found = {}
    for path in dataset.image_paths:
        detections = dataset.annotations[path]
        boxes = np.column_stack([detections.xyxy[:, :2], detections.xyxy[:, 2:] - detections.xyxy[:, :2]])
        rows = [(dataset.classes[label], *box) for label, box in zip(detections.class_id, boxes.tolist(), strict=True)]
        found[Path(path).name] = rows
    return in_order(found)


def supervision_dataset():
    supervision = pytest.importorskip("supervision")
    return supervision.DetectionDataset


@pytest.mark.filterwarnings("ignore")
def test_yolo_as_supervision_reads_it(yolo):
    dataset = supervision_dataset().from_yolo(yolo / "images", yolo / "labels", yolo / "data.yaml")
    expected = as_supervision_shows(dataset)
    assert sum(map(len, expected.values())) == 3
    assert_same_boxes(boxes_of(open_data(yolo).annotations), expected, tolerance=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["voc", "voc-devkit"])
def test_voc_as_supervision_reads_it(plain, images, tmp_path, format):
    """It reads all files as the devkit's: from xmin - 1 to xmax. Corners as they are begin one pixel later."""
    folder = formats.write_voc(tmp_path / "voc", {"train": plain}, images, first=1)
    dataset = supervision_dataset().from_pascal_voc(folder / "JPEGImages", folder / "Annotations")
    shift = 0 if format == "voc-devkit" else 1
    expected = {
        name: [(label, x + shift, y + shift, w - shift, h - shift) for label, x, y, w, h in boxes]
        for name, boxes in as_supervision_shows(dataset).items()
    }
    assert sum(map(len, expected.values())) == 4
    assert_same_boxes(boxes_of(open_data(folder, format=format).annotations), expected)


@pytest.mark.filterwarnings("ignore")
def test_hugging_face_as_datasets_reads_it(plain, images, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    folder = formats.write_hugging_face(tmp_path / "hf", {"train": plain, "val": plain}, images)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "validation"}
    read = loaded["validation"].cast_column("image", datasets.Image(decode=False))
    expected = {}
    for row in read:
        boxes = zip(row["objects"]["categories"], row["objects"]["bbox"], strict=True)
        expected[Path(row["image"]["path"]).name] = [(name, *bbox) for name, bbox in boxes]
    assert sum(map(len, expected.values())) == 4
    assert_same_boxes(boxes_of(open_data(folder, split="val").annotations), in_order(expected))


# ---- YOLO's path rules

BOX = [("cat", 16, 12, 32, 24)]  # "0 0.5 0.5 0.5 0.5" in 64 x 48


def write_files(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".png", ".jpg")):
            Image.new("RGB", (64, 48)).save(path)
        else:
            path.write_text(text)


NAMES = "names: [cat, dog]\n"
LABEL = "0 0.5 0.5 0.5 0.5\n"
YOLO_FORMS = {
    "folder": {"data.yaml": f"train: images/train\n{NAMES}", "images/train/a.png": "", "labels/train/a.txt": LABEL},
    "subfolders": {"data.yaml": f"train: images\n{NAMES}", "images/x/y/a.png": "", "labels/x/y/a.txt": LABEL},
    "path": {
        "data.yaml": f"path: inner\ntrain: images\n{NAMES}",
        "inner/images/a.png": "",
        "inner/labels/a.txt": LABEL,
    },
    "path of the file": {"data.yaml": f"path: .\ntrain: images\n{NAMES}", "images/a.png": "", "labels/a.txt": LABEL},
    "path that is gone": {
        "data.yaml": f"path: /gone/away\ntrain: images\n{NAMES}",
        "images/a.png": "",
        "labels/a.txt": LABEL,
    },
    "Roboflow": {
        "data.yaml": f"train: ../train/images\n{NAMES}",
        "train/images/a.png": "",
        "train/labels/a.txt": LABEL,
    },
    "list of folders": {
        "data.yaml": f"train: [images/one, images/two]\n{NAMES}",
        "images/two/a.png": "",
        "images/one/.keep": "",
        "labels/two/a.txt": LABEL,
    },
    "text file": {
        "data.yaml": f"train: train.txt\n{NAMES}",
        "train.txt": "./images/a.png\n\n",
        "images/a.png": "",
        "labels/a.txt": LABEL,
    },
    "text file in a folder": {
        "data.yaml": f"train: lists/train.txt\n{NAMES}",
        "lists/train.txt": "images/a.png\n",
        "images/a.png": "",
        "labels/a.txt": LABEL,
    },
    "the last folder images": {
        "data.yaml": f"train: images/images/images\n{NAMES}",
        "images/images/images/a.png": "",
        "images/images/labels/a.txt": LABEL,
    },
    "label beside the image": {"data.yaml": f"train: train\n{NAMES}", "train/a.png": "", "train/a.txt": LABEL},
    "names by index": {"data.yml": "train: t\nnames:\n  0: cat\n  '1': dog\n", "t/a.png": "", "t/a.txt": LABEL},
    "class as a decimal": {"data.yaml": f"train: t\n{NAMES}", "t/a.png": "", "t/a.txt": "0.000e+00 5e-1 .5 0.5 0.50"},
    "keypoints": {
        "data.yaml": f"train: t\nkpt_shape: [2, 3]\n{NAMES}",
        "t/a.png": "",
        "t/a.txt": "0 0.5 0.5 0.5 0.5 0.3 0.3 2 0 0 0",
    },
    "byte-order mark": {"data.yaml": f"\ufefftrain: t\n{NAMES}", "t/a.png": "", "t/a.txt": f"\ufeff{LABEL}"},
    "Label Studio": {"classes.txt": "cat\ndog\n", "notes.json": "{}", "images/a.png": "", "labels/a.txt": LABEL},
    "CVAT's YOLO 1.1": {
        "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n",
        "obj.names": "cat\ndog\n",
        "train.txt": "data/obj_train_data/a.png\n",
        "obj_train_data/a.png": "",
        "obj_train_data/a.txt": LABEL,
    },
    "CVAT's Ultralytics YOLO": {
        "data.yaml": "path: .\ntrain: train.txt\nnames:\n  0: cat\n  1: dog\n",
        "train.txt": "data/images/train/a.png\n",
        "images/train/a.png": "",
        "labels/train/a.txt": LABEL,
    },
}


@pytest.mark.parametrize("files", list(YOLO_FORMS.values()), ids=list(YOLO_FORMS))
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_yolo_forms(tmp_path, monkeypatch, files, elsewhere):
    write_files(tmp_path / "set", files)
    monkeypatch.chdir(tmp_path if elsewhere else tmp_path / "set")
    data, root = open_data(Path("set") if elsewhere else Path())
    assert boxes_of(data) == {"a.png": BOX}
    assert data.categories == {0: "cat", 1: "dog"}
    assert [(root / info["file_name"]).is_file() for info in data.images.values()] == [True]
    description = next(name for name in files if name in ("data.yaml", "data.yml", "obj.data", "classes.txt"))
    if description != "classes.txt":
        assert boxes_of(open_data(tmp_path / "set" / description).annotations) == {"a.png": BOX}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CocoData(tmp_path / "set").class_names == ("cat", "dog")


def test_a_yolo_image_without_labels_has_no_objects(tmp_path):
    write_files(tmp_path, {**YOLO_FORMS["folder"], "images/train/b.png": "", "images/train/._c.png": ""})
    assert boxes_of(open_data(tmp_path).annotations) == {"a.png": BOX, "b.png": []}


# ---- VOC's layouts


def voc_text(name="a.png", first=0, source="", size=(64, 48), extra=""):
    x0, y0 = 16 + first, 12 + first
    return (
        f"<annotation><filename>{name}</filename>{source}"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        f"<object><name>cat</name>{extra}<bndbox><ymin>{y0}</ymin><xmin>{x0}</xmin><xmax>48</xmax><ymax>36.0</ymax>"
        "</bndbox></object></annotation>"
    )


DEVKIT = "<source><database>The VOC2007 Database</database><annotation>PASCAL VOC2007</annotation></source>"
VOC_FORMS = {
    "one folder": {"a.xml": voc_text(), "a.png": ""},
    "Roboflow": {"train/a.xml": voc_text(), "train/a.png": "", "valid/b.xml": voc_text("b.png"), "valid/b.png": ""},
    "devkit": {
        "Annotations/a.xml": voc_text(first=1, source=DEVKIT),
        "JPEGImages/a.png": "",
        "ImageSets/Main/train.txt": "a\n",
        "ImageSets/Main/cat_train.txt": "a  1\n",
    },
    "CVAT": {
        "Annotations/a.xml": voc_text(source="<source><database>Unknown</database></source>"),
        "JPEGImages/a.png": "",
        "ImageSets/Main/default.txt": "a\n",
        "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:1,2,3::\n",
    },
    "Label Studio": {"Annotations/a.xml": voc_text("a"), "images/a.png": ""},
    "a path as name": {"a.xml": voc_text("C:\\here\\a.png"), "a.png": ""},
    "a wrong name": {"a.xml": voc_text("img_0001.png"), "a.png": ""},
    "sizes of zero": {"a.xml": voc_text(size=(0, 0)), "a.png": ""},
    "files of macOS": {"a.xml": voc_text(), "a.png": "", "._a.xml": "\x00\x05"},
    "parts": {
        "a.xml": voc_text(extra="<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"),
        "a.png": "",
    },
}


@pytest.mark.parametrize("files", list(VOC_FORMS.values()), ids=list(VOC_FORMS))
def test_voc_forms(tmp_path, files):
    write_files(tmp_path, files)
    data, root = open_data(tmp_path)
    assert boxes_of(data) == {"a.png": BOX}
    assert [(root / info["file_name"]).is_file() for info in data.images.values()] == [True]
    assert CocoData(tmp_path).class_names == ("cat",)


def test_difficult_objects_are_crowds(tmp_path):
    """Training leaves them out, and evaluation ignores them, as that of the devkit does."""
    write_files(tmp_path, {"a.xml": voc_text(extra="<difficult>1</difficult>"), "a.png": ""})
    write_files(tmp_path, {"b.xml": voc_text("b.png", extra="<difficult>0</difficult>"), "b.png": ""})
    data = open_data(tmp_path).annotations
    assert [annotation["iscrowd"] for annotation in data.annotations] == [1, 0]
    assert [len(CocoData(tmp_path)[i][1]["labels"]) for i in (0, 1)] == [0, 1]


def test_voc_images_elsewhere(tmp_path):
    write_files(tmp_path, {"xml/a.xml": voc_text(), "photos/a.png": ""})
    data, root = open_data(tmp_path / "xml", tmp_path / "photos")
    assert (root, [info["file_name"] for info in data.images.values()]) == (tmp_path / "photos", ["a.png"])


# ---- Hugging Face's and COCO's layouts

OBJECTS = '"objects": {"bbox": [[16, 12, 32, 24]], "categories": [0]}'
CARD = """---
license: mit
dataset_info:
  features:
  - name: image
    dtype: image
  - name: objects
    struct:
    - name: bbox
      list:
        list: float32
    - name: categories
      list:
        class_label:
          names:
            '0': cat
            '1': dog
---
# Cats
"""
HUGGING_FACE_FORMS = {
    "root": {"metadata.jsonl": f'{{"file_name": "a.png", {OBJECTS}}}', "a.png": "", "README.md": CARD},
    "data": {
        "data/train/metadata.jsonl": f'{{"file_name": "a.png", {OBJECTS}}}',
        "data/train/a.png": "",
        "README.md": CARD,
    },
    "splits in names": {
        "metadata.jsonl": f'{{"file_name": "train/a.png", {OBJECTS}}}\n\n{{"file_name": "test/b.png", {OBJECTS}}}\n',
        "train/a.png": "",
        "test/b.png": "",
        "README.md": CARD,
    },
    "list of objects": {
        "metadata.jsonl": '{"file_name": "a.png", "objects": [{"bbox": [16, 12, 32, 24], "category": "cat"}]}',
        "a.png": "",
    },
}


@pytest.mark.parametrize("files", list(HUGGING_FACE_FORMS.values()), ids=list(HUGGING_FACE_FORMS))
def test_hugging_face_forms(tmp_path, files):
    write_files(tmp_path, files)
    data, _ = open_data(tmp_path)
    assert boxes_of(data) == {"a.png": BOX}
    assert list(data.categories.values()) == (["cat", "dog"] if "README.md" in files else ["cat"])
    assert len(CocoData(tmp_path)) == 1


def test_hugging_face_indices_without_names(tmp_path):
    write_files(tmp_path, {"metadata.jsonl": f'{{"file_name": "a.png", {OBJECTS}}}', "a.png": ""})
    assert open_data(tmp_path).annotations.categories == {0: "0"}


def coco_text(name="a.png"):
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [16, 12, 32, 24]}
    image = {"id": 1, "file_name": name, "width": 64, "height": 48}
    return json.dumps({"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]})


COCO_FORMS = {
    "COCO": {
        "annotations/instances_train2017.json": coco_text(),
        "annotations/captions_train2017.json": "{}",
        "train2017/a.png": "",
    },
    "images in a folder": {"annotations/instances_train.json": coco_text(), "images/train/a.png": ""},
    "CVAT": {"annotations/instances_default.json": coco_text(), "images/a.png": ""},
    "CVAT with subset": {"annotations/instances_train.json": coco_text(), "images/train/a.png": ""},
    "Label Studio": {"result.json": coco_text("images/a.png"), "images/a.png": ""},
    "Roboflow": {"train/_annotations.coco.json": coco_text(), "train/a.png": "", "test/_annotations.coco.json": "{}"},
    "Roboflow without splits": {"_annotations.coco.json": coco_text(), "a.png": ""},
    "shapes": {
        "instances_train.json": coco_text(),
        "instances_val.json": coco_text(),
        "train/a.png": "",
        "val/a.png": "",
    },
    "other names": {"train.json": coco_text(), "package.json": "{}", "training/a.png": ""},
}


@pytest.mark.parametrize("files", list(COCO_FORMS.values()), ids=list(COCO_FORMS))
def test_coco_forms(tmp_path, files):
    write_files(tmp_path, files)
    data, root = open_data(tmp_path)
    assert boxes_of(data) == {"a.png": BOX}
    assert (root / next(iter(data.images.values()))["file_name"]).is_file()
    file = tmp_path / next(iter(files))
    assert open_data(file).images == root
    assert len(CocoData(file)) == 1


def test_formats_are_recognised(tmp_path):
    for format, forms in (
        ("yolo", YOLO_FORMS),
        ("voc", VOC_FORMS),
        ("huggingface", HUGGING_FACE_FORMS),
        ("coco", COCO_FORMS),
    ):
        for i, files in enumerate(forms.values()):
            folder = tmp_path / format / str(i)
            write_files(folder, files)
            assert recognise(folder) == format


def test_format_forces(tmp_path):
    write_files(tmp_path, {**VOC_FORMS["one folder"], **YOLO_FORMS["folder"]})
    message = r"expected a dataset in one format, got yolo \(data.yaml\) and voc \(a.xml\); give the format to use"
    with pytest.raises(ValueError, match=message):
        open_data(tmp_path)
    assert open_data(tmp_path, format="voc").annotations.categories == {1: "cat"}
    assert open_data(tmp_path, format="yolo").annotations.categories == {0: "cat", 1: "dog"}


def test_exif_orientation(tmp_path):
    """Boxes are those of the upright image, as in COCO's form."""
    write_files(tmp_path, YOLO_FORMS["folder"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 64)).save(tmp_path / "images/train/a.png", exif=exif)
    data, _ = open_data(tmp_path)
    assert boxes_of(data) == {"a.png": BOX}
    assert check_data(tmp_path).problems == {}
    assert len(CocoData(tmp_path)[0][1]["boxes"]) == 1


def test_images_outside_are_warned_of(tmp_path):
    write_files(
        tmp_path, {"set/data.yaml": f"train: {tmp_path}/photos\n{NAMES}", "photos/a.png": "", "photos/a.txt": LABEL}
    )
    with pytest.warns(UserWarning, match="1 of 1 images are outside"):
        CocoData(tmp_path / "set")


def test_readers_follow_links(tmp_path):
    write_files(tmp_path / "real", YOLO_FORMS["folder"])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert boxes_of(open_data(tmp_path / "link").annotations) == {"a.png": BOX}
