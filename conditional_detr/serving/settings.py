"""Settings of the service, validated when they are made."""

import os
from dataclasses import dataclass, field

from limits import parse
from limits.errors import ConfigurationError
from limits.storage import storage_from_string

from conditional_detr.inference.url_guard import UrlGuard


@dataclass(frozen=True)
class ServiceSettings:
    """Limits and defaults of the service.

    Attributes:
        max_batch: run at most this many images of one size together; on a CPU large images run in smaller batches.
        max_wait: seconds that the model waits at most for images that are being opened, to run them together.
        max_queue: requests in the service at a time; further ones are refused with 503.
        max_images: images per request.
        max_tiles: tiles and other views of the images of a request, when they are divided.
        max_body: bytes of a request's body.
        max_bodies: bytes of all bodies in the service at a time; further ones are refused with 503.
        max_pixels: pixels of an image, checked before it is decoded.
        body_seconds: seconds within which a body has to arrive.
        header_seconds: seconds within which the headers of a request have to arrive.
        threads: threads that open images.
        urls: which image URLs are downloaded; by default none.
        url_seconds: seconds for the download of an image.
        rate_limit: requests per key, such as "60/minute", in the notation of the package limits; None: no limit.
        rate_storage: where requests are counted, as a URI of the package limits: "memory://" counts in each process,
            "redis://..." across processes and machines.
        threshold: reported are detections with a higher score, unless a request says otherwise; None: that of the
            detector.
        top_k: maximum number of detections per image, unless a request says otherwise.

    Raises:
        ValueError: a number out of range, a rate limit in another notation, or a storage that cannot be used.
    """

    max_batch: int = 8
    max_wait: float = 0.005
    max_queue: int = 64
    max_images: int = 16
    max_tiles: int = 64
    max_body: int = 32 * 2**20
    max_bodies: int = 512 * 2**20
    max_pixels: int = 64_000_000
    body_seconds: float = 30.0
    header_seconds: float = 10.0
    threads: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    urls: UrlGuard = field(default_factory=UrlGuard)
    url_seconds: float = 10.0
    rate_limit: str | None = None
    rate_storage: str = "memory://"
    threshold: float | None = None
    top_k: int = 100

    def __post_init__(self) -> None:
        counts = ("max_batch", "max_queue", "max_images", "max_tiles", "max_body", "max_pixels", "threads", "top_k")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("body_seconds", "header_seconds", "url_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if self.max_bodies < self.max_body:
            raise ValueError(f"max_bodies: expected at least max_body, {self.max_body}, got {self.max_bodies}")
        if not 0 <= self.max_wait <= 1:
            raise ValueError(f"max_wait: expected 0 to 1 seconds, got {self.max_wait}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold: expected 0..1, got {self.threshold}")
        if self.rate_limit is not None:
            try:
                parse(self.rate_limit)
            except ValueError as error:
                raise ValueError(f"rate_limit: expected one such as 60/minute, got {self.rate_limit!r}") from error
        try:
            storage_from_string(f"async+{self.rate_storage}")
        except ConfigurationError as error:
            raise ValueError(f"rate_storage: {error}, got {self.rate_storage!r}") from error
