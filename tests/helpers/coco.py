"""A small generated dataset in COCO format, of which each test damages one part."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
CATEGORIES = [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}]  # any numbering, any order


def content():
    """Return three images: two with two annotations each, one with a crowd only."""
    images = [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (10, 11, 12)]
    boxes = [(10, [4, 6, 20, 10], 3), (10, [20, 20, 20, 24], 9), (11, [10, 2, 8, 40], 9), (11, [34, 30, 12, 12], 3)]
    annotations = [{"id": i, "image_id": p, "category_id": c, "bbox": b} for i, (p, b, c) in enumerate(boxes)]
    annotations.append(
        {"id": 4, "image_id": 12, "category_id": 3, "bbox": [0, 0, 60, 40], "area": 900.0, "iscrowd": 1}
    )
    return {"images": images, "annotations": annotations, "categories": [dict(category) for category in CATEGORIES]}


def write(folder: Path, annotations=None) -> tuple[Path, Path]:
    """Write the images and the json; return the path of the json and the folder of the images."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in (10, 11, 12):
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((WIDTH, HEIGHT)).save(images / f"{i}.png")
    path = folder / "data.json"
    path.write_text(json.dumps(content() if annotations is None else annotations))
    return path, images
