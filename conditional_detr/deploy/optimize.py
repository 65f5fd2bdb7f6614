"""An inference copy of a model: the same mathematics in fewer, larger and narrower steps.

The copy is the plain model with some of its modules replaced. What no image changes is computed once, projections
that read the same tensor become one, and kernels do what follows them. All else it inherits.
"""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conditional_detr.deploy.backbone import FastBackbone
from conditional_detr.deploy.kernels import Computation, FusedConv, has_kernels, of_any_size
from conditional_detr.deploy.layers import FastDecoder, fast_encoder
from conditional_detr.modeling.conditional_detr import ConditionalDETR, Output, check_input

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOT_SAVED = "an optimised copy cannot be saved or copied; save or copy the model that it was made from"
_SHAPES = 32  # sizes of feature maps whose position encodings are kept


def optimize(model: ConditionalDETR, *, dtype: torch.dtype = torch.float32, compile: bool = False) -> "OptimizedDETR":
    """Make an inference copy of a model, for the device that it is on; the model stays as it is.

    The copy takes float32 pixels and gives float32 output of one layer, the last: logits (1, B, N, C), boxes
    (1, B, N, 4). In float32 it is within 1e-4 of the model. In half precision, softmax, sines, reference points and
    the arithmetic of boxes remain in float32. A Detector takes it as any model.

    Args:
        model: the model.
        dtype: what to compute in: float32, bfloat16 or float16.
        compile: use ``torch.compile``: the first image takes a minute or so, also the first batch of several; other
            sizes of images then take no longer.

    Returns:
        The copy. It cannot be trained, saved, copied or moved to another device, and has no attention maps: the model
        can and has. Tracing the backbone changes how modules of the whole process are called while it lasts, so no other
        thread may run a model meanwhile.

    Raises:
        TypeError: no ConditionalDETR, or a subclass, whose changes would be lost; no dtype.
        ValueError: another dtype; a model that was optimised before, or whose backbone cannot be traced.
    """
    check_model(model)
    check_dtype(dtype, DTYPES)
    computation = Computation(dtype, has_kernels(model.device, dtype), compile)
    with torch.no_grad():
        return OptimizedDETR(model, computation)


def check_model(model: ConditionalDETR) -> None:
    """Raise TypeError or ValueError unless a model is one that copies for inference can be made of."""
    if isinstance(model, OptimizedDETR):
        raise ValueError("model: expected a plain model, got one that was optimised before")
    if type(model) is not ConditionalDETR:  # what a subclass changes would be lost
        raise TypeError(f"model: expected a ConditionalDETR, got {type(model).__name__}")


def check_dtype(dtype: torch.dtype, expected: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless it is a dtype, ValueError unless it is one of those that are expected."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    if dtype not in expected:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, expected))}, got {dtype}")


class OptimizedDETR(ConditionalDETR):
    """What :func:`optimize` makes."""

    projection: Any
    decoder: Any

    def __init__(self, model: ConditionalDETR, computation: Computation) -> None:
        nn.Module.__init__(self)
        self.config, self.metadata, self.load_report = model.config, model.metadata, model.load_report
        dtype, kernels, compile = computation
        self.backbone = copy.copy(model.backbone)
        self.backbone._modules = {"body": FastBackbone(model.backbone.body, computation)}
        projection: Any = copy.deepcopy(model.projection).to(dtype).to(memory_format=torch.channels_last)
        self.projection = FusedConv(projection, relu=False) if kernels and not compile else projection
        self.encoder = fast_encoder(model.encoder, computation)
        self.decoder = FastDecoder(model.decoder, model.object_queries.weight, computation)
        self.class_head = copy.deepcopy(model.class_head).float()
        self.box_head = copy.deepcopy(model.box_head).float()
        self.requires_grad_(False)
        nn.Module.train(self, False)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._keeping = threading.Lock()
        self._compiled: Any = torch.compile(super().forward, dynamic=True) if compile else None

    @torch.no_grad()
    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Detect objects.

        Args:
            pixels: (B, 3, H, W), normalised as ``metadata.preprocessing`` says, float32.
            padding: (B, H, W) bool, True = padded; None: nothing is padded.

        Returns:
            Output of the last layer, float32: logits (1, B, N, C) and boxes (1, B, N, 4).

        Raises:
            TypeError: not tensors, or not of these dtypes.
            ValueError: not of these shapes.
        """
        check_input(pixels, padding)
        if padding is not None and padding.device.type == "cpu" and not padding.any():
            padding = None
        if self._compiled is None:
            return super().forward(pixels, padding)
        return self._compiled(of_any_size(pixels), None if padding is None else of_any_size(padding))

    def key_positions(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """Encode the cells of a feature map; those of an unpadded one are kept."""
        if padding is not None or torch.compiler.is_compiling():
            return super().key_positions(features, padding)
        size = (features.shape[-2], features.shape[-1])
        found = self._positions.get(size)
        if found is None:
            found = super().key_positions(features, None)
            with self._keeping:  # threads may share a copy
                if len(self._positions) >= _SHAPES:
                    del self._positions[next(iter(self._positions))]
                self._positions[size] = found
        return found

    def decode(
        self, memory: Tensor, positions: Tensor, padding: Tensor | None = None, *, object_queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Let the object queries find objects in the memory: as the plain model's, of one layer, the last."""
        if object_queries is not None:
            raise ValueError("object_queries: an optimised copy has its own worked in; the plain model takes others")
        return self.decoder(memory, positions, None if padding is None else padding.flatten(1))

    def attention_maps(self, *_: Any, **__: Any) -> Any:
        """Raise: the plain model shows where it looks."""
        raise ValueError("attention maps: an optimised copy has none; ask the model that it was made from")

    def train(self, mode: bool = True) -> "OptimizedDETR":
        """Raise if it is to train."""
        if mode:
            raise ValueError("an optimised copy cannot be trained; train the model that it was made from")
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Raise: the plain model is what is saved."""
        raise ValueError(_NOT_SAVED)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise: the weights are laid out for kernels, and the plain model has them all."""
        raise ValueError(_NOT_SAVED)

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Raise: weights are loaded into the plain model."""
        raise ValueError("an optimised copy takes no weights; load them into a model and optimise that")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise, for pickle and for deepcopy."""
        raise ValueError(_NOT_SAVED)

    def _apply(self, fn: Any, recurse: bool = True) -> "OptimizedDETR":
        """Raise: the weights are laid out for the device and precision that they are for."""
        raise ValueError(
            "an optimised copy stays on its device and in its precision; move the model and optimise it there:"
            " optimize(model.to(device), dtype=dtype)"
        )
