"""Check the images of a dataset before they are needed, and digest its annotations."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from conditional_detr.data.coco import Annotations, check_size
from conditional_detr.data.json_values import Id
from conditional_detr.inference.images import size_of_file
from conditional_detr.inference.sources import source_state
from conditional_detr.system.atomic_files import remove_unfinished, write_atomically

_THREADS = 16  # waiting for files, not computing


def find_bad_images(data: Annotations, folder: Path) -> list[OSError | ValueError]:
    """Read the headers of all images, and return an error for each that cannot be used.

    The sizes of intact files are kept in the user's cache folder (``XDG_CACHE_HOME``, or ``~/.cache``): the next check
    reads only files that have changed since.

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
            key = f"{path.name} {source_state(path)}"
            if key not in sizes:
                sizes[key] = size_of_file(path)
            check_size(data, image_id, sizes[key], path)
        except (OSError, ValueError) as error:
            return error
        return None

    with _known_sizes(folder) as sizes, ThreadPoolExecutor(_THREADS) as pool:
        return [error for error in pool.map(check, data.images) if error is not None]


@contextmanager
def _known_sizes(folder: Path) -> Iterator[dict[str, tuple[int, int]]]:
    """Read the (height, width) of a folder's images by file name, time, size and inode; in the end, write them.

    A cache that is damaged or cannot be written is not used.
    """
    name = hashlib.sha256(os.path.realpath(folder).encode("utf-8", "surrogateescape")).hexdigest()
    cache = cache_folder() / f"{name}.json"
    sizes: dict[str, tuple[int, int]] = {}
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        content = json.loads(cache.read_text(encoding="utf-8"))
        sizes = {key: (int(height), int(width)) for key, (height, width) in content.items()}
    before = len(sizes)
    yield sizes
    if len(sizes) > before:
        with suppress(OSError):
            cache.parent.mkdir(parents=True, exist_ok=True)
            remove_unfinished(cache.parent)
            write_atomically({cache: lambda path: path.write_text(json.dumps(sizes), encoding="utf-8")})


def cache_folder() -> Path:
    """Return this library's folder in the user's cache folder; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "conditional_detr"


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
