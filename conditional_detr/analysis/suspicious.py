"""List labels that may be wrong: those that confident detections contradict, and boxes that are labelled twice."""

from typing import Any

import numpy as np

from conditional_detr.analysis.matching import Matches, box_ious
from conditional_detr.analysis.tide import BACKGROUND, CLASSIFICATION, LOCALISATION, Errors, targets_of
from conditional_detr.data.coco import Annotations

CONFIDENT = 0.5  # wrong labels raise the best threshold of a rare class above this
REPEATED_IOU = 0.9  # of two annotations that may be one object
REASONS = {
    "unlabelled": "a confident detection where nothing is labelled",
    "class": "detected as another class, with a higher score than as the labelled one",
    "box": "a confident detection whose box differs, and none that fits",
    "repeated": f"two labels with an IoU of at least {REPEATED_IOU}",
}


_NO_LABEL = {"annotation": None, "annotation_id": None, "label": None, "box": None}


class Describer:
    """Describe images, annotations and detections for JSON.

    Args:
        data: the dataset.
        matches: detections on it.
    """

    def __init__(self, data: Annotations, matches: Matches) -> None:
        self._data = data
        self._matches = matches
        self._image_ids = sorted(data.images)
        self._names = class_names(data)

    def image(self, position: int) -> dict[str, Any]:
        """Return file name and id of an image by its position in the order of ids."""
        image_id = self._image_ids[position]
        return {"image": self._data.images[image_id].get("file_name"), "image_id": image_id}

    def label(self, annotation: int) -> dict[str, Any]:
        """Return position in the file, id, class and box of an annotation; None each for -1."""
        if annotation < 0:
            return dict(_NO_LABEL)
        entry = self._data.annotations[self._matches.indices[annotation]]
        name = self._data.categories[entry["category_id"]]
        return {"annotation": entry["index"], "annotation_id": entry["id"], "label": name, "box": entry["bbox"]}

    def labelled(self, annotation: int) -> dict[str, Any]:
        """Return an annotation with its image."""
        return {**self.image(int(self._matches.annotations[annotation, 0])), **self.label(annotation)}

    def detection(self, detection: int) -> dict[str, Any]:
        """Return class, box and score of a detection."""
        _, category, *box, score = self._matches.detections[detection].tolist()
        return {"detected": self._names[int(category)], "detected_box": box, "score": score}


def class_names(data: Annotations) -> list[str]:
    """Return the class names in the order of their ids, which is that of the matches' categories."""
    return [data.categories[i] for i in sorted(data.categories)]


def find_suspicious(data: Annotations, matches: Matches, errors: Errors, kept: np.ndarray) -> list[dict[str, Any]]:
    """List labels that may be wrong, the most confident detections first, then repeated labels.

    A detection is confident above the threshold of its class, or above 0.5.

    Args:
        data: the dataset.
        matches: detections on it.
        errors: their errors.
        kept: (K,) bool, the detections that are above the threshold of their class.

    Returns:
        Of each label {"reason": a key of ``REASONS``; "image": file name; "image_id"; "annotation": position in the
        file, and "annotation_id", None for what is unlabelled; "label"; "box" [x0, y0, w, h] that is labelled;
        "detected": class name, "detected_box", "score": of the detection, or the other label without score}.
    """
    confident = kept | ((matches.scores > CONFIDENT) & ~matches.ignored)
    wrong = confident & ~matches.correct
    targets = np.where(errors.kinds == BACKGROUND, -1, targets_of(matches, errors.kinds))
    own_scores = np.append(matches.scores, 0)[np.append(matches.detection_of, -1)][targets]  # 0 if not detected
    unfound = ~np.append(kept, False)[np.append(matches.detection_of, -1)][targets]
    reasons = np.select(
        [
            wrong & (errors.kinds == BACKGROUND),
            wrong & (errors.kinds == CLASSIFICATION) & (matches.scores > own_scores),
            wrong & (errors.kinds == LOCALISATION) & unfound,
        ],
        ["unlabelled", "class", "box"],
        "",
    )
    describe = Describer(data, matches)
    entries = []
    for k in sorted(np.flatnonzero(reasons != ""), key=lambda k: -matches.scores[k]):
        image = describe.image(int(matches.detections[k, 0]))
        label = describe.label(int(targets[k]))
        entries.append({"reason": str(reasons[k]), **image, **label, **describe.detection(int(k))})
    for first, second in _repeated(matches):
        other = describe.label(second)
        repeated = {"detected": other["label"], "detected_box": other["box"], "score": None}
        entries.append({"reason": "repeated", **describe.labelled(first), **repeated})
    return entries


def _repeated(matches: Matches) -> list[tuple[int, int]]:
    """Return pairs of annotations of an image whose boxes are nearly the same."""
    boxes, images = matches.annotations[:, 2:6], matches.annotations[:, 0]
    pairs = []
    for image in np.unique(images):
        start, end = np.searchsorted(images, [image, image + 1])
        ious = np.triu(box_ious(boxes[start:end], boxes[start:end]), k=1)
        pairs += [(start + int(i), start + int(j)) for i, j in np.argwhere(ious >= REPEATED_IOU)]
    return pairs
