"""Summarise a model: parameters by part, and operations per image."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.deploy.optimize import OptimizedDETR
from conditional_detr.deploy.parameters import count_parameters
from conditional_detr.modeling.architectures import plain_class
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.detr import DETR
from conditional_detr.modeling.metadata import LoadReport, Metadata


@dataclass(frozen=True)
class Summary:
    """Summary of a model.

    Attributes:
        network: name of the class, "ConditionalDETR" or "DETR".
        config: the sizes of the network.
        metadata: class names, category ids and preprocessing.
        load_report: source of the weights; None: the model was not loaded.
        parameters: number of parameters of each part, by its name in the model; "heads" is the sum of both heads.
        trainable: number of parameters that are not frozen.
        size: image height and width for ``flops``.
        flops: operations per image, counting an addition and a multiplication as one each. They are those of the
            architecture in ``config``, even if a head was replaced.
    """

    network: str
    config: Config
    metadata: Metadata
    load_report: LoadReport | None
    parameters: dict[str, int]
    trainable: int
    size: tuple[int, int]
    flops: int

    @property
    def total(self) -> int:
        """Return the number of parameters; the buffers of frozen BatchNorm are not included."""
        return sum(self.parameters.values())

    @property
    def multiply_adds(self) -> int:
        """Return the operations per image, counting a multiplication with its addition as one."""
        return self.flops // 2

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-compatible dict; the name of an unused row of the class head is None."""
        names = self.metadata.class_names
        weights = None
        if report := self.load_report:
            weights = {
                "file": report.source,
                "bytes": report.size,
                "name_format": report.name_format,
                "dtype": report.dtype,
            }
        return {
            "weights": weights,
            "network": self.network,
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


def summarise(model: DetectionTransformer, size: tuple[int, int] | None = None) -> Summary:
    """Count the parameters of a model and its operations per image.

    Args:
        model: a plain model, or an optimised copy, which gives the numbers of the plain model that it was made from.
        size: image height and width in pixels; None: the largest size of its preprocessing.

    Returns:
        The summary.

    Raises:
        ValueError: the size is not positive, or too small for the backbone.
    """
    size = size or model.metadata.preprocessing.largest_size
    counts = model.plain_parameters if isinstance(model, OptimizedDETR) else count_parameters(model)
    return Summary(
        network=plain_class(model).__name__,
        config=model.config,
        metadata=model.metadata,
        load_report=model.load_report,
        parameters=dict(counts.parts),
        trainable=counts.trainable,
        size=size,
        flops=count_flops(model.config, *size, plain_class(model)),
    )


def count_flops(
    config: Config, height: int, width: int, network: type[ConditionalDETR] | type[DETR] = ConditionalDETR
) -> int:
    """Count the operations of a forward pass on one image, an addition and a multiplication as one each.

    Convolutions, matrix products and attention are counted, as in torch's FLOP counter; normalisation, activations and
    other elementwise operations are not.

    Args:
        config: the sizes of the network.
        height: image height in pixels.
        width: image width in pixels.
        network: ConditionalDETR or DETR.

    Returns:
        The number of operations.

    Raises:
        ValueError: the size is not positive, or too small for the backbone.
    """
    from torch.utils.flop_counter import FlopCounterMode

    if min(height, width) < 1:
        raise ValueError(f"size: expected at least 1 x 1, got {height} x {width}")
    with MetaInit():
        model = network(config).eval()
    # the meta device computes nothing; on a CPU, some versions of the counter miss fused attention
    pixels = torch.empty(1, 3, height, width, device="meta")
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(pixels)
    except RuntimeError as error:
        raise ValueError(f"size: {config.backbone} cannot process {height} x {width}: {error}") from error
    return counter.get_total_flops()
