"""The convolutional backbone: a timm model that returns the feature map of one stage."""

import difflib
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Backbone(nn.Module):
    """A timm backbone with frozen BatchNorm, whose stem and first stage are not trained.

    Any timm model works whose ``features_only`` form returns (B, C, h, w) maps for images of any size, such as
    ResNet, RegNet and MobileNet. Its BatchNorm layers become fixed affine maps (eps 1e-5). All parameters up to the
    first stage of stride 4 are frozen, as the authors do for ResNets.

    Args:
        name: timm's name of the backbone, such as "resnet50".
        stage: index of the feature map in timm's ``feature_info``; 4 is the last stage of a ResNet (stride 32).
        dilation: replace the stride of that stage by dilation ("DC5"): half the stride, twice the resolution.

    Attributes:
        body: the timm model.
        channels: C of the feature map.
        stride: image size divided by feature map size.

    Raises:
        ValueError: timm has no such backbone, the backbone has no such stage, or it is not supported.
    """

    def __init__(self, name: str, *, stage: int, dilation: bool) -> None:
        super().__init__()
        self.body: nn.Module = _make_backbone(name, stage, dilation)
        feature_info: Any = self.body.feature_info
        self.channels: int = feature_info.channels()[-1]
        self.stride: int = feature_info.reduction()[-1]
        self._freeze_first_stage(name, stage)

    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute the feature map.

        Args:
            pixels: (B, 3, H, W), normalised; padded pixels are set to zero first.
            padding: (B, H, W) bool, True = padded; None: nothing is padded.

        Returns:
            features (B, C, h, w) and their padding (B, h, w), or None for padding None.
        """
        if padding is None:
            return self.body(pixels)[-1], None
        features = self.body(pixels.masked_fill(padding[:, None], 0.0))[-1]
        padding = F.interpolate(padding[:, None].float(), size=features.shape[-2:])[:, 0]  # nearest
        return features, padding.bool()

    def _freeze_first_stage(self, name: str, stage: int) -> None:
        """Freeze all parameters up to the end of the first stage of stride 4."""
        feature_info: Any = self.body.feature_info
        stages = feature_info.info[: stage + 1]
        first = next((s for s in stages if s["reduction"] >= 4), stages[-1])["module"]

        # timm flattens "stages.0" to "stages_0" in some of its wrappers
        def flat(path: str) -> str:
            return path.replace(".", "_").removeprefix("model_")

        reached = False
        for path, module in self.body.named_modules():
            inside = f"{flat(path)}_".startswith(f"{flat(first)}_")
            if reached and not inside:
                return
            reached = reached or inside
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        if not reached:
            raise ValueError(
                f"backbone: got {name!r}, whose first stage is {first!r} by its feature_info, but no module has this"
                " name; expected a backbone whose stem and first stage can be frozen"
            )


def _make_backbone(name: str, stage: int, dilation: bool) -> Any:
    """Build the timm backbone with random weights and frozen BatchNorm."""
    import timm
    from timm.utils.model import freeze_batch_norm_2d

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"backbone: expected the name of a timm model, such as 'resnet50', got {name!r}{hint}")
    pretrained = timm.get_pretrained_cfg(name)
    if pretrained is not None and pretrained.fixed_input_size:
        raise ValueError(f"backbone: expected one for images of any size, got {name!r}, which has a fixed input size")
    backbone = _features(name, stage)
    if dilation:
        stride = backbone.feature_info.reduction()[-1] // 2
        backbone = _features(name, stage, output_stride=stride)
        if backbone.feature_info.reduction()[-1] != stride:
            raise ValueError(
                f"dilation: expected False for stage {stage} of {name!r}, which cannot be dilated, got True"
            )
    if getattr(backbone, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(f"backbone: expected maps (B, C, h, w), got {name!r}, whose maps are channels-last")
    return freeze_batch_norm_2d(backbone)


def _features(name: str, stage: int, **options: int) -> Any:
    """Build a timm backbone that returns the feature map of one stage."""
    import timm

    try:
        return timm.create_model(name, features_only=True, out_indices=(stage,), **options)
    except (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        given = "".join(f" with {option}={value}" for option, value in options.items())
        raise ValueError(f"backbone: timm cannot build stage {stage} of {name!r}{given}: {error!r}") from error
