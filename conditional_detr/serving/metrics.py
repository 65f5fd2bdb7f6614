"""Metrics of the service in Prometheus' text format."""

import os
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = CONTENT_TYPE_LATEST
MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of prometheus_client: the folder in which several processes share their metrics."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32)
_PREFIX = "conditional_detr"


class Metrics:
    """Counters, gauges and histograms of one service; those of all its processes where they share a folder."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": _PREFIX, "registry": registry}
        self.requests = Counter("requests", "Requests.", ["route", "status"], **own)
        self.seconds = Histogram("request_seconds", "Time of requests.", ["route"], buckets=_SECONDS, **own)
        self.in_progress = Gauge(
            "requests_in_progress", "Requests in the service.", multiprocess_mode="livesum", **own
        )
        self.images = Counter("images", "Images with detections.", ["model"], **own)
        self.batch_size = Histogram("batch_size", "Images that ran together.", ["model"], buckets=_SIZES, **own)
        self.model_seconds = Histogram("model_seconds", "Time of batches.", ["model"], buckets=_SECONDS, **own)
        self._registry = registry

    def text(self) -> bytes:
        """Return the values of this process, or of all processes that share a folder."""
        if MULTIPROCESS_FOLDER not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return generate_latest(registry)
