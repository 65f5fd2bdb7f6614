"""Open exported models: their description, and a model that runs them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conditional_detr.inference.checksums import files_of
from conditional_detr.inference.postprocessing import check_count
from conditional_detr.inference.runtimes import SUFFIXES, LoadedFile, open_file
from conditional_detr.inference.thresholds import check_thresholds
from conditional_detr.modeling.architectures import ARCHITECTURES
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.detection_transformer import AttentionMaps, Output, check_input
from conditional_detr.modeling.metadata import Metadata, Preprocessing
from conditional_detr.modeling.scores import ClassScores

FORMAT = 4  # of a description; 3 has no thresholds, 2 also no architecture, and 1 calls the image "picture"


@dataclass(frozen=True)
class Parity:
    """Differences between an exported model and the model it was exported from, on one image.

    Attributes:
        height: height of the pixels.
        width: width of the pixels.
        logits: largest absolute difference of the logits.
        boxes: largest absolute difference of the boxes, which are in [0, 1].
    """

    height: int
    width: int
    logits: float
    boxes: float


@dataclass(frozen=True)
class Description:
    """The description that an exported model contains.

    Attributes:
        config: the sizes of the network.
        metadata: class names, category ids, preprocessing.
        precision: "float32", "float16" or "int8".
        top_k: number of detections per image in the outputs "corners", "scores" and "labels"; None: the exported model
            has no post-processing.
        parity: differences from the original model, measured at export.
        image: the image they were measured on.
        versions: versions of the packages that wrote the file.
        measured: other measurements, such as AP, by name.
        architecture: name of the architecture, "conditional_detr" or "detr".
        thresholds: by class name, the thresholds to use by default; None: 0.5 for all classes.
    """

    config: Config
    metadata: Metadata
    precision: str
    top_k: int | None
    parity: tuple[Parity, ...]
    image: str
    versions: Mapping[str, str]
    measured: Mapping[str, Any]
    architecture: str = ConditionalDETR.architecture
    thresholds: Mapping[str, float] | None = None

    def to_json(self) -> str:
        """Return the description as the JSON text that is stored in the file."""
        options: Any = {"ensure_ascii": False, "default": lambda number: number.item()}  # of numpy and torch
        content = asdict(self)
        del content["metadata"]["preprocessing"]["backend"]  # a choice of who runs the model, as for checkpoints
        return json.dumps({"format": FORMAT, **content}, **options)

    @classmethod
    def from_json(cls, text: str) -> "Description":
        """Parse the JSON text that is stored in a file.

        Raises:
            ValueError: the text is damaged, or has a format that this version cannot read.
        """
        try:
            content = json.loads(text)
            written = content.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError("its description is damaged") from error
        if written == 1 and "picture" in content:
            content["image"], written = content.pop("picture"), 2
        if written == 2:
            content["architecture"], written = ConditionalDETR.architecture, 3
        if written == 3:
            content["thresholds"], written = None, FORMAT
        if written != FORMAT:
            versions = content.get("versions")
            by = versions.get("conditional-detr", "?") if isinstance(versions, dict) else "?"
            raise ValueError(
                f"expected a description of format {FORMAT}, got {written!r}, written by conditional-detr {by};"
                " export the model again, or update this library"
            )
        try:
            metadata = content.pop("metadata")
            preprocessing = {**metadata.pop("preprocessing")}
            for name in ("mean", "std", "size"):
                if isinstance(preprocessing.get(name), list):
                    preprocessing[name] = tuple(preprocessing[name])
            names, ids = tuple(metadata["class_names"]), tuple(metadata["category_ids"])
            config = Config(**content.pop("config"))
            parity = tuple(Parity(**one) for one in content.pop("parity"))
            if content["architecture"] not in ARCHITECTURES:
                raise ValueError(f"architecture {content['architecture']!r}")
            metadata = Metadata(names, ids, Preprocessing(**preprocessing))
            if content["thresholds"] is not None:
                content["thresholds"] = check_thresholds(content["thresholds"], class_names=names)
            return cls(config=config, metadata=metadata, parity=parity, **content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"its description is damaged: {error}") from error


class InferenceError(ValueError):
    """A runtime cannot process the pixels, for example because they are too small for the backbone."""


class ExportedModel(nn.Module):
    """Run an exported model. It is called like the network, but without padding, and cannot be trained.

    Args:
        path: an ``.onnx``, ``.xml`` (OpenVINO, with its ``.bin`` in the same folder) or ``.pt2`` (torch.export) file.
        device: the device to run on: "cpu", "cuda:0", or an OpenVINO device such as "GPU".
        threads: number of CPU threads; None: the runtime decides. For ``.pt2``, use ``torch.set_num_threads``.
        dtype: precision in which OpenVINO computes what is not int8, such as ``torch.bfloat16``; None: float32, in
            which the file was checked, or float16 for a float16 file on a device other than the CPU.

    Attributes:
        description: the description that the file contains.
        metadata: class names, category ids, preprocessing.
        config: the sizes of the network.
        scores: how logits become scores of classes.
        device: the device that pixels must be on.
        dtype: float32, the precision that pixels must have.

    Raises:
        ModuleNotFoundError: the runtime is not installed.
        OSError: no such file.
        ValueError: a file that is damaged, or that this version of :func:`conditional_detr.export` did not write; a
            device, number of threads or precision that the runtime does not have.
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
        path = self._path = Path(path)
        if threads is not None:
            check_count("threads", threads)
        self._opened: LoadedFile = open_file(path, device=str(device), threads=threads, dtype=dtype)
        try:
            self.description = Description.from_json(self._opened.description)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.config, self.metadata = self.description.config, self.description.metadata
        self.scores: ClassScores = ARCHITECTURES[self.description.architecture].scores
        self.device, self.dtype = self._opened.device, torch.float32
        self.eval()

    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Detect objects.

        Args:
            pixels: (B, 3, H, W), normalised by ``metadata.preprocessing``, float32.
            padding: must be None.

        Returns:
            Output of the last layer: logits (1, B, N, C) and boxes (1, B, N, 4), float32.

        Raises:
            TypeError: not a floating point tensor.
            ValueError: not of this shape, or a padding.
            InferenceError: the runtime cannot process pixels of this shape; a ValueError.
        """
        check_input(pixels, padding)
        if padding is not None:
            raise ValueError(
                "padding: expected None, as an exported model has no padding; run images of one size together"
            )
        pixels = pixels.detach().to(self.device, torch.float32)
        try:
            logits, boxes = self._opened.run(pixels.contiguous())
        except Exception as error:  # the type depends on the runtime
            height, width = pixels.shape[2:]
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InferenceError(f"{self._path}: cannot process pixels of {width} x {height}: {reason}") from error
        return Output(logits[None], boxes[None])

    def attention_maps(self, *_: Any, **__: Any) -> AttentionMaps:
        """Raise ValueError: the file does not hold them."""
        raise ValueError("attention maps: an exported model has none; use the model it was exported from")

    def weights_digest(self) -> str:
        """Return the SHA-256 of the file, and of the ``.bin`` beside an ``.xml``."""
        hashed = hashlib.sha256()
        for path in files_of(self._path):
            with path.open("rb") as file:
                while part := file.read(1 << 20):
                    hashed.update(part)
        return hashed.hexdigest()

    def train(self, mode: bool = True) -> "ExportedModel":
        """Raise ValueError if ``mode`` is True: an exported model cannot be trained."""
        if mode:
            raise ValueError("an exported model cannot be trained; train the model it was exported from")
        return super().train(False)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise ValueError: the weights are part of the file."""
        raise ValueError("an exported model has no weights to save; save the model it was exported from")

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise ValueError: the weights are part of the file."""
        raise ValueError("an exported model cannot load weights; load them into a model and export it")

    def _apply(self, fn: Any, recurse: bool = True) -> "ExportedModel":
        """Raise ValueError: device and precision are fixed when the file is opened."""
        raise ValueError(
            "an exported model stays on its device and in its precision; open it again on another device:"
            " ExportedModel(path, device=device)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise ValueError: pickle and deepcopy are not supported."""
        raise ValueError("an exported model cannot be copied; open the file again")


def is_exported(name: str | Path) -> bool:
    """Return whether a name has the suffix of an exported model."""
    return Path(name).suffix.lower() in SUFFIXES
