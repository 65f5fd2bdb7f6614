"""Detect and track objects on videos, cameras and streams; PyAV decodes and encodes."""

from conditional_detr.video.detection import detect_video
from conditional_detr.video.frames import Frame

__all__ = ["Frame", "detect_video"]
