"""What the tests of bulk detection load in Ray's processes, and images that end them."""

import os
import signal
import time
from pathlib import Path

from conditional_detr import Detector
from conditional_detr.inference import batches


def load(mark, seconds, device):
    """Load the detector of the shapes, in a process that an image called "kills" ends, and one called "fails" breaks.

    Args:
        mark: a file; the process that runs the first batch makes it and is killed, as by a machine that is lost.
        seconds: that each batch takes at least.
        device: the device.
    """
    plain = batches.run_batch

    def run_batch(model, group, *arguments):
        time.sleep(seconds)
        names = [Path(image.name).stem for image in group]
        if "fails" in names:
            raise RuntimeError("the device has failed")
        found = plain(model, group, *arguments)
        if "kills" in names:
            os.kill(os.getpid(), signal.SIGKILL)
        if not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    batches.run_batch = run_batch
    return Detector.from_pretrained("shapes", device=device)
