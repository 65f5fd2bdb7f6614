"""AP of a model during training, on a dataset in COCO's format or on any other map-style dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torchvision.ops import box_convert

from conditional_detr.data.dataset import Sample, batches, collate
from conditional_detr.evaluation.coco import MAX_DETECTIONS, evaluate, evaluate_detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.postprocessing import Postprocessing, postprocess
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.layers import evaluation_mode
from conditional_detr.training.loader import SampleDataset


def measure(model: DetectionTransformer, data: SampleDataset, batch_size: int) -> dict[str, float]:
    """Compute COCO's twelve metrics.

    A dataset in COCO's format has the attributes ``annotations`` and ``images``. It is evaluated on the original
    images, as ``conditional-detr evaluate`` does. Any other dataset is evaluated on its samples: areas are in their
    pixels, and no target is a crowd. Under torch.distributed, the processes share the images.

    Args:
        model: the model, in any mode.
        data: the validation data.
        batch_size: images a forward pass of one process.

    Returns:
        The metrics by name.

    Raises:
        OSError: an image cannot be read.
        ValueError: classes that the model does not have, or invalid targets.
    """
    annotations, images = getattr(data, "annotations", None), getattr(data, "images", None)
    if annotations is not None and images is not None:
        return evaluate(Detector(model), annotations, images, batch_size=batch_size).metrics
    image_entries: dict[int, dict[str, Any]] = {}
    target_entries: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    rank, processes = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, processes = distributed.get_rank(), distributed.get_world_size()
    rows = torch.arange(model.config.num_classes, device="cpu")
    postprocessing = Postprocessing(rows, 0.0, MAX_DETECTIONS, model.scores)
    for indices in batches(data, batch_size, seed=0, epoch=0, shuffle=False, rank=rank, processes=processes):
        samples = [data[index] for index in indices]
        logits, boxes = predict(model, samples)
        for i, (index, (pixels, target)) in enumerate(zip(indices, samples, strict=True)):
            height, width = pixels.shape[1:]
            image_entries[index] = {"id": index, "height": height, "width": width}
            scale = torch.tensor([width, height, width, height], dtype=torch.int64, device="cpu")
            target_boxes = box_convert(target["boxes"].float(), "cxcywh", "xyxy") * scale
            target_entries += _coco_entries(index, target_boxes, target["labels"])
            detected, scores, labels, _ = postprocess(logits[i], boxes[i], (height, width), postprocessing)
            results += _coco_entries(index, detected, labels, score=scores)
    shares: list[Any] = [(image_entries, target_entries)]
    if processes > 1:
        shares = [None] * processes
        distributed.all_gather_object(shares, (image_entries, target_entries))
    return evaluate_detections(_merge(shares, model), results).metrics


@torch.inference_mode()
def predict(model: DetectionTransformer, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return the last layer's logits (B, N, C) and boxes (B, N, 4) on the CPU, computed in eval mode."""
    pixels, padding, _ = collate(samples)
    padding = None if padding is None else padding.to(model.device)
    with evaluation_mode(model):
        output = model(pixels.to(model.device, model.dtype), padding)
    return output.logits[-1].float().cpu(), output.boxes[-1].float().cpu()


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
