"""Run an engine in its own process, so that the memory and threads of other engines do not affect it.

In a shared process, memory that one engine leaves in the allocator makes the next one faster: on Linux, eager PyTorch
spends a third of its time on requesting memory pages, unless earlier work has left enough of them.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from conditional_detr.benchmark.engines import ENGINES, WEIGHTS
from conditional_detr.benchmark.timing import process_peak_memory, seconds_of, warm_up
from conditional_detr.modeling.detection_transformer import DetectionTransformer

EXPECTED = "expected.pt"
_PREFIX = "benchmark: "  # marks messages to the parent process; libraries may print other lines


@dataclass(frozen=True)
class EngineTask:
    """Task of a worker process, which runs the function ``main`` of the module that defines the task's class.

    Attributes:
        engine: name of the engine.
        folder: folder of the checkpoint and of other files that the engine reads.
        device: device, such as "cpu".
        threads: number of CPU threads.
    """

    engine: str
    folder: str
    device: str
    threads: int


@dataclass(frozen=True)
class Task(EngineTask):
    """Task to run an engine of ``ENGINES`` on random pixels; the folder also has the expected output.

    Attributes:
        size: image height and width.
        batch: images per call.
        seed: random seed of the pixels.
    """

    size: tuple[int, int]
    batch: int
    seed: int

    def pixels(self) -> Tensor:
        """Return random pixels (B, 3, H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, 3, *self.size, generator=generator).to(self.device)


class Worker:
    """Process that runs an engine on request; leaving its context ends it.

    Args:
        task: the task.

    Attributes:
        results: what the process has sent, by name: on ``ready``, differences from the plain model or the like; after
            ``finish`` also ``megabytes``, the peak memory.

    Raises:
        OSError: the process cannot be started or ends early; the message contains its last line of output.
    """

    def __init__(self, task: EngineTask) -> None:
        self.task = task
        self.results: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
        start = f"from {type(task).__module__} import main; main()"
        command = [sys.executable, "-c", start, json.dumps(asdict(task))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, **pipes)

    @property
    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self._process.poll() is not None

    def __enter__(self) -> "Worker":
        return self

    def ready(self) -> None:
        """Wait until the engine is loaded and warm."""
        self.results = json.loads(self._receive())

    def seconds(self) -> float:
        """Run the engine once and return the time in seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._error() from error
        return float(self._receive())

    def finish(self) -> None:
        """Stop the worker and record its last results, with the peak memory in MB, which is None except on Linux."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        last = json.loads(self._receive())
        if self.results.get("megabytes") is not None:  # on a GPU it is that of a call
            del last["megabytes"]
        self.results.update(last)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _receive(self) -> str:
        """Return the next message of the process."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_PREFIX):
                return line.removeprefix(_PREFIX)
        raise self._error()

    def _error(self) -> OSError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return OSError(f"{self.task.engine}: its process failed: {lines[-1] if lines else f'exit code {code}'}")


def main() -> None:
    """Run an engine once per line of standard input; the only argument is the task as JSON."""
    task = Task(**json.loads(sys.argv[1]))
    torch.set_num_threads(task.threads)
    folder, device = Path(task.folder), torch.device(task.device)
    engine, pixels = ENGINES[task.engine], task.pixels()
    model = DetectionTransformer.from_pretrained(folder / WEIGHTS, device=device)
    with torch.no_grad():
        if engine.write is not None:
            model.to("meta")  # it loads its files; otherwise the weights of both would count as memory
        run = engine.make(model, folder, pixels)
        outputs, megabytes = warm_up(lambda: run(pixels), device)
        expected = torch.load(folder / EXPECTED, map_location=device, weights_only=True)
        logits, boxes = ((a.float() - b).abs().max().item() for a, b in zip(outputs, expected, strict=True))
        del expected
        results = {"logits": logits, "boxes": boxes, "megabytes": megabytes}
        serve(results, lambda: seconds_of(lambda: run(pixels), device), device)


def serve(
    results: Mapping[str, Any],
    call: Callable[[], float],
    device: torch.device,
    last: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Answer the requests of the parent process's :class:`Worker` until it closes standard input.

    Args:
        results: results of the warm-up.
        call: runs the engine once and returns the time in seconds.
        device: device of the engine.
        last: returns the results of all calls, at the end.
    """
    _send(results)
    for _ in sys.stdin:
        _send(call())
    known = device.type == "cpu" and Path("/proc/self/status").exists()
    _send({"megabytes": process_peak_memory() if known else None, **last()})


def _send(message: Any) -> None:
    print(f"{_PREFIX}{json.dumps(message)}", flush=True)
