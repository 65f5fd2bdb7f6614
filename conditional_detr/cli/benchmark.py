"""``conditional-detr benchmark``: compare the speed, memory and accuracy of engines on this machine."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import AUTO, err, one_line_errors, out, pick_device, print_line
from conditional_detr.cli.options import DATA, IMAGES, OVERWRITE
from conditional_detr.system.atomic_files import write_atomically
from conditional_detr.system.outputs import check_output

if TYPE_CHECKING:
    import rich.table
    import torch

    from conditional_detr.benchmark.report import Report, Table
    from conditional_detr.modeling.detection_transformer import DetectionTransformer

_FILES = ("benchmark.json", "benchmark.md", "benchmark.png")
_SCALING_ENGINES = ("transformers", "plain", "optimised", "optimised bf16")


def benchmark(
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="Engine to time; repeatable. An unknown name lists all engines.",
            show_default="all that are installed",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A folder, a file, a short name, or a hub id.", show_default="the published architecture, untrained"
        ),
    ] = None,
    height: Annotated[int, typer.Option(min=32, help="Image height in pixels.")] = 800,
    width: Annotated[int, typer.Option(min=32, help="Image width in pixels.")] = 1066,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls per engine.")] = 7,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all")] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also time other image sizes, batch sizes and thread counts.")
    ] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Also time a training step and the loss, against transformers.")
    ] = False,
    training_size: Annotated[int, typer.Option(min=32, help="Height and width of training images, in pixels.")] = 512,
    training_batch_size: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 2,
    pipeline: Annotated[
        list[str] | None,
        typer.Option(
            "--pipeline",
            help="Also time image files to detections, beside transformers' pipeline and a plain loop: a folder, glob "
            "or file; repeatable.",
            show_default=False,
        ),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="Also time the first frames of this film to the annotated film.", show_default=False),
    ] = None,
    video_size: Annotated[
        list[int] | None,
        typer.Option(
            help="Shorter side in pixels of frames for the model; repeatable.",
            min=32,
            show_default="that of the weights",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help=f"With --video, measure AP at each size. {DATA}", show_default=False)
    ] = None,
    images: Annotated[Path | None, typer.Option(help=IMAGES, show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for benchmark.md, benchmark.json and benchmark.png.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = AUTO,
    peak_memory: Annotated[
        str | None,
        typer.Option(hidden=True, help="Run training steps of this library and print the peak memory in MB."),
    ] = None,
) -> None:
    """Time this library and transformers on the same pixels and weights.

    Each engine runs in its own process and alternates with the reference, transformers in eager mode. The speedup is
    the median over the rounds. The columns "logits diff" and "boxes diff" are the largest absolute differences from
    the plain model. Peak memory is that of the process, with loading and compiling but without exporting; on a GPU, it
    is that of one call without the weights.

    A training step is forward, loss and backward, with the same dropout and the same frozen backbone layers in both
    libraries. The loss, with matching and backward, is also timed on random outputs of COCO's size.

    With --pipeline, every engine opens the same files, and the column "of model" is its rate as a share of that of its
    model alone, on one image at a time of the most common size. "Fast" is the preprocessing of torchvision. "Objects"
    are the detections above 0.5 on all images. The stages are those of the optimised model.

    With --video, every engine decodes the film, detects, draws and encodes. The reference is the first engine of the
    table. "Of model" is the rate as a share of that of its model alone on the frames. int8 is calibrated on the film.
    """
    case: dict[str, Any] = {"size": (height, width), "batch": batch_size}
    step: dict[str, Any] = {"size": (training_size, training_size), "batch": training_batch_size}
    with one_line_errors():
        import torch

        from conditional_detr.benchmark.engines import REFERENCE
        from conditional_detr.benchmark.measure import check, measure
        from conditional_detr.benchmark.pipeline import common_size, measure_pipeline
        from conditional_detr.benchmark.realtime import available, check_data, check_video, measure_realtime
        from conditional_detr.benchmark.report import Report
        from conditional_detr.benchmark.scaling import measure_scaling
        from conditional_detr.benchmark.stages import measure_stages
        from conditional_detr.benchmark.timing import product_rate
        from conditional_detr.benchmark.training import measure_training, step_peak_memory
        from conditional_detr.checkpoints.loading import checked_device, from_pretrained

        if video is None and (video_size or data is not None or images is not None):
            raise ValueError("--video-size, --data and --images: expected --video with them")
        if images is not None and data is None:
            raise ValueError(f"--images: expected --data with it, got {images}")
        files = _listed(pipeline, output) if pipeline else []
        torch_device = checked_device(pick_device(device))
        if threads is not None:
            torch.set_num_threads(threads)
        torch.manual_seed(0)
        model = (_untrained() if weights is None else from_pretrained(weights)).eval().to(torch_device)
        if peak_memory is not None:
            typer.echo(step_peak_memory(model, peak_memory, **step))
            return
        names = _engine_names(engines, torch_device.type)
        scaling_names = [name for name in names if name in _SCALING_ENGINES]
        if scaling and not scaling_names:
            expected = ", ".join(_SCALING_ENGINES)
            raise ValueError(f"--scaling: expected one of {expected} among the engines, got {', '.join(names)}")
        if training:
            check(REFERENCE, torch_device.type)
        filmed = [name for name in available(torch_device) if name in names]
        if video is not None:
            check_video(model, video, video_size or [None])
            if data is not None:
                check_data(model, data, images)
            if not filmed:
                expected = ", ".join(available(torch_device))
                raise ValueError(f"--video: expected one of {expected} among the engines, got {', '.join(names)}")
        if files:
            common_size(files, model.metadata.preprocessing)  # an image that cannot be read ends it before it begins
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            inputs = [path for path in (weights, video, data, images, *files) if path is not None]
            for name in _FILES:
                check_output(output / name, inputs=inputs, overwrite=overwrite)
    with one_line_errors(), err.status("") as status:
        options: dict[str, Any] = {"rounds": rounds, "progress": status.update}
        timed: dict[str, Any] = {**options, "on_failure": _warn_skipped}
        measured: dict[str, Any] = {"data": data, "images": images, **timed}
        report = Report(
            f"{height} x {width}, batch size {batch_size}, {_machine_name(torch_device)}",
            {str(dtype)[6:]: product_rate(dtype, torch_device) for dtype in (torch.float32, torch.bfloat16)},
            measure(model, names, **case, **timed),
            measure_scaling(model, scaling_names, **timed) if scaling else (),
            measure_training(model, **step, **options) if training else (),
            measure_pipeline(model, files, **timed) if files else (),
            measure_stages(model, files, progress=status.update) if files else (),
            measure_realtime(model, video, video_size or [None], engines=filmed, **measured) if video else (),
        )
        if training and torch_device.type == "cpu" and Path("/proc/self/status").exists():
            arguments = ["--device", torch_device, *_option("--weights", weights), *_option("--threads", threads)]
            arguments += ["--training-size", training_size, "--training-batch-size", training_batch_size]
            report = _with_peak_memory(report, arguments, status.update)
    _print(report)
    if output is not None:
        with one_line_errors():
            _write(report, output)


def _listed(images: list[str], output: Path | None) -> list[str]:
    """Return the image files that arguments of --pipeline stand for.

    Raises:
        ValueError: no image, or one that is no file.
    """
    from conditional_detr.inference.listing import list_images

    files = [listed.image for listed in list_images(images, output=output or os.devnull).images]
    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"--pipeline: expected image files, got {file}")
    return files


def _untrained() -> "DetectionTransformer":
    """Return a randomly initialised model of the published architecture whose boxes depend on the pixels."""
    import torch

    from conditional_detr.modeling.conditional_detr import ConditionalDETR

    model = ConditionalDETR()
    last: Any = model.box_head.layers[-1]  # it is initialised to zero
    torch.nn.init.xavier_uniform_(last.weight)
    return model


def _engine_names(engines: list[str] | None, device: str) -> list[str]:
    """Return the names of the engines to time, validated, with the reference first."""
    from conditional_detr.benchmark.engines import REFERENCE
    from conditional_detr.benchmark.measure import available, check

    names = list(dict.fromkeys(engines)) if engines else available(device)
    for name in names:
        check(name, device)
    return sorted(names, key=lambda name: name != REFERENCE)


def _option(option: str, value: object) -> list[object]:
    """Return an option and its value as command line arguments; an empty list for None."""
    return [] if value is None else [option, value]


def _warn_skipped(reason: str) -> None:
    print_line(f"warning: skipped: {reason}", style="yellow")


def _with_peak_memory(report: "Report", arguments: Sequence[object], progress: Callable[[str], None]) -> "Report":
    """Measure the peak memory of each library's training step in its own process.

    Args:
        report: the report.
        arguments: command line arguments of these processes.
        progress: called with a description of the current step.

    Returns:
        The report with the peak memory.
    """
    from conditional_detr.benchmark.training import STEP

    training = []
    for measurement in report.training:
        if measurement.kind == STEP:
            progress(f"training step, {measurement.engine}: peak memory")
            measurement = replace(measurement, megabytes=_peak_memory(measurement.engine, arguments))
        training.append(measurement)
    return replace(report, training=training)


def _peak_memory(engine: str, arguments: Sequence[object]) -> float | None:
    """Return the peak memory of a training process in MB; if the process fails, warn and return None."""
    command = [sys.executable, "-m", "conditional_detr", "benchmark", "--peak-memory", engine, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        reason = str(error)
    else:
        if done.returncode == 0:
            return float(done.stdout.split()[-1])
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    print_line(f"warning: {engine}: peak memory was not measured, the process failed: {reason}", style="yellow")
    return None


def _print(report: "Report") -> None:
    """Print the tables, the reference engine and the speed of a matrix product."""
    for table in report.tables():
        out.print(_printable(table))
        out.print()
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in report.rates.items())
    first = report.measurements[0].engine
    print_line(f"Reference: {first}. Matrix product in GFLOP/s: {rates}.", to=out)


def _printable(table: "Table") -> "rich.table.Table":
    """Return a rich table that fits 80 columns: without a frame, headings of numbers on two lines."""
    import rich.box
    import rich.table
    from rich.text import Text

    frame: dict[str, Any] = {"show_edge": False, "pad_edge": False, "padding": (0, 1, 0, 0)}
    shown = rich.table.Table(title=table.title, box=rich.box.SIMPLE_HEAD, **frame)
    shown.add_column(table.head[0])
    for name in table.head[1:]:
        shown.add_column(Text(name.replace(" ", "\n", 1)), justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    return shown


def _write(report: "Report", folder: Path) -> None:
    """Write the report as Markdown, JSON and an image."""
    from conditional_detr.benchmark.figure import draw

    text = json.dumps(report.to_dict(), indent=2) + "\n"
    writers: list[Callable[[Path], object]] = [
        lambda path: path.write_text(text),
        lambda path: path.write_text(report.markdown()),
        lambda path: draw(report, path),
    ]
    write_atomically({folder / name: write for name, write in zip(_FILES, writers, strict=True)})
    print_line(f"wrote {', '.join(_FILES[:2])} and {_FILES[2]} in {folder}", to=out)


def _machine_name(device: "torch.device") -> str:
    """Return the names of the processor or GPU and of the torch version."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        models = [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{torch.get_num_threads()} threads of {name}, torch {torch.__version__}"
