"""AP of a model in training, on a data set in COCO's form or on any other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torchvision.ops import box_convert

from conditional_detr.data.dataset import Sample, batches, collate
from conditional_detr.evaluation.coco import MAX_DETECTIONS, evaluate, evaluate_detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.postprocessing import Postprocessing, postprocess
from conditional_detr.modeling.conditional_detr import ConditionalDETR
from conditional_detr.modeling.layers import evaluation_mode
from conditional_detr.training.loader import SampleDataset


def measure(model: ConditionalDETR, data: SampleDataset, batch_size: int) -> dict[str, float]:
    """Return COCO's twelve numbers.

    Of a data set in COCO's form, which has ``annotations`` and ``images``, they are those of the original images,
    as ``conditional-detr evaluate`` measures. Of any other they are those of its samples as they come: sizes are in
    their pixels, and all targets count. Under torch.distributed, every process does its share.

    Raises:
        OSError: images that cannot be read.
        ValueError: classes that the model does not have, or targets that do not fit.
    """
    annotations, images = getattr(data, "annotations", None), getattr(data, "images", None)
    if annotations is not None and images is not None:
        return evaluate(Detector(model), annotations, images, batch_size=batch_size).metrics
    entries: dict[int, dict[str, Any]] = {}
    objects: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    rank, processes = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, processes = distributed.get_rank(), distributed.get_world_size()
    postprocessing = Postprocessing(torch.arange(model.config.num_classes), 0.0, MAX_DETECTIONS)
    for indices in batches(data, batch_size, seed=0, epoch=0, shuffle=False, rank=rank, processes=processes):
        samples = [data[index] for index in indices]
        logits, boxes = predict(model, samples)
        for i, (index, (pixels, target)) in enumerate(zip(indices, samples, strict=True)):
            height, width = pixels.shape[1:]
            entries[index] = {"id": index, "height": height, "width": width}
            scale = torch.tensor([width, height, width, height])
            wanted = box_convert(target["boxes"].float(), "cxcywh", "xyxy") * scale
            objects += _entries(index, wanted, target["labels"])
            found, scores, labels, _ = postprocess(logits[i], boxes[i], (height, width), postprocessing)
            results += _entries(index, found, labels, score=scores)
    shares: list[Any] = [(entries, objects)]
    if processes > 1:
        shares = [None] * processes
        distributed.all_gather_object(shares, (entries, objects))
    return evaluate_detections(_joined(shares, model), results).metrics


@torch.inference_mode()
def predict(model: ConditionalDETR, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return the last layer's logits (B, N, C) and boxes (B, N, 4) of samples, on the host; the model's modes stay."""
    pixels, padding, _ = collate(samples)
    masks = None if padding is None else padding.to(model.device)
    with evaluation_mode(model):
        output = model(pixels.to(model.device, model.dtype), masks)
    return output.logits[-1].float().cpu(), output.boxes[-1].float().cpu()


def _entries(image: int, boxes: Tensor, labels: Tensor, **others: Tensor) -> list[dict[str, Any]]:
    """Return boxes (K, 4) x0 y0 x1 y1 in COCO's form."""
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1)
    columns = {"bbox": boxes.tolist(), "category_id": labels.tolist(), **{k: v.tolist() for k, v in others.items()}}
    rows = zip(*columns.values(), strict=True)
    return [{"image_id": image, **dict(zip(columns, row, strict=True))} for row in rows]


def _joined(shares: list[Any], model: ConditionalDETR) -> Mapping[str, Any]:
    """Return the annotations of all processes; an image that several had counts once."""
    images: dict[int, dict[str, Any]] = {}
    objects: list[dict[str, Any]] = []
    for its_images, its_objects in shares:
        objects += [entry for entry in its_objects if entry["image_id"] not in images]
        images |= its_images
    names = model.metadata.class_names
    categories = [{"id": row, "name": f"{row} {name}"} for row, name in enumerate(names)]
    return {"images": list(images.values()), "annotations": objects, "categories": categories}
