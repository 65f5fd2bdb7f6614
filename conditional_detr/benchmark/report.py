"""Report of a benchmark: tables for people, and all numbers for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conditional_detr.benchmark.measure import Measurement
from conditional_detr.benchmark.pipeline import PipelineMeasurement
from conditional_detr.benchmark.realtime import VideoMeasurement
from conditional_detr.benchmark.stages import Stages
from conditional_detr.benchmark.timing import Timing
from conditional_detr.benchmark.training import TrainingMeasurement

_TIMES = ("ms", "speedup", "speedup range", "peak MB")
HEAD = ("engine", *_TIMES, "logits diff", "boxes diff")
TRAINING_HEAD = ("training", *_TIMES, "loss")
VIDEO_HEAD = ("engine", "shorter side", "frames/s", "of model", "speedup", "speedup range", "peak MB", "AP")
PIPELINE_HEAD = ("engine", "images/s", "speedup", "speedup range", "of model", "peak MB", "objects")


@dataclass(frozen=True)
class Table:
    """Table of text cells.

    Attributes:
        title: title above the table.
        head: column headings; all columns but the first hold numbers.
        rows: one cell per column.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Return the table in Markdown, without the title."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass(frozen=True)
class Report:
    """Measurements on one machine.

    Attributes:
        title: image size, batch size and machine.
        rates: speed of a matrix product in GFLOP/s, by dtype.
        measurements: all engines at one image size and batch size.
        scaling: some engines at several image sizes, batch sizes and thread counts.
        training: the training step and the criterion.
        pipeline: the engines from image files to detections.
        stages: the stages of an image, by backend of the preprocessing.
        videos: the engines from a film to the annotated film, by size of the model's input.
    """

    title: str
    rates: Mapping[str, float]
    measurements: Sequence[Measurement]
    scaling: Sequence[Measurement] = ()
    training: Sequence[TrainingMeasurement] = ()
    pipeline: Sequence[PipelineMeasurement] = ()
    stages: Sequence[Stages] = ()
    videos: Sequence[VideoMeasurement] = ()

    def tables(self) -> list[Table]:
        """Return the table of the engines, and those of training, the pipeline and its stages if measured."""
        tables = [table(self.measurements, self.title)]
        tables += [training_table(self.training)] if self.training else []
        tables += [pipeline_table(self.pipeline)] if self.pipeline else []
        tables += [stages_table(self.stages)] if self.stages else []
        return tables + ([video_table(self.videos)] if self.videos else [])

    def markdown(self) -> str:
        """Return the tables in Markdown, each below its title."""
        return "\n".join(f"{one.title}\n\n{one.markdown()}" for one in self.tables())

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as a JSON-compatible dict."""
        parts: dict[str, Sequence[Timing | Stages]] = {
            "measurements": self.measurements,
            "scaling": self.scaling,
            "training": self.training,
            "pipeline": self.pipeline,
            "stages": self.stages,
            "videos": self.videos,
        }
        numbers = {name: [one.to_dict() for one in part] for name, part in parts.items()}
        return {"machine": self.title, "GFLOP/s": dict(self.rates), **numbers}


def table(measurements: Sequence[Measurement], title: str = "") -> Table:
    """Return the table of engines at one image size and batch size."""
    return Table(
        title, HEAD, [(one.engine, *_times(one), f"{one.logits:.0e}", f"{one.boxes:.0e}") for one in measurements]
    )


def training_table(measurements: Sequence[TrainingMeasurement]) -> Table:
    """Return the table of both libraries' training steps and criteria."""
    title = f"Training: {'; '.join(dict.fromkeys(f'{one.kind} on {one.inputs}' for one in measurements))}"
    rows = [(f"{one.kind}, {one.engine}", *_times(one), f"{one.loss:.1f}") for one in measurements]
    return Table(title, TRAINING_HEAD, rows)


def pipeline_table(measurements: Sequence[PipelineMeasurement]) -> Table:
    """Return the table of the engines from image files to detections."""
    first, rows = measurements[0], []
    for one in measurements:
        _, *times, peak = _times(one)
        rows.append((one.engine, f"{one.rate:.2f}", *times, f"{one.share:.0%}", peak, f"{one.objects}"))
    height, width = first.size
    return Table(f"From files to detections: {first.images} images, most {height} x {width}", PIPELINE_HEAD, rows)


def video_table(measurements: Sequence[VideoMeasurement]) -> Table:
    """Return the table of the engines from a film to the annotated film."""
    rows = []
    for one in measurements:
        _, *times, peak = _times(one)
        ap = "" if one.ap is None else f"{one.ap:.3f}"
        rows.append((one.engine, f"{min(one.size)}", f"{one.rate:.1f}", f"{one.share:.0%}", *times, peak, ap))
    first = measurements[0]
    title = f"From a film to the annotated film: {first.images} frames, speedup over {first.engine}"
    return Table(title, VIDEO_HEAD, rows)


def stages_table(stages: Sequence[Stages]) -> Table:
    """Return the table of the milliseconds of each stage."""
    rows = [
        (one.backend, *(f"{seconds * 1e3:.1f}" for seconds in (*one.seconds.values(), sum(one.seconds.values()))))
        for one in stages
    ]
    return Table("Milliseconds per image and stage, one thread", ("backend", *stages[0].seconds, "total"), rows)


def _times(timing: Timing) -> tuple[str, ...]:
    """Return the cells that all tables have."""
    least, most = min(timing.ratios), max(timing.ratios)
    peak = "" if timing.megabytes is None else f"{timing.megabytes:.0f}"
    ms = timing.median * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}", f"{timing.ratio:.2f}", f"{least:.2f} to {most:.2f}", peak
