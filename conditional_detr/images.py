"""Pictures become pixels: opened, turned upright, resized and normalised as the weights were trained."""

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from conditional_detr.metadata import Preprocessing

Picture: TypeAlias = str | Path | Image.Image | np.ndarray | Tensor
"""A file's path; a PIL image; an array (H, W, 3) or (H, W); a tensor (3, H, W) or (1, H, W).

Arrays and tensors are RGB or grey: uint8, uint16, or floating point in [0, 1].
"""


def open_picture(picture: Picture, name: str) -> Image.Image | Tensor:
    """Open a picture of any kind.

    Args:
        picture: the picture.
        name: what messages call it, such as ``images[3]``; a path speaks for itself.

    Returns:
        A PIL image in RGB, upright as its EXIF says; or, for floating point input, a tensor (3, H, W) in [0, 1].

    Raises:
        OSError: no such file, or one that is truncated.
        TypeError: a kind of picture, or a dtype, that is not known.
        ValueError: a file that is no picture, a shape that is none of a picture, values out of range.
    """
    if isinstance(picture, str | Path):
        return _open_file(Path(picture))
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, name)
    if isinstance(picture, Tensor):
        if picture.dim() != 3 or picture.shape[0] not in (1, 3) or 0 in picture.shape:
            raise ValueError(f"{name}: expected a tensor (3, H, W) or (1, H, W), got {tuple(picture.shape)}")
        return _from_array(picture.detach().cpu().permute(1, 2, 0).numpy(), name)
    if isinstance(picture, np.ndarray):
        if picture.ndim == 2:
            picture = picture[..., None]
        if picture.ndim != 3 or picture.shape[2] not in (1, 3) or 0 in picture.shape:
            raise ValueError(f"{name}: expected an array (H, W, 3) or (H, W), got {picture.shape}")
        return _from_array(picture, name)
    raise TypeError(f"{name}: expected a path, a PIL image, an array or a tensor, got {type(picture).__name__}")


def size_of(opened: Image.Image | Tensor) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    if isinstance(opened, Tensor):
        return opened.shape[1], opened.shape[2]
    return opened.height, opened.width


def resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the (height, width) a picture is resized to, its sides' ratio kept.

    The shorter side becomes ``shortest_edge``, unless the longer one then exceeds ``longest_edge``, which then
    decides. Sides are truncated to whole pixels, as the weights' publisher does.
    """
    short, long = min(height, width), max(height, width)
    shortest: float = preprocessing.shortest_edge
    if long / short * shortest > preprocessing.longest_edge:
        shortest = preprocessing.longest_edge * short / long
    if round(shortest) == short:
        return height, width
    new_short = max(round(shortest), 1)
    if width < height:
        return int(shortest * height / width), new_short
    return new_short, int(shortest * width / height)


def to_pixels(opened: Image.Image | Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize and normalise an opened picture.

    Args:
        opened: what :func:`open_picture` returned.
        preprocessing: sizes, mean and std.

    Returns:
        (3, H, W) float32. 8-bit pictures are resized by PIL, bilinear with antialiasing, as for training; floating
        point pictures alike, without rounding to 8 bits between.
    """
    height, width = size = resized_size(*size_of(opened), preprocessing)
    if isinstance(opened, Tensor):
        values = F.interpolate(opened[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    else:
        resized = opened.resize((width, height), Image.Resampling.BILINEAR)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(torch.float32) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return ((values - mean) / std).contiguous()


def to_pil(opened: Image.Image | Tensor) -> Image.Image:
    """Return an opened picture as an 8-bit RGB image, for people to look at."""
    if isinstance(opened, Image.Image):
        return opened
    return Image.fromarray((opened * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _open_file(path: Path) -> Image.Image | Tensor:
    """Open a picture file; every failure names it."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a picture file, got a folder")
    try:
        with Image.open(path) as image:
            return _to_rgb(image, str(path))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: expected a picture, got a file of a kind PIL does not know") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from error
    except OSError as error:
        raise OSError(f"{path}: the picture cannot be read: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image | Tensor:
    """Turn an image upright and into RGB; its transparency is dropped, 16 bits are scaled to 8."""
    if 0 in image.size:
        raise ValueError(f"{name}: expected a picture with pixels, got {image.width} x {image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"{name}: expected 16-bit values 0..65535, got {deep.min()}..{deep.max()}")
        return _from_array(deep.astype(np.uint16)[..., None], name)
    if image.mode == "F":
        return _from_array(np.asarray(image)[..., None], name)
    if image.mode == "P":
        image = image.convert("RGBA")  # through the palette's own colours, transparent ones too
    return image.convert("RGB")


def _from_array(values: np.ndarray, name: str) -> Image.Image | Tensor:
    """Make a picture of values (H, W, 3) or (H, W, 1)."""
    values = np.broadcast_to(values, (*values.shape[:2], 3))
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"{name}: expected floating point values in [0, 1],"
                f" got {values.min()}..{values.max()}; 0..255 is for uint8"
            )
        return torch.from_numpy(np.array(values, dtype=np.float32)).permute(2, 0, 1)
    if values.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"{name}: expected uint8, uint16 or floating point values, got {values.dtype}")
    if values.dtype == np.uint16:
        values = np.round(values / 257).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))
