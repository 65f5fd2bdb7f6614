"""Write a dataset in COCO's form in the other forms, as the programs do that export them; images are linked."""

import json
from pathlib import Path
from xml.etree import ElementTree


def boxes_by_image(content: dict) -> dict[str, list[tuple[str, list[float]]]]:
    """Return (class name, bbox) of each annotation, by file_name."""
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    boxes = {name: [] for name in files.values()}
    for annotation in content["annotations"]:
        boxes[files[annotation["image_id"]]].append((names[annotation["category_id"]], annotation["bbox"]))
    return boxes


def link_images(content: dict, images: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        (folder / image["file_name"]).unlink(missing_ok=True)
        (folder / image["file_name"]).symlink_to(images.absolute() / image["file_name"])


def write_coco(folder: Path, splits: dict[str, dict], images: Path) -> Path:
    """annotations/instances_train2017.json and train2017/, as COCO has them."""
    (folder / "annotations").mkdir(parents=True)
    for split, content in splits.items():
        link_images(content, images, folder / f"{split}2017")
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def write_roboflow(folder: Path, splits: dict[str, dict], images: Path) -> Path:
    """train/_annotations.coco.json with category 0, which groups the classes."""
    for split, content in splits.items():
        inner = folder / {"val": "valid"}.get(split, split)
        link_images(content, images, inner)
        grouped = [{**category, "supercategory": "project"} for category in content["categories"]]
        categories = [{"id": 0, "name": "project", "supercategory": "none"}, *grouped]
        (inner / "_annotations.coco.json").write_text(json.dumps({**content, "categories": categories}))
    return folder


def write_yolo(folder: Path, splits: dict[str, dict], images: Path) -> Path:
    """data.yaml, images/train and labels/train; images without boxes have no label file."""
    names = [category["name"] for category in next(iter(splits.values()))["categories"]]
    lines = ["path: .", *(f"{split}: images/{split}" for split in splits), f"names: {json.dumps(names)}"]
    folder.mkdir(parents=True)
    (folder / "data.yaml").write_text("\n".join(lines))
    for split, content in splits.items():
        link_images(content, images, folder / "images" / split)
        (folder / "labels" / split).mkdir(parents=True)
        sizes = {image["file_name"]: (image["width"], image["height"]) for image in content["images"]}
        for name, boxes in boxes_by_image(content).items():
            width, height = sizes[name]
            labels = [
                f"{names.index(label)} {(x + w / 2) / width!r} {(y + h / 2) / height!r} {w / width!r} {h / height!r}"
                for label, (x, y, w, h) in boxes
            ]
            if labels:
                (folder / "labels" / split / name).with_suffix(".txt").write_text("\n".join(labels) + "\n")
    return folder


def write_voc(folder: Path, splits: dict[str, dict], images: Path, *, first: int = 0) -> Path:
    """JPEGImages, Annotations and ImageSets/Main; with first=1, pixels are counted from 1 as in the devkit."""
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, content in splits.items():
        link_images(content, images, folder / "JPEGImages")
        stems = [Path(image["file_name"]).stem for image in content["images"]]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems))
        boxes = boxes_by_image(content)
        for image in content["images"]:
            root = voc_annotation(
                image["file_name"], image["width"], image["height"], boxes[image["file_name"]], first
            )
            ElementTree.ElementTree(root).write(folder / "Annotations" / f"{Path(image['file_name']).stem}.xml")
    return folder


def voc_annotation(name: str, width: int, height: int, boxes: list, first: int = 0) -> ElementTree.Element:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    for key, value in (("width", width), ("height", height), ("depth", 3)):
        ElementTree.SubElement(size, key).text = str(value)
    for label, (x, y, w, h) in boxes:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = label
        box = ElementTree.SubElement(element, "bndbox")
        for key, value in (("xmin", x + first), ("ymin", y + first), ("xmax", x + w), ("ymax", y + h)):
            ElementTree.SubElement(box, key).text = str(value)
    return root


def write_hugging_face(folder: Path, splits: dict[str, dict], images: Path) -> Path:
    """train/metadata.jsonl with objects, and validation/."""
    for split, content in splits.items():
        inner = folder / {"val": "validation"}.get(split, split)
        link_images(content, images, inner)
        with (inner / "metadata.jsonl").open("w") as file:
            for name, boxes in boxes_by_image(content).items():
                objects = {"bbox": [bbox for _, bbox in boxes], "categories": [label for label, _ in boxes]}
                file.write(json.dumps({"file_name": name, "objects": objects}) + "\n")
    return folder


WRITERS = {
    "coco": write_coco,
    "roboflow": write_roboflow,
    "yolo": write_yolo,
    "voc": write_voc,
    "huggingface": write_hugging_face,
}
