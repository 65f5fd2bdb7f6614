"""The report: tables in words, and everything in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conditional_detr.benchmark.measure import Measurement
from conditional_detr.benchmark.timing import Timing
from conditional_detr.benchmark.training import TrainingMeasurement

_TIMES = ("ms", "times as fast", "least to most", "peak MB")
HEAD = ("engine", *_TIMES, "logits", "boxes")
TRAINING_HEAD = ("training", *_TIMES, "loss")


@dataclass(frozen=True)
class Table:
    """A table in words.

    Attributes:
        title: what stands above it.
        head: of the columns; all but the first hold numbers.
        rows: a cell a column.
    """

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """Return it in Markdown, without the title."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


@dataclass(frozen=True)
class Report:
    """What was measured, on one machine.

    Attributes:
        title: size and number of the images, and the machine.
        rates: of a plain matrix product, in GFLOP/s, by dtype.
        measurements: of every engine, of one size and batch.
        scaling: of some engines, of several sizes, batches and numbers of threads.
        training: of the step and of the criterion.
    """

    title: str
    rates: Mapping[str, float]
    measurements: Sequence[Measurement]
    scaling: Sequence[Measurement] = ()
    training: Sequence[TrainingMeasurement] = ()

    def tables(self) -> list[Table]:
        """Return the table of the engines, and that of training if it was measured."""
        tables = [table(self.measurements, self.title)]
        return [*tables, training_table(self.training)] if self.training else tables

    def markdown(self) -> str:
        """Return the tables in Markdown, each under its title."""
        return "\n".join(f"{one.title}\n\n{one.markdown()}" for one in self.tables())

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for json."""
        parts = {"measurements": self.measurements, "scaling": self.scaling, "training": self.training}
        told = {name: [one.to_dict() for one in part] for name, part in parts.items()}
        return {"machine": self.title, "GFLOP/s": dict(self.rates), **told}


def table(measurements: Sequence[Measurement], title: str = "") -> Table:
    """Return a table of engines, all of one size and batch."""
    return Table(
        title, HEAD, [(one.engine, *_times(one), f"{one.logits:.0e}", f"{one.boxes:.0e}") for one in measurements]
    )


def training_table(measurements: Sequence[TrainingMeasurement]) -> Table:
    """Return a table of the sides of each work."""
    title = f"Training: {'; '.join(dict.fromkeys(f'{one.work} of {one.of}' for one in measurements))}"
    rows = [(f"{one.work}, {one.engine}", *_times(one), f"{one.loss:.1f}") for one in measurements]
    return Table(title, TRAINING_HEAD, rows)


def _times(timing: Timing) -> tuple[str, ...]:
    """Return the cells that every table has."""
    least, most = min(timing.ratios), max(timing.ratios)
    peak = "" if timing.megabytes is None else f"{timing.megabytes:.0f}"
    ms = timing.median * 1e3
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}", f"{timing.ratio:.2f}", f"{least:.2f} to {most:.2f}", peak
