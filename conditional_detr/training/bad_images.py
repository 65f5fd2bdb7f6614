"""Images that cannot be read in training: which ones were skipped, and when there are too many of them."""

import warnings
from collections.abc import Callable
from typing import Any

from conditional_detr.training.checkpoints import Progress


class BadImages:
    """Count the images that cannot be read, and skip them up to a limit.

    Args:
        progress: stores their dataset indices.
        limit: number of images in this process that may be skipped.
        describe: returns a description of an image by its dataset index, for messages.
    """

    def __init__(self, progress: Progress, limit: int, describe: Callable[[int], str]) -> None:
        self._progress, self._limit, self._describe = progress, limit, describe

    def skip(self, index: int, error: Exception) -> None:
        """Count an image, and warn of it; raise its error if there are too many."""
        bad = self._progress.bad_images
        if index in bad:
            return
        bad.append(index)
        if len(bad) > self._limit:
            raise (OSError if isinstance(error, OSError) else ValueError)(
                f"{error}; expected at most {self._limit} such images (max_bad_images), got {len(bad)}"
            )
        warnings.warn(
            f"{error}; skipped {self._describe(index)}, {len(bad)} of at most {self._limit} such images", stacklevel=3
        )

    def share(self, accelerator: Any) -> None:
        """Merge the skipped images of all processes."""
        if self._limit and accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            self._progress.bad_images = sorted(set(gather_object(self._progress.bad_images)))
