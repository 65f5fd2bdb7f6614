"""``conditional-detr benchmark``: how fast the engines run a model here, side by side."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from conditional_detr.benchmark.engines import ENGINES, REFERENCE
from conditional_detr.benchmark.measure import Reading, available, check, measure, peak_memory, product_rate
from conditional_detr.benchmark.report import HEAD, draw, markdown, rows
from conditional_detr.cli.console import AUTO, err, one_line_errors, out, pick_device, tell
from conditional_detr.files import write_whole
from conditional_detr.model import ConditionalDETR, Config
from conditional_detr.weights import checked_device, from_pretrained

_HEIGHTS, _BATCHES = (400, 600, 800, 1000, 1333), (1, 2, 4)
_GROWING = (REFERENCE, "plain", "optimised", "optimised bf16")


def benchmark(
    engines: Annotated[
        list[str] | None, typer.Option("--engine", help=f"Some of: {', '.join(ENGINES)}. Else all that can run.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A folder, a file, a hub id; else the published architecture, untrained.")
    ] = None,
    height: Annotated[int, typer.Option(min=32, help="Of the pictures, in pixels.")] = 800,
    width: Annotated[int, typer.Option(min=32, help="Of the pictures, in pixels.")] = 1066,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a call.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine is timed.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; else all of them.")] = None,
    growth: Annotated[bool, typer.Option("--growth", help="Also time other sizes and numbers of pictures.")] = False,
    output: Annotated[Path | None, typer.Option(help="A folder for benchmark.md, .json and .png.")] = None,
    device: Annotated[str, typer.Option(help="Where it runs: cpu, cuda, cuda:1.")] = AUTO,
    alone: Annotated[str | None, typer.Option(hidden=True, help="Run this engine and print the peak memory.")] = None,
) -> None:
    """Time this library and transformers on the same pixels and weights, in turn, round by round.

    How many times as fast an engine is, is the median of the rounds, against transformers' network in eager mode.
    Beside each speed stands how far its logits and boxes are from the plain model's. Peak memory is that of a process
    that only runs the one engine, loading and compiling included.
    """
    with one_line_errors():
        place = checked_device(pick_device(device))
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = (_untrained() if weights is None else from_pretrained(weights)).eval().to(place)
        if alone is not None:
            typer.echo(peak_memory(model, alone, size=(height, width), batch=batch_size))
            return
        names = list(dict.fromkeys(engines)) if engines else available(place.type)
        for name in names:
            check(name, place.type)
        if REFERENCE in names:  # what the others are compared with
            names = [REFERENCE, *(name for name in names if name != REFERENCE)]
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)

    with one_line_errors(), err.status("") as status:

        def run(names: list[str], size: tuple[int, int], batch: int) -> list[Reading]:
            what = f"{size[0]} x {size[1]}, {batch} at a time"
            update: Callable[[str], None] = lambda text: status.update(f"{what}: {text}")  # noqa: E731
            return measure(model, names, size=size, batch=batch, rounds=rounds, progress=update)

        readings = run(names, (height, width), batch_size)
        rates = {str(dtype)[6:]: product_rate(dtype, place) for dtype in (torch.float32, torch.bfloat16)}
        grown: list[Reading] = []
        if growth:
            growing = [name for name in names if name in _GROWING]
            for one in _HEIGHTS:
                grown += run(growing, (one, round(one * 4 / 3)), 1)
            for many in _BATCHES[1:]:
                grown += run(growing, (800, round(800 * 4 / 3)), many)
        peaks = {}
        if place.type == "cpu" and Path("/proc/self/status").exists():
            for name in names:
                status.update(f"{name}: peak memory")
                peaks[name] = _peak_of(name, weights, height, width, batch_size, threads)

    title = f"{height} x {width}, {batch_size} at a time, {_machine(place)}"
    table = rows(readings, peaks)
    shown = Table(*HEAD, title=title)
    for row in table:
        shown.add_row(*row)
    out.print(shown)
    told = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in rates.items())
    tell(f"Compared with: {names[0]}. A plain matrix product reaches, in GFLOP/s: {told}.", to=out)
    if output is not None:
        numbers = {
            "machine": title,
            "GFLOP/s": rates,
            "peak MB": peaks,
            "readings": [reading.to_dict() for reading in readings],
            "growth": [reading.to_dict() for reading in grown],
        }
        text = f"{title}\n\n{markdown(table)}"
        with one_line_errors():
            write_whole(
                {
                    output / "benchmark.json": lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"),
                    output / "benchmark.md": lambda path: path.write_text(text),
                    output / "benchmark.png": lambda path: draw(readings, grown, title, path),
                }
            )
        tell(f"wrote benchmark.json, benchmark.md and benchmark.png in {output}", to=out)


def _untrained() -> ConditionalDETR:
    """Return a network of the published architecture whose boxes, unlike before training, depend on pixels."""
    model = ConditionalDETR(Config())
    last: Any = model.box_head.layers[-1]
    torch.nn.init.xavier_uniform_(last.weight)
    return model


def _peak_of(name: str, weights: str | None, height: int, width: int, batch: int, threads: int | None) -> float:
    """Return the peak memory, in MB, of a process that runs one engine."""
    options = ["--alone", name, "--height", height, "--width", width, "--batch-size", batch, "--device", "cpu"]
    options += [] if weights is None else ["--weights", weights]
    options += [] if threads is None else ["--threads", threads]
    start = "from conditional_detr.cli import app; app()"
    command = [sys.executable, "-c", start, "benchmark", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{name}: its process for peak memory failed: {done.stderr.strip()}")
    return float(done.stdout.split()[-1])


def _machine(device: torch.device) -> str:
    """Name what it ran on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        named = [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        name = named[0].split(":", 1)[1].strip() if named else name
    return f"{torch.get_num_threads()} threads of {name}, torch {torch.__version__}"
