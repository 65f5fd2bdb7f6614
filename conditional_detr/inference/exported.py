"""Exported files, read back: what they say of themselves, and a model that runs them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditional_detr.inference.postprocessing import check_count
from conditional_detr.inference.runtimes import SUFFIXES, Opened, open_file
from conditional_detr.modeling.conditional_detr import AttentionMaps, Config, Output, check_input
from conditional_detr.modeling.metadata import Metadata, Preprocessing

FORMAT = 1  # of a description; another number means that older versions of this library cannot read it


@dataclass(frozen=True)
class Parity:
    """How far an exported file was from the model that it was made from, on one image.

    Attributes:
        height: of the image's pixels.
        width: of the image's pixels.
        logits: largest difference.
        boxes: largest difference; boxes lie in [0, 1].
    """

    height: int
    width: int
    logits: float
    boxes: float


@dataclass(frozen=True)
class Description:
    """What an exported file says of itself.

    Attributes:
        config: the architecture.
        metadata: class names, category ids, preprocessing.
        precision: "float32", "float16" or "int8".
        top_k: how many detections an image has in the outputs "corners", "scores" and "labels"; None: the file has no
            post-processing.
        parity: checked when it was written.
        image: on which image.
        versions: of the packages that wrote it.
        measured: what else was measured of it, such as AP; by name.
    """

    config: Config
    metadata: Metadata
    precision: str
    top_k: int | None
    parity: tuple[Parity, ...]
    image: str
    versions: Mapping[str, str]
    measured: Mapping[str, Any]

    def to_json(self) -> str:
        """Return the text that stands in the file."""
        numbers: Any = {"ensure_ascii": False, "default": lambda number: number.item()}  # numpy's and torch's
        return json.dumps({"format": FORMAT, **asdict(self)}, **numbers)

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """Read the text.

        Raises:
            ValueError: it is damaged, or of a format that this version does not know.
        """
        try:
            content = json.loads(text)
            written = content.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("its description is damaged") from error
        if written != FORMAT:
            versions = content.get("versions")
            by = versions.get("conditional-detr", "?") if isinstance(versions, dict) else "?"
            raise ValueError(
                f"expected a description of format {FORMAT}, got {written!r}, written by conditional-detr {by};"
                " export the model anew, or update this library"
            )
        try:
            metadata = content.pop("metadata")
            numbers = {**metadata.pop("preprocessing")}
            for name in ("mean", "std"):
                numbers[name] = tuple(numbers[name])
            names, ids = tuple(metadata["class_names"]), tuple(metadata["category_ids"])
            config = Config(**content.pop("config"))
            parity = tuple(Parity(**one) for one in content.pop("parity"))
            return cls(config, Metadata(names, ids, Preprocessing(**numbers)), parity=parity, **content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"its description is damaged: {error}") from error


class ExportedModel(nn.Module):
    """A model in an exported file. Called as the plain model is, but without padding, and it cannot be trained.

    Args:
        path: an ``.onnx``, ``.xml`` (OpenVINO; its ``.bin`` lies beside it) or ``.pt2`` (torch.export) file.
        device: where it runs: "cpu", "cuda:0", or what OpenVINO calls a device, such as "GPU".
        threads: of the CPU; None: the runtime's choice. Not for ``.pt2``: ``torch.set_num_threads`` is for all.
        dtype: what an OpenVINO file is computed in where it is not int8, such as ``torch.bfloat16``; None: float32, as
            it was checked, but for a float16 file on another device than the CPU.

    Attributes:
        description: what the file says of itself.
        metadata: class names, category ids, preprocessing.
        config: the architecture.
        device: where it takes pixels.

    Raises:
        ModuleNotFoundError: the runtime is not installed.
        OSError: no such file.
        ValueError: a file that is damaged, was not written by :func:`conditional_detr.export` or by another version of
            it; a device, number of threads or precision that the runtime does not have.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        threads: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        path = Path(path)
        if threads is not None:
            check_count("threads", threads)
        self._opened: Opened = open_file(path, device=str(device), threads=threads, dtype=dtype)
        try:
            self.description = Description.from_json(self._opened.description)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.config, self.metadata = self.description.config, self.description.metadata
        self.device, self.dtype = self._opened.device, torch.float32
        self.eval()

    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Detect objects.

        Args:
            pixels: (B, 3, H, W), normalised as ``metadata.preprocessing`` says, float32.
            padding: must be None.

        Returns:
            Output of the last layer: logits (1, B, N, C) and boxes (1, B, N, 4), float32.

        Raises:
            TypeError: not a floating point tensor.
            ValueError: not of this shape, or a padding.
        """
        check_input(pixels, padding)
        if padding is not None:
            raise ValueError("padding: an exported file takes none; run images of one size together")
        pixels = pixels.detach().to(self.device, torch.float32)
        logits, boxes = self._opened.run(pixels.contiguous())
        return Output(logits[None], boxes[None])

    def attention_maps(self, *_: Any, **__: Any) -> AttentionMaps:
        """Raise ValueError: the file does not hold them."""
        raise ValueError("attention maps: an exported model has none; use the model it was exported from")

    def train(self, mode: bool = True) -> "ExportedModel":
        """Raise if it is to train."""
        if mode:
            raise ValueError("an exported file cannot be trained; train the model that it was made from")
        return super().train(False)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise: the weights are the file's."""
        raise ValueError("an exported file has no weights to save; save the model that it was made from")

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise: the weights are the file's."""
        raise ValueError("an exported file takes no weights; load them into a model and export that")

    def _apply(self, fn: Any, recurse: bool = True) -> "ExportedModel":
        """Raise: it runs where it was opened, in the precision of the file."""
        raise ValueError(
            "an exported file stays on its device and in its precision; open it again on another:"
            " ExportedModel(path, device=device)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise, for pickle and for deepcopy."""
        raise ValueError("an exported file is not copied; open it again")


def is_exported(name: str | Path) -> bool:
    """Return whether something is called as exported files are."""
    return Path(name).suffix.lower() in SUFFIXES
