"""Small datasets of one annotated image in the layouts of many programs: texts by file name; images are drawn."""

import json

from PIL import Image


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
    "a folder per split in Annotations": {"Annotations/train/a.xml": voc_text(), "JPEGImages/train/a.png": ""},
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
