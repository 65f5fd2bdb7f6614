"""Datasets and detections whose errors are known, shared by the tests of the analysis."""

import numpy as np

from conditional_detr.evaluation.coco import EvaluationArrays

CAT, DOG = 3, 9


def arrays(annotations, detections, images=1, categories=2) -> EvaluationArrays:
    """Return arrays of (image, category, x0, y0, w, h[, iscrowd]) and (image, category, x0, y0, w, h, score)."""
    rows = [(*row[:6], row[4] * row[5], row[6] if len(row) > 6 else 0) for row in annotations]
    truth, found = (np.array(part, dtype=float).reshape(-1, width) for part, width in ((rows, 8), (detections, 7)))
    return EvaluationArrays(images, categories, truth, found)


def random_arrays(seed, images=30, categories=4, crowds=0.1) -> EvaluationArrays:
    """Return boxes that overlap, and detections that are near them, far from them, repeated and of wrong classes."""
    generator = np.random.default_rng(seed)

    def box():
        return np.concatenate([generator.uniform(0, 60, 2), generator.uniform(8, 40, 2)])

    annotations, detections = [], []
    for image in range(images):
        for _ in range(generator.integers(0, 8)):
            truth, category = box(), generator.integers(categories)
            annotations.append((image, category, *truth, generator.random() < crowds))
            for _ in range(generator.integers(0, 4)):
                other = category if generator.random() < 0.7 else generator.integers(categories)
                near = np.abs(truth + generator.normal(0, 4, 4))
                detections.append((image, other, *near, generator.random()))
        far = range(generator.integers(0, 4))
        detections += [(image, generator.integers(categories), *box(), generator.random()) for _ in far]
    return arrays(annotations, detections, images, categories)


def known_case():
    """Return annotations and results with one error of each kind, each in an image of its own, and a correct one."""
    boxes = {1: [0, 0, 10, 10], 2: [0, 0, 10, 10], 3: [0, 0, 10, 10], 4: [0, 0, 10, 10], 7: [50, 50, 10, 10]}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in range(1, 8)],
        "categories": [{"id": DOG, "name": "dog"}, {"id": CAT, "name": "cat"}],
        "annotations": [
            {"id": 100 + i, "image_id": i, "category_id": DOG if i == 7 else CAT, "bbox": box}
            for i, box in boxes.items()
        ],
    }
    found = [
        (1, CAT, [0, 0, 10, 10], 0.95),  # correct
        (2, DOG, [0, 0, 10, 10], 0.9),  # of another class
        (3, CAT, [0, 0, 10, 4], 0.85),  # IoU 0.4
        (4, CAT, [0, 0, 10, 10], 0.8),  # correct
        (4, CAT, [0, 0, 10, 9], 0.75),  # a duplicate
        (5, CAT, [0, 0, 10, 10], 0.7),  # nothing is there
        (7, CAT, [50, 50, 10, 3], 0.65),  # of another class, IoU 0.3
    ]
    results = [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in found]
    return content, results
