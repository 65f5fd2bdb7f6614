"""Optimise a model for inference: the same mathematics in fewer and larger operations, and in a smaller dtype.

The optimised copy is the plain model with some modules replaced. Values that do not depend on the image are computed
once, projections of the same tensor are joined, and activations and additions are fused into kernels.
"""

import copy
import hashlib
import threading
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from conditional_detr.checkpoints.meta_init import other_modules
from conditional_detr.deploy.backbone import FastBackbone
from conditional_detr.deploy.kernels import Computation, FusedConv, MapMemory, has_kernels, mark_dynamic_size
from conditional_detr.deploy.layers import fast_decoder, fast_encoder
from conditional_detr.deploy.parameters import count_parameters
from conditional_detr.modeling.architectures import ARCHITECTURES, plain_class
from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output, check_input

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRACED = "backbone.body"  # with modules of any class
_NOT_SAVED = "an optimised copy cannot be saved or copied; save or copy the plain model"
_CACHED_SIZES = 32  # feature map sizes whose position encodings are cached


def optimize(
    model: DetectionTransformer, *, dtype: torch.dtype = torch.float32, compile: bool = False
) -> "OptimizedDETR":
    """Make an optimised copy of a model for inference, on the model's device.

    The copy takes float32 pixels and returns float32 output of the last decoder layer: logits (1, B, N, C) and boxes
    (1, B, N, 4). In float32 it is within 1e-4 of the model. In half precision, softmax, sines, reference points, the
    decoder's states between its operations, and box arithmetic stay in float32. A Detector accepts the copy like any
    model.

    Tracing the backbone temporarily changes how torch calls modules in the whole process. No other thread may run a
    model meanwhile.

    Args:
        model: the model; it is not changed.
        dtype: dtype of the computation: float32, bfloat16 or float16.
        compile: use ``torch.compile``. The first image and the first larger batch take about a minute each; other
            image sizes need no further compilation.

    Returns:
        The copy. It cannot be trained, saved, copied or moved to another device, and has no attention maps.

    Raises:
        TypeError: the model is not a ConditionalDETR or DETR, or is of a subclass, whose changes would be lost; not a
            dtype.
        ValueError: an unsupported dtype; a model that is an optimised copy, or whose backbone cannot be traced.
    """
    check_model(model)
    check_dtype(dtype, DTYPES)
    computation = Computation(dtype, has_kernels(model.device, dtype), compile)
    with torch.no_grad():
        return OptimizedDETR(model, computation)


def check_model(model: DetectionTransformer) -> None:
    """Raise TypeError or ValueError unless a model is a ConditionalDETR or DETR with the modules of this library."""
    if isinstance(model, OptimizedDETR):
        raise ValueError("model: expected a plain model, got an optimised copy")
    if type(model) not in ARCHITECTURES.values():  # the changes of a subclass would be lost
        raise TypeError(f"model: expected a ConditionalDETR or DETR, got {type(model).__name__}")
    others = {name: got for name, (got, _) in other_modules(model).items() if not name.startswith(_TRACED)}
    if others:  # their changes would be lost, too: only their weights would be used
        names = ", ".join(f"{name} is a {got.__name__}" for name, got in islice(others.items(), 3))
        raise TypeError(f"model: expected only modules of this library outside {_TRACED}, got {len(others)}: {names}")


def check_dtype(dtype: torch.dtype, expected: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless ``dtype`` is a torch.dtype, ValueError unless it is an expected one."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    if dtype not in expected:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, expected))}, got {dtype}")


class OptimizedDETR(DetectionTransformer):
    """Optimised copy of a model; see :func:`optimize`.

    Args:
        model: the plain model.
        computation: dtype and kernels.

    Attributes:
        plain_parameters: numbers of parameters of the plain model.
    """

    projection: Any
    decoder: Any

    def __init__(self, model: DetectionTransformer, computation: Computation) -> None:
        nn.Module.__init__(self)
        self.architecture, self.scores = model.architecture, model.scores
        self.config, self.metadata, self.load_report = model.config, model.metadata, model.load_report
        self.plain_parameters = count_parameters(model)
        self._digest = f"{model.weights_digest()} {computation}"  # packed weights cannot be read
        dtype, kernels, compile = computation
        self.backbone = copy.copy(model.backbone)
        self.backbone._modules = {"body": FastBackbone(model.backbone.body, computation)}
        projection: Any = copy.deepcopy(model.projection).to(dtype).to(memory_format=torch.channels_last)
        fused = kernels and not compile
        self.projection = FusedConv(projection, relu=False, memory=MapMemory()) if fused else projection
        self.encoder = fast_encoder(model.encoder, computation)
        self.decoder = fast_decoder(model.decoder, model.object_queries.weight, computation)
        self.class_head = copy.deepcopy(model.class_head).float()
        self.box_head = copy.deepcopy(model.box_head).float()
        self.requires_grad_(False)
        nn.Module.train(self, False)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._lock = threading.Lock()
        self._compiled: Any = torch.compile(super().forward, dynamic=True) if compile else None

    def weights_digest(self) -> str:
        """Return a SHA-256 of the plain model's weights, and of the dtype and the kernels."""
        return hashlib.sha256(self._digest.encode()).hexdigest()

    @torch.no_grad()
    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Run the network.

        Args:
            pixels: (B, 3, H, W), normalised by ``metadata.preprocessing``, float32.
            padding: (B, H, W) bool, True = padded; None: nothing is padded.

        Returns:
            Output of the last layer, float32: logits (1, B, N, C) and boxes (1, B, N, 4).

        Raises:
            TypeError: wrong types or dtypes.
            ValueError: wrong shapes.
        """
        check_input(pixels, padding)
        if padding is not None and padding.device.type == "cpu" and not padding.any():
            padding = None
        if self._compiled is None:
            return super().forward(pixels, padding)
        return self._compiled(mark_dynamic_size(pixels), None if padding is None else mark_dynamic_size(padding))

    def key_positions(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return the position encodings of a feature map's cells; those of unpadded maps are cached."""
        if padding is not None or torch.compiler.is_compiling():
            return super().key_positions(features, padding)
        size = (features.shape[-2], features.shape[-1])
        positions = self._positions.get(size)
        if positions is None:
            positions = super().key_positions(features, None)
            with self._lock:  # threads may share a copy
                if len(self._positions) >= _CACHED_SIZES:
                    del self._positions[next(iter(self._positions))]
                self._positions[size] = positions
        return positions

    def decode(
        self, memory: Tensor, positions: Tensor, padding: Tensor | None = None, *, object_queries: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return what the plain model does, but only the last decoder layer's states."""
        if object_queries is not None:
            raise ValueError(
                "object_queries: expected None, an optimised copy has fixed object queries; use the plain model"
            )
        return self.decoder(memory, positions, None if padding is None else padding.flatten(1))

    def predict(self, *decoded: Tensor) -> Output:
        """Predict classes and boxes as the plain model does."""
        plain: Any = plain_class(self)
        return plain.predict(self, *decoded)

    def attention_maps(self, *_: Any, **__: Any) -> Any:
        """Raise ValueError: only the plain model computes attention maps."""
        raise ValueError("attention maps: an optimised copy cannot compute them; use the plain model")

    def train(self, mode: bool = True) -> "OptimizedDETR":
        """Raise ValueError in training mode."""
        if mode:
            raise ValueError("an optimised copy cannot be trained; train the plain model")
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise ValueError: only the plain model can be saved."""
        raise ValueError(_NOT_SAVED)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise ValueError: the weights are packed for kernels; the plain model has a state dict."""
        raise ValueError(_NOT_SAVED)

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise ValueError: weights can only be loaded into the plain model."""
        raise ValueError("an optimised copy cannot load weights; load them into a plain model and optimise that")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise ValueError in pickle and deepcopy."""
        raise ValueError(_NOT_SAVED)

    def _apply(self, fn: Any, recurse: bool = True) -> "OptimizedDETR":
        """Raise ValueError: the weights are packed for one device and dtype."""
        raise ValueError(
            "an optimised copy cannot change its device or dtype; move the plain model and optimise it again:"
            " optimize(model.to(device), dtype=dtype)"
        )
