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
from helpers.layouts import (
    COCO_FORMS,
    HUGGING_FACE_FORMS,
    LABEL,
    NAMES,
    OBJECTS,
    VOC_FORMS,
    YOLO_FORMS,
    voc_text,
    write_files,
)


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
    """The content of the splits of BCCD, the folder of its images, targets, and metrics of made-up detections."""
    folder = shared / "data" / "bccd"
    contents = {split: json.loads((folder / f"instances_{split}.json").read_text()) for split in ("train", "val")}
    images = folder / "images"
    targets = {split: targets_of(CocoData(content, images)) for split, content in contents.items()}
    truth = open_data(contents["val"], images).annotations
    return contents, images, targets, evaluate_detections(truth, fake_results(truth)).metrics


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
    contents, images, targets, expected = bccd
    folder = formats.WRITERS[form](tmp_path / form, contents, images)
    for split, wanted in targets.items():
        opened = open_data(folder, split=split)
        got = targets_of(CocoData(*opened, class_names=["RBC", "WBC", "Platelets"]))
        assert got.keys() == wanted.keys()
        assert sum(map(len, got.values())) == {"train": 2804, "val": 1137}[split]  # of the data's README
        for name, target in wanted.items():
            np.testing.assert_allclose(got[name], target, atol=0.01)
    assert 0.2 < expected["AP"] < 0.8
    data = open_data(folder, split="val").annotations
    metrics = evaluate_detections(folder, fake_results(data)).metrics
    np.testing.assert_allclose([metrics[m] for m in METRICS], [expected[m] for m in METRICS], rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", list(formats.WRITERS))
def test_conversion_to_coco_and_back(plain, images, tmp_path, form):
    """What convert-data writes reads as the original did, with the folder that it names."""
    folder = formats.WRITERS[form](tmp_path / form, {"train": plain, "test": plain}, images)
    written = convert_data(folder, tmp_path / "out")
    assert sorted(file.files[0].name for file in written) == ["instances_test.json", "instances_train.json"]
    for file in written:
        data = open_data(file.files[0], file.images).annotations
        assert_same_boxes(boxes_of(data), boxes_of(open_data(plain, images).annotations))
        assert json.loads(file.files[0].read_text())["images"][0].keys() >= {"id", "file_name"}


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


def test_the_root_of_a_yolo_dataset_that_is_given_by_a_relative_path(yolo, monkeypatch):
    """``path: .`` is the folder of data.yaml where that has the images, not the working folder above it."""
    text = (yolo / "data.yaml").read_text()
    (yolo / "data.yaml").write_text(f"path: .\n{text}" if "path:" not in text else text)
    monkeypatch.chdir(yolo.parent)
    assert open_data(yolo.name).images == Path(yolo.name)
    report = check_data(yolo.name)
    assert "image files without an entry in the annotations" not in report.notes


def test_a_yolo_image_without_labels_has_no_objects(tmp_path):
    write_files(tmp_path, {**YOLO_FORMS["folder"], "images/train/b.png": "", "images/train/._c.png": ""})
    assert boxes_of(open_data(tmp_path).annotations) == {"a.png": BOX, "b.png": []}


# ---- VOC's layouts


def test_a_line_of_json_may_have_a_line_separator_in_a_string(tmp_path):
    objects = '{"bbox": [[1, 2, 3, 4]], "categories": ["a\u2028b"]}'
    write_files(tmp_path, {"a.png": ""})
    text = f'{{"file_name": "a.png", "objects": {objects}}}\r\n'
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    assert CocoData(tmp_path).class_names == ("a\u2028b",)


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
