"""Images become pixels: opened, turned upright, resized and normalised as the weights were trained."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from conditional_detr.inference.sources import DEFAULT_LIMITS, ImageSource, Limits, resolve_source, source_name
from conditional_detr.modeling.metadata import Preprocessing

# What people hand over in place of images: where a file of that kind says so, how, and what to call it.
_KINDS = (
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (4, b"ftyphei", "a HEIC image, which PIL opens once pillow-heif is installed and registered"),
    (4, b"ftypmif", "a HEIF image, which PIL opens once pillow-heif is installed and registered"),
    (4, b"ftypavi", "an AVIF image that is truncated, or that this PIL was built without"),
    (4, b"ftyp", "a video (MP4 or QuickTime)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (8, b"AVI ", "a video (AVI)"),
    (0, b"\x00\x00\x01\xba", "a video (MPEG)"),
    (0, b"\x00\x00\x01\xb3", "a video (MPEG)"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer: the image itself was not checked out"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!", "a web page"),
    (0, b"<html", "a web page"),
)
_DOCUMENTS = {"EPS", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}  # PIL's names; it would run ghostscript on the first


def open_image(image: ImageSource, name: str, limits: Limits = DEFAULT_LIMITS) -> Image.Image | Tensor:
    """Open an image of any kind.

    Args:
        image: the image.
        name: what messages call it if it has no path or address of its own, such as ``images[3]``.
        limits: for addresses. The largest number of pixels is PIL's: twice ``PIL.Image.MAX_IMAGE_PIXELS``.

    Returns:
        A PIL image in RGB, upright as its EXIF says; or, for floating point input, a tensor (3, H, W) in [0, 1].
        Of an animation, the first image. Transparency is dropped, 16 bits are scaled to 8.

    Raises:
        OSError: no such file or address, or one that is truncated or corrupt.
        TypeError: a kind of image, or a dtype, that is not known.
        ValueError: a file that is no image, a shape that is none of an image, values out of range, too many pixels.
    """
    name = source_name(image, name)
    local = resolve_source(image, name, limits)
    if isinstance(local, Path | bytes):
        return _open_file(local, name)
    if isinstance(local, Image.Image):
        return _decode(local, name)
    if isinstance(local, Tensor):
        if local.dim() != 3 or local.shape[0] not in (1, 3, 4) or 0 in local.shape:
            raise ValueError(
                f"{name}: expected a tensor (3, H, W), (4, H, W) or (1, H, W), got {tuple(local.shape)}"
                + _hint(tuple(local.shape))
            )
        local = local.detach().cpu()
        # numpy has no bfloat16
        return _from_array((local.float() if local.is_floating_point() else local).permute(1, 2, 0).numpy(), name)
    values = local[..., None] if local.ndim == 2 else local
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or 0 in values.shape:
        raise ValueError(
            f"{name}: expected an array (H, W, 3), (H, W, 4) or (H, W), got {local.shape}" + _hint(local.shape)
        )
    return _from_array(values, name)


def size_of(opened: Image.Image | Tensor) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    if isinstance(opened, Tensor):
        return opened.shape[1], opened.shape[2]
    return opened.height, opened.width


def size_of_file(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image file, upright, by its head alone.

    Raises:
        OSError: no such file, or one that is truncated or corrupt.
        ValueError: a file that is no image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # whatever is wrong, opening it in full says so
        return size_of(open_image(path, str(path)))


def resized_size(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Return the (height, width) an image is resized to, its sides' ratio kept.

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
    """Resize and normalise an opened image: (3, H, W) float32."""
    return normalise(resize(opened, preprocessing), preprocessing)


def resize(opened: Image.Image | Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize an opened image to the size it was trained at.

    Args:
        opened: what :func:`open_image` returned.
        preprocessing: the sizes.

    Returns:
        (3, H, W). 8-bit images are resized by PIL, bilinear with antialiasing, as for training, and stay uint8;
        floating point images alike, without rounding to 8 bits between.
    """
    height, width = size = resized_size(*size_of(opened), preprocessing)
    if isinstance(opened, Tensor):
        return F.interpolate(opened[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
    resized = opened.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def normalise(values: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Subtract the mean and divide by the standard deviation.

    Args:
        values: (..., 3, H, W), uint8 or floating point in [0, 1].
        preprocessing: mean and std.

    Returns:
        (..., 3, H, W) float32, where the values are.
    """
    if values.dtype == torch.uint8:
        values = values.to(torch.float32) / 255
    mean, std = (torch.tensor(v, device=values.device).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return ((values - mean) / std).contiguous()


def to_pil(opened: Image.Image | Tensor) -> Image.Image:
    """Return an opened image as an 8-bit RGB image, for people to look at."""
    if isinstance(opened, Image.Image):
        return opened
    return Image.fromarray((opened * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _open_file(file: Path | bytes, name: str) -> Image.Image | Tensor:
    """Open an image file, or the bytes of one; every failure names it."""
    if isinstance(file, Path):
        if not file.exists():
            raise FileNotFoundError(f"{name}: no such file")
        if file.is_dir():
            raise IsADirectoryError(f"{name}: expected an image file, got a folder")
        if not file.is_file():
            raise ValueError(f"{name}: expected an image file, got a pipe or device")
    try:
        image = Image.open(file if isinstance(file, Path) else io.BytesIO(file))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: expected an image, got {_kind(file)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: {error}; PIL.Image.MAX_IMAGE_PIXELS sets the limit") from error
    except Exception as error:  # what PIL raises of broken headers differs from format to format
        raise _unreadable(name, error) from error
    with image:
        if image.format in _DOCUMENTS:
            raise ValueError(f"{name}: expected an image, got {_kind(file)}")
        return _decode(image, name)


def _unreadable(name: str, error: Exception) -> OSError:
    """Return the error of an image that PIL gave up on."""
    return OSError(f"{name}: the image cannot be read: {str(error) or type(error).__name__}")


def _kind(file: Path | bytes) -> str:
    """Say what a file is that is no image, as far as its first bytes tell."""
    if isinstance(file, bytes):
        head = file[:64]
    else:
        with file.open("rb") as opened:
            head = opened.read(64)
    if not head:
        return "an empty file (0 bytes)"
    text = head.lstrip().lower() if head.isascii() else b""
    for place, sign, kind in _KINDS:
        if head[place:].startswith(sign) or text.startswith(sign):
            return kind
    return "a text file" if text and text.decode().isprintable() else "a file of a kind PIL does not know"


def _hint(shape: tuple[int, ...]) -> str:
    """Say what is probably meant by an array or tensor of another shape."""
    if len(shape) == 4:
        return "; for a batch, pass a list of images"
    if len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3):
        return "; channels come last in an array: .transpose(1, 2, 0)"
    if len(shape) == 3 and shape[2] in (1, 3):
        return "; channels come first in a tensor: .permute(2, 0, 1)"
    return ""


def _decode(image: Image.Image, name: str) -> Image.Image | Tensor:
    """Decode an image and turn it upright and into RGB; what PIL raises meanwhile differs from format to format."""
    if 0 in image.size:
        raise ValueError(f"{name}: expected an image with pixels, got {image.width} x {image.height}")
    try:
        image.load()
        upright = _upright(image, name)
        # PIL has no direct way from these: through a palette's own colours, out of multiplied transparency
        via = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
        if not upright.mode.startswith(("I", "F")):
            return upright.convert(via.get(upright.mode, upright.mode)).convert("RGB")
        values = np.asarray(upright)[..., None]
    except Exception as error:
        raise _unreadable(name, error) from error
    if upright.mode == "F":
        return _from_array(values, name)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name}: expected 16-bit values 0..65535, got {values.min()}..{values.max()}")
    return _from_array(values.astype(np.uint16), name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Turn an image as its EXIF says; one whose EXIF is broken stays as it is, and a warning tells."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # what PIL raises depends on where the EXIF is broken
        warnings.warn(f"{name}: its EXIF cannot be read ({error}); taken as upright", stacklevel=2)
        return image


def _from_array(values: np.ndarray, name: str) -> Image.Image | Tensor:
    """Make an image of values (H, W, 3), (H, W, 4) or (H, W, 1)."""
    values = np.broadcast_to(values[..., :3], (*values.shape[:2], 3))
    if np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise ValueError(
                f"{name}: expected floating point values in [0, 1],"
                f" got {values.min()}..{values.max()}; 0..255 is for uint8"
            )
        return torch.from_numpy(np.array(values, dtype=np.float32)).permute(2, 0, 1)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"{name}: expected uint8, uint16 or floating point values, got {values.dtype}")
    if values.dtype == np.uint16:
        values = np.round(values / 257).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(values))
