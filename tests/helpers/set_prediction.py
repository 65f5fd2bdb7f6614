"""Random predictions and targets, and the results of transformers' matcher and loss for them."""

from types import SimpleNamespace

import torch
from torch import Tensor

from conditional_detr import Output


def predictions(L=3, B=4, N=20, C=7, *, seed=0, dtype=torch.float32) -> Output:
    """Return random logits (L, B, N, C) similar to a partly trained model's, and boxes (L, B, N, 4) of any size."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(L, B, N, C, generator=generator, dtype=dtype) * 3 - 3
    boxes = torch.randn(L, B, N, 4, generator=generator, dtype=dtype).sigmoid()
    return Output(logits.requires_grad_(), boxes.requires_grad_())


def targets_of(counts, C=7, *, seed=0, dtype=torch.float32) -> list[dict[str, Tensor]]:
    """Return random targets inside their images, with ``counts[i]`` boxes in image i."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for count in counts:
        size = torch.rand(count, 2, generator=generator, dtype=dtype) * 0.5 + 0.02
        centre = size / 2 + torch.rand(count, 2, generator=generator, dtype=dtype) * (1 - size)
        labels = torch.randint(0, C, (count,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat((centre, size), dim=1)})
    return targets


def theirs(targets):
    """Return targets with transformers' key."""
    return [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]


def transformers_losses(output: Output, targets, **options):
    """Return transformers' total loss of Conditional DETR, and each loss by layer with this library's names."""
    from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

    return _losses(DeformableDetrForObjectDetectionLoss, output, targets, options)


def transformers_softmax_losses(output: Output, targets, **options):
    """Return the same of DETR, whose last column of logits is "no object"."""
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    costs = {"class_cost": 1, "eos_coefficient": 0.1, "num_labels": output.logits.shape[-1] - 1}
    return _losses(ForObjectDetectionLoss, output, targets, costs | options)


def _losses(criterion, output, targets, options):
    depth = len(output.logits)
    config = SimpleNamespace(
        **{"class_cost": 2, "bbox_cost": 5, "giou_cost": 2, "bbox_loss_coefficient": 5, "giou_loss_coefficient": 2},
        **{"focal_alpha": 0.25, "num_labels": output.logits.shape[-1], "decoder_layers": depth},
        auxiliary_loss=True,
    )
    vars(config).update(options)
    last = output.logits[-1], theirs(targets), output.logits.device, output.boxes[-1]
    total, found, _ = criterion(*last, config, output.logits, output.boxes)
    names = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    layers = [*(f"_{layer}" for layer in range(depth - 1)), ""]
    return total, {ours: torch.stack([found[name + layer] for layer in layers]) for ours, name in names.items()}


def transformers_pairs(output: Output, targets, class_cost=2, bbox_cost=5, giou_cost=2):
    """Return transformers' assignment of every layer and image."""
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

    matcher = DeformableDetrHungarianMatcher(class_cost, bbox_cost, giou_cost)
    layers = zip(output.logits, output.boxes, strict=True)
    return [matcher({"logits": logits, "pred_boxes": boxes}, theirs(targets)) for logits, boxes in layers]


def transformers_softmax_pairs(output: Output, targets):
    """Return the assignment of transformers' DETR, for every layer and image."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    matcher = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    layers = zip(output.logits, output.boxes, strict=True)
    return [matcher({"logits": logits, "pred_boxes": boxes}, theirs(targets)) for logits, boxes in layers]


def assert_same_pairs(found, expected):
    """Assert equal queries and targets, in the same order, at every layer and image."""
    assert len(found) == len(expected)
    for ours, others in zip(found, expected, strict=True):
        assert [[x.tolist() for x in pair] for pair in ours] == [[x.tolist() for x in pair] for pair in others]


class OnDevice(Tensor):
    """A tensor that acts as if it were on a device: it counts copies to the CPU, and fails on other synchronisation.

    Tensors computed from it have the same type.
    """

    copies = 0
    _WAITING = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in cls._WAITING, f"{name} waits for the device"
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index), (
                "a mask waits for the device"
            )
        if name == "cpu":
            OnDevice.copies += 1
            return args[0].as_subclass(Tensor)
        return super().__torch_function__(func, types, args, kwargs)
