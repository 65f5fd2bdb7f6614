"""Images of the validation data with their annotations and detections, for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from conditional_detr.data.coco import Annotations
from conditional_detr.inference.detections import Detections
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.sources import ImageSource
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.training.loader import SampleDataset

_IMAGES = 4
_WIDTH = 800  # pixels of both halves together
_THRESHOLD = 0.3  # lower than for use: the first epochs have few higher scores


def draw_validation(model: DetectionTransformer, data: SampleDataset) -> list[Image.Image]:
    """Draw annotations and detections side by side, on a few images that are the same in each evaluation.

    Args:
        model: the model, in any mode.
        data: the validation data; none is drawn of a dataset that is not in COCO's format.

    Raises:
        OSError: an image cannot be read.
        ValueError: classes that the model does not have.
    """
    annotations, images = getattr(data, "annotations", None), getattr(data, "images", None)
    if not isinstance(annotations, Annotations) or images is None:
        return []
    ids = list(annotations.images)
    chosen = [ids[len(ids) * k // _IMAGES] for k in range(_IMAGES)] if len(ids) > _IMAGES else ids
    sources: list[ImageSource] = [
        images[image_id] if isinstance(images, Mapping) else Path(images) / annotations.images[image_id]["file_name"]
        for image_id in chosen
    ]
    drawn = []
    detector, names = Detector(model), model.metadata.class_names
    for image_id, source in zip(chosen, sources, strict=True):
        entries = [
            entry
            for entry in annotations.annotations
            if entry["image_id"] == image_id and min(entry["bbox"][2:]) > 0  # others are no targets either
        ]
        found = [annotations.categories[entry["category_id"]] for entry in entries]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (entry["bbox"] for entry in entries)]
        labels = [names.index(name) for name in found]  # the model's, so that both halves have the same colours
        expected = Detections.from_boxes(boxes, names=found, labels=labels, image=source)
        image = detector(source, threshold=_THRESHOLD).draw_beside(expected)
        image.thumbnail((_WIDTH, _WIDTH))
        drawn.append(image)
    return drawn
