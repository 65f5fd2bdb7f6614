"""Training and evaluation, around the model: data, the loop, COCO's numbers."""

from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]
