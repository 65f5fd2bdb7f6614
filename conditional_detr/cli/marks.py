"""Mark the images that commands draw, so that later runs know which files they may replace."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def save_marked(drawing: "Image.Image", path: Path, image: str, suffix: str) -> None:
    """Save a drawing as JPEG or PNG, by the suffix, with a comment that tells which image it was drawn for."""
    from PIL.PngImagePlugin import PngInfo

    if suffix == ".jpg":
        drawing.save(path, "JPEG", quality=92, comment=_mark(image))
        return
    comment = PngInfo()
    comment.add_text("comment", _mark(image))
    drawing.save(path, "PNG", compress_level=3, pnginfo=comment)


def has_mark(path: Path, image: str) -> bool:
    """Return whether a file is a drawing that an earlier run has made for an image."""
    from PIL import Image

    try:
        with Image.open(path) as drawing:
            comment = drawing.info.get("comment", "")
    except Exception:  # not an image: the type of PIL's error depends on the format
        return False
    return comment in (_mark(image), _mark(image).encode())


def _mark(image: str) -> str:
    """Return the comment. It holds a digest, since the drawing may be passed on and the path may be private."""
    return f"conditional-detr {hashlib.sha256(image.encode('utf-8', 'surrogateescape')).hexdigest()}"
