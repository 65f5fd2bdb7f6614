"""AP and loss of a model during training, on a dataset in COCO's format or on any other map-style dataset."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed
from torchvision.ops import box_convert

from conditional_detr.data.batching import batches
from conditional_detr.data.dataset import Sample, collate
from conditional_detr.evaluation.coco import MAX_DETECTIONS, CocoResult, evaluate, evaluate_detections
from conditional_detr.evaluation.processes import process_rank
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.postprocessing import Postprocessing, postprocess
from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output
from conditional_detr.modeling.layers import evaluation_mode
from conditional_detr.set_prediction.losses import Normalisers, SetLoss
from conditional_detr.training.loader import SampleDataset

IndexedSample: TypeAlias = tuple[int, Sample]
"""A sample and its index in the dataset."""


def measure(model: DetectionTransformer, data: SampleDataset, batch_size: int, criterion: SetLoss) -> dict[str, Any]:
    """Compute COCO's twelve metrics, the AP of each class, and the loss.

    A dataset in COCO's format has the attributes ``annotations`` and ``images``, a folder or the images by id. It is
    evaluated on the original images, as ``conditional-detr evaluate`` does. Any other dataset is evaluated on its
    samples: areas are in their pixels, and no target is a crowd. Under torch.distributed, the processes share the
    images.

    Args:
        model: the model, in any mode.
        data: the validation data.
        batch_size: images a forward pass of one process.
        criterion: the loss.

    Returns:
        The twelve metrics by name, per_class, a dict of AP by class name, and val_loss.

    Raises:
        OSError: an image cannot be read.
        ValueError: classes that the model does not have, or invalid targets.
    """
    annotations, images = getattr(data, "annotations", None), getattr(data, "images", None)
    loss = _MeanLoss(model, criterion)
    if annotations is not None and images is not None:
        result = evaluate(Detector(model), annotations, images, batch_size=batch_size)
        for samples in _batches_of_process(data, batch_size):  # the detector groups the images in another way
            loss.add(_predict(model, samples), samples)
    else:
        result = _evaluate_samples(model, data, batch_size, loss)
    per_class = {name: of_class["AP"] for name, of_class in result.per_class.items()}
    return {**result.metrics, "per_class": per_class, "val_loss": loss.value()}


class _MeanLoss:
    """The total loss of a dataset, as of one joined batch.

    Args:
        model: the model.
        criterion: the loss.
    """

    def __init__(self, model: DetectionTransformer, criterion: SetLoss) -> None:
        self._model, self._criterion = model, criterion
        self._of_sums = replace(criterion, normalisers=Normalisers(1.0, 1.0))
        self._sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        self._counts: list[int] = []

    def add(self, output: Output, samples: Sequence[IndexedSample]) -> None:
        """Add the predictions for some samples."""
        targets = [target for _, (_, target) in samples]
        losses = self._of_sums(output, targets)
        self._sums += torch.stack([losses[name].sum() for name in ("class", "l1", "giou")])
        self._counts += [len(target["labels"]) for target in targets]

    def value(self) -> float:
        """Return the loss; under torch.distributed, every process gets that of the samples of all."""
        criterion, sums = self._criterion, self._sums
        divisors = criterion.normalisers_of(self._counts, self._model.config.num_queries, self._model.device)
        if (processes := process_rank()[1]) > 1:
            distributed.all_reduce(sums)
            sums = sums / processes
        of_classes, l1, giou = sums.tolist()
        boxes = criterion.l1_weight * l1 + criterion.giou_weight * giou
        return criterion.class_weight * of_classes / float(divisors.of_classes) + boxes / float(divisors.boxes)


def _batches_of_process(data: SampleDataset, batch_size: int) -> Iterator[list[IndexedSample]]:
    """Yield the batches of this process: samples with their indices, in the dataset's order."""
    rank, processes = process_rank()
    for indices in batches(data, batch_size, seed=0, epoch=0, shuffle=False, rank=rank, processes=processes):
        yield [(index, data[index]) for index in indices]


def _evaluate_samples(
    model: DetectionTransformer, data: SampleDataset, batch_size: int, loss: _MeanLoss
) -> CocoResult:
    """Evaluate a dataset on its samples, and add their predictions to the loss."""
    image_entries: dict[int, dict[str, Any]] = {}
    target_entries: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    rows = torch.arange(model.config.num_classes, device="cpu")
    postprocessing = Postprocessing(rows, 0.0, MAX_DETECTIONS, model.scores)
    for samples in _batches_of_process(data, batch_size):
        output = _predict(model, samples)
        loss.add(output, samples)
        logits, boxes = _last_layer(output)
        for i, (index, (pixels, target)) in enumerate(samples):
            height, width = pixels.shape[1:]
            image_entries[index] = {"id": index, "height": height, "width": width}
            scale = torch.tensor([width, height, width, height], dtype=torch.int64, device="cpu")
            target_boxes = box_convert(target["boxes"].float(), "cxcywh", "xyxy") * scale
            target_entries += _coco_entries(index, target_boxes, target["labels"])
            detected, scores, labels, _ = postprocess(logits[i], boxes[i], (height, width), postprocessing)
            results += _coco_entries(index, detected, labels, score=scores)
    shares: list[Any] = [(image_entries, target_entries)]
    processes = process_rank()[1]
    if processes > 1:
        shares = [None] * processes
        distributed.all_gather_object(shares, (image_entries, target_entries))
    result = evaluate_detections(_merge(shares, model), results)
    names = model.metadata.class_names  # the categories are numbered, because several classes may have one name
    if len(set(names)) < len(names):
        return result
    return replace(result, per_class={key.split(" ", 1)[1]: value for key, value in result.per_class.items()})


def predict(model: DetectionTransformer, sample: Sample) -> tuple[Tensor, Tensor]:
    """Return the last layer's logits (1, N, C) and boxes (1, N, 4) on the CPU, computed in eval mode."""
    return _last_layer(_predict(model, [(0, sample)]))


def _last_layer(output: Output) -> tuple[Tensor, Tensor]:
    """Return the last layer's logits (B, N, C) and boxes (B, N, 4) on the CPU."""
    return output.logits[-1].float().cpu(), output.boxes[-1].float().cpu()


@torch.inference_mode()
def _predict(model: DetectionTransformer, samples: Sequence[IndexedSample]) -> Output:
    """Return the predictions of all layers, computed in eval mode."""
    pixels, padding, _ = collate([sample for _, sample in samples])
    padding = None if padding is None else padding.to(model.device)
    with evaluation_mode(model):
        return model(pixels.to(model.device, model.dtype), padding)


def _coco_entries(image_id: int, boxes: Tensor, labels: Tensor, **others: Tensor) -> list[dict[str, Any]]:
    """Convert boxes (K, 4) x0 y0 x1 y1 to entries of COCO's format."""
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
    columns = {"bbox": boxes.tolist(), "category_id": labels.tolist(), **{k: v.tolist() for k, v in others.items()}}
    rows = zip(*columns.values(), strict=True)
    return [{"image_id": image_id, **dict(zip(columns, row, strict=True))} for row in rows]


def _merge(shares: list[Any], model: DetectionTransformer) -> Mapping[str, Any]:
    """Merge the annotations of all processes; an image that several processes have counts once."""
    images: dict[int, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for share_images, share_annotations in shares:
        annotations += [entry for entry in share_annotations if entry["image_id"] not in images]
        images |= share_images
    names = model.metadata.class_names
    categories = [{"id": row, "name": f"{row} {name}"} for row, name in enumerate(names)]
    return {"images": list(images.values()), "annotations": annotations, "categories": categories}
