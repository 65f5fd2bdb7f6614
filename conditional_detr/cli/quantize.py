"""``conditional-detr quantize``: a model in 8-bit integers, and what that costs in AP."""

import contextlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.status import Status

from conditional_detr.checkpoints.loading import from_pretrained
from conditional_detr.cli.console import FAILED, err, one_line_errors, out, tell
from conditional_detr.cli.export import OVERWRITE, check_free, report
from conditional_detr.deploy.optimize import optimize
from conditional_detr.deploy.quantize import PARTS, check_request
from conditional_detr.deploy.quantize import quantize as write
from conditional_detr.evaluation.coco import evaluate
from conditional_detr.inference.detector import Detector
from conditional_detr.inference.exported import Description, ExportedModel
from conditional_detr.inference.listing import list_images
from conditional_detr.modeling.conditional_detr import ConditionalDETR

_LADDER = ((), ("encoder",), ("encoder", "decoder"))  # what is kept in float, until little enough is lost


class _LossError(Exception):
    """A quantised model loses more AP than it may."""


def quantize(
    source: Annotated[str, typer.Argument(help="Weights: a folder, a file, a short name, or a hub id 'owner/name'.")],
    target: Annotated[Path, typer.Argument(help="The file to write, .xml; its weights go beside it, .bin.")],
    calibration: Annotated[
        list[str], typer.Option(help="Files, folders or globs of images like those that it is for.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Look at this many of them, drawn at random.")] = 100,
    data: Annotated[Path | None, typer.Option(help="COCO's json of a data set to measure AP on.")] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of its images.")] = None,
    max_loss: Annotated[
        float, typer.Option(min=0, help="With --data: the most AP to lose; 0.005 is half a point.")
    ] = 0.005,
    keep: Annotated[
        list[str] | None,
        typer.Option(help=f"Keep this in float32 ({', '.join(PARTS)}), again for more, and try nothing else."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="With post-processing in the file, of at most this many detections.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which images are drawn.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Write a model as an OpenVINO file that computes in 8-bit integers, which CPUs do fast.

    The ranges of numbers are measured on the calibration images; nothing is trained. With --data and --images, AP is
    measured before and after and written into the file. If more is lost than --max-loss, parts are kept in float32
    one after the other (encoder, decoder) until it is little enough; if it never is, nothing is written.

    Exit code: 0 written, 1 too much was lost, 2 it could not begin.
    """
    with one_line_errors(), err.status("loading") as status:
        check_free(check_request(target, keep or ()), overwrite=overwrite)  # at once, not after AP was measured
        if (data is None) != (images is None):
            raise ValueError("expected both --data and --images, to measure AP on, or neither")
        chosen = [found.image for found in list_images(calibration, output=target).images]
        chosen = random.Random(seed).sample(chosen, min(samples, len(chosen)))
        model = from_pretrained(source, revision=revision)
        meter = None if data is None or images is None else _Meter(model, data, images, max_loss, status)
        ladder = _LADDER if keep is None and meter else (tuple(keep or ()),)
        described = None
        for kept in ladder:
            with contextlib.suppress(_LossError):
                options: dict[str, Any] = {"measure": meter} if meter else {}
                described = write(model, target, chosen, keep=kept, top_k=top_k, progress=status.update, **options)
                break
    _report(target, described, meter)


class _Meter:
    """Measures the AP of a model, and then that of the files that are made of it.

    Args:
        model: the model.
        data: COCO's json.
        images: the folder of its images.
        max_loss: the most AP that a file may lose.
        status: where progress is shown.
    """

    def __init__(self, model: ConditionalDETR, data: Path, images: Path, max_loss: float, status: Status) -> None:
        self.data, self.images, self.max_loss, self.status = data, images, max_loss, status
        self.before = self._ap(Detector(optimize(model)), "float32")
        if self.before < 0:
            raise ValueError(f"{data}: expected objects to measure AP on, got none")
        self.tried: list[float] = []

    def __call__(self, exported: ExportedModel) -> Mapping[str, Any]:
        """Return the AP before and after; raise if too much of it is lost."""
        after = self._ap(Detector(exported), "int8")
        self.tried.append(after)
        if not self.before - after <= self.max_loss:
            tell(f"AP {self.before:.4f} before, {after:.4f} after: more than {self.max_loss} is lost", style="yellow")
            raise _LossError
        return {"AP": {"float32": self.before, "int8": after, "data": self.data.name}}

    def _ap(self, detector: Detector, what: str) -> float:
        def show(done: int, total: int) -> None:
            self.status.update(f"AP of {what}: {done} of {total} images")

        return evaluate(detector, self.data, self.images, progress=show).metrics["AP"]


def _report(target: Path, described: Description | None, meter: _Meter | None) -> None:
    """Say what was written and what it costs; end with an exit code if nothing was."""
    if described is None:
        assert meter is not None  # only AP refuses
        best = max(meter.tried)
        tell(
            f"error: {target}: not written: AP was {meter.before:.4f} before and at best {best:.4f} after,"
            f" more than {meter.max_loss} lost; more images like the data set's, --keep backbone,"
            " or a larger --max-loss",
            style="red",
        )
        raise typer.Exit(FAILED)
    report(target, described)
    kept = ", ".join(described.measured["calibration"]["also in float"]) or "none"
    tell(f"parts kept in float32: {kept}", to=out)
    if meter is None:
        tell("AP was not measured: --data and --images do", to=out)
    else:
        tell(f"AP {meter.before:.4f} before, {meter.tried[-1]:.4f} after, on {meter.data.name}", to=out)
