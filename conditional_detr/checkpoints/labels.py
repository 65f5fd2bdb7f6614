"""COCO's class names and ids.

COCO numbers its 80 classes with ids from 1 to 90. The class head of the published weights has 91 rows, one per id
including 0; 11 of them belong to no class and are None here.
"""

# fmt: off
COCO_NAMES: tuple[str | None, ...] = (
    None, "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", None, "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse",
    "sheep", "cow", "elephant", "bear", "zebra", "giraffe", None, "backpack", "umbrella", None,
    None, "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", None, "wine glass", "cup", "fork", "knife",
    "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza",
    "donut", "cake", "chair", "couch", "potted plant", "bed", None, "dining table", None, None,
    "toilet", None, "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven",
    "toaster", "sink", "refrigerator", None, "book", "clock", "vase", "scissors", "teddy bear", "hair drier",
    "toothbrush",
)
# fmt: on
"""91 names; the index is the COCO category id; None where COCO has no class."""

COCO_IDS: tuple[int, ...] = tuple(i for i, name in enumerate(COCO_NAMES) if name is not None)
"""The 80 category ids in use: maps an index 0..79 to an id 1..90; ``COCO_IDS.index`` is the inverse."""

UNUSED = "N/A"
"""The name that the published ``config.json`` gives to a row that belongs to no class."""
