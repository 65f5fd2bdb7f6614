"""Check the images of a dataset before they are needed, and digest its annotations."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conditional_detr.data.coco import Annotations, check_size
from conditional_detr.data.json_values import Id
from conditional_detr.inference.images import size_of_file

_THREADS = 16  # waiting for files, not computing


def find_bad_images(data: Annotations, folder: Path) -> list[OSError | ValueError]:
    """Read the headers of all images, and return an error for each that cannot be used.

    Args:
        data: the annotations.
        folder: the folder of the images.

    Returns:
        The errors, in the order of the annotations: a file that does not exist or is no image, or an image that has
        another size than the annotations state.
    """

    def check(image_id: Id) -> OSError | ValueError | None:
        path = folder / str(data.images[image_id]["file_name"])
        try:
            check_size(data, image_id, size_of_file(path), path)
        except (OSError, ValueError) as error:
            return error
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        return [error for error in pool.map(check, data.images) if error is not None]


def digest_of(data: Annotations) -> str:
    """Return the SHA-256 of file names in their order, each with its boxes and the names of their classes."""
    boxes: dict[Id, list[object]] = {image_id: [] for image_id in data.images}
    for annotation in data.annotations:
        name, bbox = data.categories[annotation["category_id"]], [float(value) for value in annotation["bbox"]]
        boxes[annotation["image_id"]].append((name, bbox, annotation["iscrowd"]))
    hashed = hashlib.sha256()
    for image_id, of_image in boxes.items():
        hashed.update(repr((data.images[image_id].get("file_name"), of_image)).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()
