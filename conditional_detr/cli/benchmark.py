"""``conditional-detr benchmark``: how fast the engines run a model here, side by side."""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import rich.box
import rich.table
import torch
import typer

from conditional_detr.benchmark.engines import ENGINES, REFERENCE
from conditional_detr.benchmark.figure import draw
from conditional_detr.benchmark.growth import measure_growth
from conditional_detr.benchmark.measure import available, check, measure
from conditional_detr.benchmark.report import Report, Table
from conditional_detr.benchmark.timing import product_rate
from conditional_detr.benchmark.training import STEP, measure_training, peak_of_step
from conditional_detr.checkpoints.loading import checked_device, from_pretrained
from conditional_detr.cli.console import AUTO, err, one_line_errors, out, pick_device, tell
from conditional_detr.modeling.conditional_detr import ConditionalDETR, Config
from conditional_detr.system.atomic_files import write_atomically

_GROWING = (REFERENCE, "plain", "optimised", "optimised bf16")


def benchmark(
    engines: Annotated[
        list[str] | None, typer.Option("--engine", help=f"Some of: {', '.join(ENGINES)}. Else all that can run.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A folder, a file, a hub id; else the published architecture, untrained.")
    ] = None,
    height: Annotated[int, typer.Option(min=32, help="Of the images, in pixels.")] = 800,
    width: Annotated[int, typer.Option(min=32, help="Of the images, in pixels.")] = 1066,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine is timed.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU; else all of them.")] = None,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also time other sizes, numbers of images and of threads.")
    ] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Also time a training step and the loss alone, against transformers'.")
    ] = False,
    training_size: Annotated[int, typer.Option(min=32, help="Pixels of both sides of a step's images.")] = 512,
    training_batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 2,
    output: Annotated[Path | None, typer.Option(help="A folder for benchmark.md, .json and .png.")] = None,
    device: Annotated[str, typer.Option(help="Where it runs: cpu, cuda, cuda:1.")] = AUTO,
    alone: Annotated[str | None, typer.Option(hidden=True, help="Train with this and print the peak memory.")] = None,
) -> None:
    """Time this library and transformers on the same pixels and weights.

    Each engine runs in a process of its own, in turn with transformers' network in eager mode; how many times as fast
    it is, is the median of the rounds. Beside each speed stands how far its logits and boxes are from the plain
    model's. Peak memory is that of its process, loading and compiling included, exporting not; on a GPU, of a call,
    beyond the weights.

    A training step is forward, loss and backward of both libraries' networks, with the same dropout and the same
    frozen part of the backbone. The loss alone, with its matching and its backward, reads ready outputs of COCO's size.
    """
    images: dict[str, Any] = {"size": (height, width), "batch": batch_size}
    step: dict[str, Any] = {"size": (training_size, training_size), "batch": training_batch_size}
    with one_line_errors():
        place = checked_device(pick_device(device))
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = (_untrained() if weights is None else from_pretrained(weights)).eval().to(place)
        if alone is not None:
            typer.echo(peak_of_step(model, alone, **step))
            return
        names = _names(engines, place.type)
        growing = [name for name in names if name in _GROWING]
        if growth and not growing:
            raise ValueError(f"--growth: expected one of {', '.join(_GROWING)} among the engines, got {names}")
        if training:
            check(REFERENCE, place.type)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
    with one_line_errors(), err.status("") as status:
        how: dict[str, Any] = {"rounds": rounds, "progress": status.update}
        report = Report(
            f"{height} x {width}, {batch_size} at a time, {_machine(place)}",
            {str(dtype)[6:]: product_rate(dtype, place) for dtype in (torch.float32, torch.bfloat16)},
            measure(model, names, **images, **how, missing=_tell_missing),
            measure_growth(model, growing, **how, missing=_tell_missing) if growth else (),
            measure_training(model, **step, **how) if training else (),
        )
        if training and place.type == "cpu" and Path("/proc/self/status").exists():
            options = ["--device", place, *_given("--weights", weights), *_given("--threads", threads)]
            options += ["--training-size", training_size, "--training-batch-size", training_batch_size]
            report = _with_peaks(report, options, status.update)
    _show(report)
    if output is not None:
        with one_line_errors():
            _write(report, output)


def _untrained() -> ConditionalDETR:
    """Return a network of the published architecture whose boxes, unlike before training, depend on pixels."""
    model = ConditionalDETR(Config())
    last: Any = model.box_head.layers[-1]
    torch.nn.init.xavier_uniform_(last.weight)
    return model


def _names(engines: list[str] | None, device: str) -> list[str]:
    """Return the engines to time, checked, the one that the others are compared with first."""
    names = list(dict.fromkeys(engines)) if engines else available(device)
    for name in names:
        check(name, device)
    return sorted(names, key=lambda name: name != REFERENCE)


def _given(option: str, value: object) -> list[object]:
    """Return an option as it is written, if it has a value."""
    return [] if value is None else [option, value]


def _tell_missing(why: str) -> None:
    tell(f"warning: left out: {why}", style="yellow")


def _with_peaks(report: Report, options: Sequence[object], progress: Callable[[str], None]) -> Report:
    """Add the peak memory of a process for each side of a training step, which runs with these options."""
    training = []
    for trained in report.training:
        if trained.work == STEP:
            progress(f"training step, {trained.engine}: peak memory")
            trained = replace(trained, megabytes=_peak(trained.engine, options))
        training.append(trained)
    return replace(report, training=training)


def _peak(engine: str, options: Sequence[object]) -> float | None:
    """Return the peak memory, in MB, of a process for one side; if it fails, say why, and go on without."""
    start = "from conditional_detr.cli import app; app()"
    command = [sys.executable, "-c", start, "benchmark", "--alone", engine, *map(str, options)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        why = str(error)
    else:
        if done.returncode == 0:
            return float(done.stdout.split()[-1])
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    tell(f"warning: {engine}: its peak memory is missing, the process for it failed: {why}", style="yellow")
    return None


def _show(report: Report) -> None:
    """Print the tables, and what speeds can be held against."""
    for one in report.tables():
        out.print(_printable(one))
        out.print()
    told = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in report.rates.items())
    first = report.readings[0].engine
    tell(f"Compared with: {first}. A plain matrix product reaches, in GFLOP/s: {told}.", to=out)


def _printable(one: Table) -> rich.table.Table:
    """Lay a table out so that 80 columns hold it: without a frame, the heads of its numbers in two lines."""
    frame: dict[str, Any] = {"show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    shown = rich.table.Table(title=one.title, box=rich.box.SIMPLE_HEAD, **frame)
    shown.add_column(one.head[0])
    for name in one.head[1:]:
        shown.add_column(name.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in one.rows:
        shown.add_row(*row)
    return shown


def _write(report: Report, folder: Path) -> None:
    """Write the report in words, in numbers and as an image."""
    text = json.dumps(report.to_dict(), indent=2) + "\n"
    write_atomically(
        {
            folder / "benchmark.json": lambda path: path.write_text(text),
            folder / "benchmark.md": lambda path: path.write_text(report.markdown()),
            folder / "benchmark.png": lambda path: draw(report, path),
        }
    )
    tell(f"wrote benchmark.json, benchmark.md and benchmark.png in {folder}", to=out)


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
