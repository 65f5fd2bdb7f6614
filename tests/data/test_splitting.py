"""Random splits: shares of classes, near-duplicates on one side, the same split from the same seed."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import ImageEnhance

from conditional_detr.data.coco import read_annotations
from conditional_detr.data.formats.conversion import convert_data
from conditional_detr.data.formats.splitting import fingerprint, near_duplicates, parse_fractions, split_data
from conditional_detr.data.synthetic import draw_image
from helpers import coco
from helpers.layouts import COCO_FORMS, VOC_FORMS, write_files

CHANGES = {
    "compressed": lambda image: image,
    "half as large": lambda image: image.reduce(2),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "grey": lambda image: image.convert("L"),
    "slightly cropped": lambda image: image.crop((3, 2, image.width - 3, image.height - 2)),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of 12 different images, and a copy of the first for each change."""
    folder = tmp_path_factory.mktemp("drawn")
    images = [draw_image(0, i)[0] for i in range(12)]
    for i, image in enumerate(images):
        image.save(folder / f"{i:02}.png")
    for name, change in CHANGES.items():
        change(images[0]).save(folder / f"copy {name}.jpg", quality=60)
    return folder


def labelled(folder, class_of):
    """Return annotations with one box per image, of the class that a function gives."""
    names = sorted(path.name for path in folder.iterdir())
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    boxes = [{"image_id": i, "category_id": c, "bbox": [1, 1, 9, 9]} for i in range(len(names)) for c in class_of(i)]
    categories = [{"id": i, "name": str(i)} for i in range(3)]
    return read_annotations({"images": images, "annotations": boxes, "categories": categories})


def names_in(data):
    return {info["file_name"] for info in data.images.values()}


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_on_one_side(drawn, seed):
    parts = split_data(labelled(drawn, lambda i: [i % 3]), drawn, {"train": 0.5, "val": 0.5}, seed=seed)
    copies = {"00.png", *(f"copy {name}.jpg" for name in CHANGES)}
    sides = [names_in(part) & copies for part in parts.values()]
    assert sorted(map(len, sides)) == [0, len(copies)]
    assert names_in(parts["train"]).isdisjoint(names_in(parts["val"]))
    assert len(names_in(parts["train"]) | names_in(parts["val"])) == 12 + len(CHANGES)


def test_different_images_are_apart(drawn):
    prints = [fingerprint(path) for path in sorted(drawn.glob("??.png"))]
    assert near_duplicates(prints) == [[i] for i in range(12)]


def test_groups_are_those_of_all_pairs():
    """Against the distances of all pairs, followed through others, of fingerprints in clusters."""
    random = np.random.default_rng(0)
    centres = random.random((40, 256)) > 0.5
    prints = [centre ^ (random.random(256) < rate) for centre in centres for rate in (0, 0.05, 0.11)]
    near = np.array([[(a ^ b).sum() <= 32 for b in prints] for a in prints])
    reached = np.linalg.matrix_power(near.astype(float), 8) > 0
    expected = sorted({tuple(np.flatnonzero(row).tolist()) for row in reached})
    assert 40 <= len(expected) < 120
    assert sorted(map(tuple, near_duplicates(prints))) == expected


def test_shares_of_classes(shared):
    """BCCD, whose rarest class is in a tenth of the images of each part, as near as whole images allow."""
    folder = shared / "data" / "bccd"
    data = read_annotations(folder / "instances_train.json")
    shares = {"train": 0.8, "val": 0.1, "test": 0.1}
    parts = split_data(data, folder / "images", shares, seed=3)
    with_class = {
        name: Counter(c for _, c in {(a["image_id"], a["category_id"]) for a in part.annotations})
        for name, part in {**parts, "all": data}.items()
    }
    for name, share in shares.items():
        assert abs(len(parts[name].images) - share * 205) <= 3
        for category, count in with_class["all"].items():
            assert abs(with_class[name][category] - share * count) <= 3
    assert sum(len(part.annotations) for part in parts.values()) == 2804
    again = split_data(data, folder / "images", shares, seed=3)
    other = split_data(data, folder / "images", shares, seed=4)
    assert [names_in(part) for part in again.values()] == [names_in(part) for part in parts.values()]
    assert names_in(other["val"]) != names_in(parts["val"])


def test_a_rare_class_is_in_every_part(drawn):
    """Three images of twelve have class 2: one of them is in each part, whatever the seed."""
    for path in drawn.glob("copy*"):
        path.unlink()
    data = labelled(drawn, lambda i: [2] if i in (1, 5, 9) else [0, 1] if i % 2 else [])
    for seed in range(5):
        parts = split_data(data, drawn, {"train": 0.34, "val": 0.33, "test": 0.33}, seed=seed)
        assert [sum(a["category_id"] == 2 for a in part.annotations) for part in parts.values()] == [1, 1, 1]
        assert [len(part.images) for part in parts.values()] == [4, 4, 4]


def test_no_part_is_empty(tmp_path):
    _, images = coco.write(tmp_path)
    parts = split_data(read_annotations(coco.content()), images, {"train": 0.98, "val": 0.01, "test": 0.01})
    assert [len(part.images) for part in parts.values()] == [1, 1, 1]
    for name in ("11.png", "12.png"):
        (images / name).write_bytes((images / "10.png").read_bytes())
    with pytest.raises(ValueError, match=r"annotations: expected at least 2 different images to split, got 1"):
        split_data(read_annotations(coco.content()), images, {"train": 0.5, "val": 0.5})


def test_shares_are_checked(tmp_path):
    assert parse_fractions("0.8/0.1/0.1") == {"train": 0.8, "val": 0.1, "test": 0.1}
    assert parse_fractions("0.7/0.3") == {"train": 0.7, "val": 0.3}
    for text in ("0.8", "0.8/0.1", "80/10/10", "0.8/0.2/0", "a/b", "0.5/0.3/0.1/0.1", "nan/1", "1.5/-0.5", ""):
        with pytest.raises(
            ValueError, match=r"split: expected two or three positive shares with the sum 1, as .*, got"
        ):
            parse_fractions(text)
    with pytest.raises(ValueError, match=r"seed: expected at least 0, got -1"):
        split_data(read_annotations(coco.content()), tmp_path, {"train": 0.5, "val": 0.5}, seed=-1)


def test_converted_parts(tmp_path):
    """What COCO's JSON has besides boxes stays; each part has all categories."""
    content = coco.content()
    content["info"] = {"year": 2017}
    content["annotations"][0]["segmentation"] = [[4, 6, 24, 6, 24, 16]]
    path, images = coco.write(tmp_path / "source", content)
    written = convert_data(path, tmp_path / "out", images, split="0.5/0.5")
    contents = [json.loads(file.files[0].read_text()) for file in written]
    assert sorted(info["id"] for part in contents for info in part["images"]) == [10, 11, 12]
    assert sorted(entry["id"] for part in contents for entry in part["annotations"]) == [0, 1, 2, 3, 4]
    segmented = [entry for part in contents for entry in part["annotations"] if "segmentation" in entry]
    assert segmented == [content["annotations"][0]]
    assert all(part["categories"] == content["categories"] and part["info"] == {"year": 2017} for part in contents)


def test_conversion_is_refused_before_it_begins(tmp_path):
    write_files(tmp_path / "voc", VOC_FORMS["one folder"])
    write_files(tmp_path / "coco", COCO_FORMS["Roboflow"])
    with pytest.raises(ValueError, match=r"split: expected a dataset without splits, got .*coco with test, train"):
        convert_data(tmp_path / "coco", tmp_path / "out", split="0.5/0.5")
    with pytest.raises(ValueError, match=r"voc: expected another folder to write to than that of the dataset"):
        convert_data(tmp_path / "voc", tmp_path / "voc")
    (tmp_path / "voc" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a.png: no such file; 1 of the 1 images"):
        convert_data(tmp_path / "voc", tmp_path / "out")
    with pytest.raises(ValueError, match=r"_annotations.coco.json: expected a list under 'images'"):
        convert_data(tmp_path / "coco", tmp_path / "out")
    assert not (tmp_path / "out").exists()
