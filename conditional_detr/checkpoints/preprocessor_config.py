"""Read and write ``preprocessor_config.json`` in the forms of transformers' ConditionalDetrImageProcessor."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from conditional_detr.modeling.metadata import Preprocessing

_RESAMPLING = {0: "nearest", 1: "Lanczos", 3: "bicubic", 4: "box", 5: "Hamming"}  # PIL's numbers; 2 is bilinear
_PROCESSORS = {"conditional_detr": "ConditionalDetrImageProcessor", "detr": "DetrImageProcessor"}
_SIZES = "{shortest_edge, longest_edge}, {longest_edge}, {max_height, max_width} or {height, width}"


def read_preprocessor(json: Mapping[str, Any], path: str) -> Preprocessing:
    """Convert a ``preprocessor_config.json``, old (size 800, max_size 1333) or new, to Preprocessing.

    Another factor than 1/255, and images that are not rescaled or not normalised, become part of mean and std. Padding
    does not change the detections of a model that masks it, and is ignored.

    Args:
        json: the parsed file.
        path: the file's path, for messages.

    Raises:
        ValueError: unsupported preprocessing, or a value of the wrong type or out of its range.
    """
    json = {name: value for name, value in json.items() if value is not None}
    resample = json.get("resample", 2)
    if resample != 2:
        name = _RESAMPLING.get(resample) if isinstance(resample, int) else None
        raise ValueError(f"{path}: expected resample 2 (bilinear), got {resample!r}" + (f" ({name})" if name else ""))
    try:
        factor = _number(json, "rescale_factor", 1 / 255) if _flag(json, "do_rescale") else 1.0
        if not 1e-6 <= factor <= 1e6:
            raise ValueError(f"rescale_factor: expected a number above 0, got {factor!r}")
        scale = 1.0 if abs(factor - 1 / 255) < 1e-9 else 255 * factor
        given = Preprocessing()
        mean, std = (_channels(json, f"image_{name}", getattr(given, name)) for name in ("mean", "std"))
        if not _flag(json, "do_normalize"):
            mean, std = (0.0,) * 3, (1.0,) * 3
        given = Preprocessing(**_read_size(json), mean=mean, std=std)
        return replace(given, mean=_divided(given.mean, scale), std=_divided(given.std, scale))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_preprocessor(preprocessing: Preprocessing, architecture: str = "conditional_detr") -> dict[str, Any]:
    """Return the content of the ``preprocessor_config.json`` for this preprocessing and an architecture's name."""
    size = {"shortest_edge": preprocessing.shortest_edge, "longest_edge": preprocessing.longest_edge}
    if preprocessing.size is not None:
        names = ("max_height", "max_width") if preprocessing.resizing == "fit" else ("height", "width")
        size = dict(zip(names, preprocessing.size, strict=True))
    return {
        "image_processor_type": _PROCESSORS[architecture],
        "format": "coco_detection",
        "do_resize": preprocessing.resizing != "none",
        "size": size,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_pad": True,
    }


def _read_size(json: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resizing and its sizes from any of the forms that transformers has written."""
    if not _flag(json, "do_resize"):
        return {"resizing": "none"}
    default = Preprocessing()
    size = json.get("size", default.shortest_edge)
    if isinstance(size, list) and len(size) == 2:
        size = dict(zip(("height", "width"), size, strict=True))
    if not isinstance(size, Mapping):
        size = {"shortest_edge": size}
    size = {name: _pixels(name, edge) for name, edge in size.items() if edge is not None}
    if set(size) == {"max_height", "max_width"}:
        return {"resizing": "fit", "size": (size["max_height"], size["max_width"])}
    if set(size) == {"height", "width"}:
        return {"resizing": "stretch", "size": (size["height"], size["width"])}
    if set(size) == {"longest_edge"}:
        return {"resizing": "fit", "size": (size["longest_edge"], size["longest_edge"])}
    if set(size) == {"shortest_edge"}:
        return {**size, "longest_edge": _pixels("max_size", json.get("max_size", default.longest_edge))}
    if set(size) == {"shortest_edge", "longest_edge"}:
        return size
    raise ValueError(f"size: expected {_SIZES}, got {json['size']!r}")


def _flag(json: Mapping[str, Any], name: str) -> bool:
    value = json.get(name, True)
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected true or false, got {value!r}")
    return value


def _pixels(name: str, value: object) -> int:
    """Return a whole number of pixels; old files have some as floating point."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"size: expected a whole number of pixels as {name}, got {value!r}")
    return value


def _number(json: Mapping[str, Any], name: str, default: float) -> float:
    value = json.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return value


def _divided(channels: tuple[float, float, float], scale: float) -> tuple[float, float, float]:
    red, green, blue = channels
    return red / scale, green / scale, blue / scale


def _channels(json: Mapping[str, Any], name: str, default: tuple[float, float, float]) -> tuple[Any, ...]:
    """Return one number per channel; a single number applies to all three."""
    values = json.get(name, default)
    return tuple(values) if isinstance(values, list | tuple) else (values,) * 3
