"""HTTP service for object detection: OpenAI-compatible endpoints, a page to try it on, limits and metrics."""

from conditional_detr.serving.app import create_app
from conditional_detr.serving.settings import ServiceSettings

__all__ = ["ServiceSettings", "create_app"]
