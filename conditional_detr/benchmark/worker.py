"""An engine in a process of its own: as those who use it have it, with nobody else's memory and threads in the way.

In one process, what one engine leaves in the allocator changes how fast the next is: on Linux, eager PyTorch spends a
third of its time on pages of memory that it has to ask for anew, unless someone before has left enough of them.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from conditional_detr.benchmark.engines import ENGINES, WEIGHTS
from conditional_detr.benchmark.timing import process_peak, seconds_of, warm_up
from conditional_detr.modeling.conditional_detr import ConditionalDETR

EXPECTED = "expected.pt"
_SIGN = "benchmark: "  # in front of what is said to the parent: libraries may print as well
_START = "from conditional_detr.benchmark.worker import main; main()"


@dataclass(frozen=True)
class Task:
    """What a process is to run.

    Attributes:
        engine: its name.
        folder: where the model, the expected output and the engine's files are.
        device: such as "cpu".
        threads: of the CPU.
        size: height and width of the images.
        batch: images a call.
        seed: of the pixels.
    """

    engine: str
    folder: str
    device: str
    threads: int
    size: tuple[int, int]
    batch: int
    seed: int

    def pixels(self) -> Tensor:
        """Draw the pixels (B, 3, H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, 3, *self.size, generator=generator).to(self.device)


class Worker:
    """A process that runs an engine when it is told to; leave its context to end it.

    Args:
        task: what it runs.

    Attributes:
        found: after ``ready``, by name: ``logits`` and ``boxes``, the largest differences from the plain model's, and
            ``megabytes``.

    Raises:
        OSError: it cannot be started, or ends before it should; the message has its last words.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.found: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        command = [sys.executable, "-c", _START, json.dumps(asdict(task))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, **pipes)

    @property
    def ended(self) -> bool:
        """Whether the process is no more."""
        return self._process.poll() is not None

    def __enter__(self) -> "Worker":
        return self

    def ready(self) -> None:
        """Wait until the engine is loaded and warm."""
        self.found = json.loads(self._listen())

    def seconds(self) -> float:
        """Let the engine run once, and return how long it took."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._failed() from error
        return float(self._listen())

    def finish(self) -> None:
        """Let it end, and take down the most memory that it ever had, in MB, where Linux tells it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = json.loads(self._listen())
        if self.found.get("megabytes") is None:
            self.found["megabytes"] = peak

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _listen(self) -> str:
        """Return what it says next."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_SIGN):
                return line.removeprefix(_SIGN)
        raise self._failed()

    def _failed(self) -> OSError:
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        return OSError(f"{self.task.engine}: its process failed: {said[-1] if said else f'exit code {code}'}")


def main() -> None:
    """Run an engine each time that a line comes in; the only argument is the task as json."""
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    folder, device = Path(task.folder), torch.device(task.device)
    engine, pixels = ENGINES[task.engine], task.pixels()
    model = ConditionalDETR.from_pretrained(folder / WEIGHTS, device=device)
    with torch.no_grad():
        if engine.write is not None:
            model.to("meta")  # it reads its files: the weights of both would count
        run = engine.make(model, folder, pixels)
        found, megabytes = warm_up(lambda: run(pixels), device)
        expected = torch.load(folder / EXPECTED, map_location=device, weights_only=True)
        logits, boxes = ((a.float() - b).abs().max().item() for a, b in zip(found, expected, strict=True))
        del expected
        _say({"logits": logits, "boxes": boxes, "megabytes": megabytes})
        for _ in sys.stdin:
            _say(seconds_of(lambda: run(pixels), device))
    _say(process_peak() if device.type == "cpu" and Path("/proc/self/status").exists() else None)


def _say(what: Any) -> None:
    print(f"{_SIGN}{json.dumps(what)}", flush=True)
