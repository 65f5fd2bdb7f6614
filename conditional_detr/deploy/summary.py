"""What a model is, in numbers: parameters by part, and what an image costs."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.modeling.conditional_detr import ConditionalDETR, Config
from conditional_detr.modeling.metadata import LoadReport, Metadata

_HEADS = {"class_head", "box_head"}


@dataclass(frozen=True)
class Summary:
    """A model in numbers.

    Attributes:
        config: the architecture.
        metadata: classes and preprocessing.
        load_report: where the weights came from; None for a model that was not loaded.
        parameters: how many each part has, by its name in the model; "heads" are both of them.
        trainable: how many of all are not frozen.
        size: height and width of the image that ``flops`` is for.
        flops: operations of one image, an addition and a multiplication counting one each; of the architecture as
            ``config`` describes it, whatever has been put in place of a head since.
    """

    config: Config
    metadata: Metadata
    load_report: LoadReport | None
    parameters: dict[str, int]
    trainable: int
    size: tuple[int, int]
    flops: int

    @property
    def total(self) -> int:
        """How many parameters there are; what frozen BatchNorm keeps is none."""
        return sum(self.parameters.values())

    @property
    def multiply_adds(self) -> int:
        """Operations of one image, a multiplication and the addition of its result counting one together."""
        return self.flops // 2

    def to_dict(self) -> dict[str, Any]:
        """Return it all as json can hold it; an unused row of the class head is null."""
        names = self.metadata.class_names
        weights = None
        if report := self.load_report:
            weights = {"file": report.source, "bytes": report.size, "family": report.family, "dtype": report.dtype}
        return {
            "weights": weights,
            "architecture": asdict(self.config),
            "classes": {
                "names": list(names),
                "unused_rows": names.count(None),
                "category_ids": list(self.metadata.category_ids),
            },
            "preprocessing": asdict(self.metadata.preprocessing),
            "parameters": {"total": self.total, "trainable": self.trainable, "parts": self.parameters},
            "cost": {
                "height": self.size[0],
                "width": self.size[1],
                "flops": self.flops,
                "multiply_adds": self.multiply_adds,
            },
        }


def summarise(model: ConditionalDETR, size: tuple[int, int] | None = None) -> Summary:
    """Count a model's parameters and what one image costs it.

    Args:
        model: the model.
        size: height and width in pixels; default: the shortest and the longest edge of its preprocessing.

    Raises:
        ValueError: a size that is not positive, or too small for the backbone.
    """
    preprocessing = model.metadata.preprocessing
    size = size or (preprocessing.shortest_edge, preprocessing.longest_edge)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = name.partition(".")[0]
        parts["heads" if part in _HEADS else part] += parameter.numel()
    return Summary(
        config=model.config,
        metadata=model.metadata,
        load_report=model.load_report,
        parameters=dict(parts),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        size=size,
        flops=count_flops(model.config, *size),
    )


def count_flops(config: Config, height: int, width: int) -> int:
    """Count the operations of detecting objects on one image, an addition and a multiplication counting one each.

    What torch's counter counts: convolutions, matrix products, attention; normalisation and the like are left out.

    Args:
        config: the architecture.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Raises:
        ValueError: a size that is not positive, or too small for the backbone.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if min(height, width) < 1:
        raise ValueError(f"size: expected at least 1 x 1, got {height} x {width}")
    with MetaInit():
        model = ConditionalDETR(config).eval()
    # on the meta device nothing is computed; and on a CPU some versions of the counter miss the fused attention
    pixels = torch.empty(1, 3, height, width, device="meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(pixels)
    except RuntimeError as error:
        raise ValueError(f"size: {height} x {width} does not go through {config.backbone}: {error}") from error
    return counter.get_total_flops()
