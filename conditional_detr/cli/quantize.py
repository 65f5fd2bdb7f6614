"""``conditional-detr quantize``: quantise a model to int8 and measure the loss of AP."""

import contextlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import FAILED, err, one_line_errors, out, print_line
from conditional_detr.cli.export import report
from conditional_detr.cli.options import OVERWRITE, REVISION, SOURCE, STORED_THRESHOLDS, TOP_K
from conditional_detr.inference.listing import list_images

if TYPE_CHECKING:
    from rich.status import Status

    from conditional_detr.inference.detector import Detector
    from conditional_detr.inference.exported import Description, ExportedModel
    from conditional_detr.modeling.detection_transformer import DetectionTransformer

_FALLBACKS = ((), ("encoder",), ("encoder", "decoder"))  # parts kept in float32, tried until AP is high enough


class _AccuracyError(Exception):
    """The quantised model loses more AP than allowed."""


def quantize(
    source: Annotated[str, typer.Argument(help=SOURCE)],
    target: Annotated[Path, typer.Argument(help="File to write, .xml; its weights are written to a .bin beside it.")],
    calibration: Annotated[
        list[str], typer.Option(help="Calibration images, representative of later input: files, folders or globs.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Number of random calibration images to use.")] = 100,
    data: Annotated[Path | None, typer.Option(help="COCO annotation file to measure AP on.")] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of --data.")] = None,
    max_loss: Annotated[
        float, typer.Option(min=0, help="With --data: largest allowed loss of AP; 0.005 is half a point.")
    ] = 0.005,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Part to keep in float32: backbone, encoder or decoder; repeatable. No other is tried."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help=TOP_K)] = None,
    thresholds: Annotated[Path | None, typer.Option(help=STORED_THRESHOLDS)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the calibration images.")] = 0,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Quantise a model to int8 for OpenVINO, for fast inference on CPUs.

    The activation ranges are measured on the calibration images; nothing is trained. With --data and --images, AP is
    measured before and after and stored in the exported model. If the loss exceeds --max-loss, the encoder and then
    also the decoder stay in float32. If the loss is still too large, nothing is written.

    Exit codes: 0 success; 1 AP loss too large; 2 usage or setup error.
    """
    with one_line_errors(), err.status("loading") as status:
        from conditional_detr.checkpoints.loading import from_pretrained
        from conditional_detr.deploy.export_files import check_free
        from conditional_detr.deploy.quantize import Quantizer, check_request
        from conditional_detr.inference.thresholds import read_thresholds

        inputs = [path for path in (source, data, images, thresholds) if path is not None]
        check_free(check_request(target, keep or ()), *inputs, overwrite=overwrite)  # before AP is measured
        if (data is None) != (images is None):
            raise ValueError("expected both --data and --images, to measure AP, or neither")
        chosen = [listed.image for listed in list_images(calibration, output=target).images]
        chosen = random.Random(seed).sample(chosen, min(samples, len(chosen)))
        of_classes = None if thresholds is None else read_thresholds(thresholds)
        model = from_pretrained(source, revision=revision)
        check = None if data is None or images is None else _AccuracyCheck(model, data, images, max_loss, status)
        attempts = _FALLBACKS if keep is None and check else (tuple(keep or ()),)
        options: dict[str, Any] = {"measure": check} if check else {}
        stored: dict[str, Any] = {"top_k": top_k, "thresholds": of_classes}
        quantizer = Quantizer(model, target, chosen, **stored, overwrite=overwrite, progress=status.update)
        description = None
        for kept in attempts:
            with contextlib.suppress(_AccuracyError):
                description = quantizer.write(keep=kept, **options)
                break
    _report(target, description, check)


class _AccuracyCheck:
    """Measure the AP of a model, then that of each quantised model.

    Args:
        model: the model.
        data: COCO annotation file.
        images: the image folder.
        max_loss: the largest allowed loss of AP.
        status: the status line that shows progress.
    """

    def __init__(
        self, model: "DetectionTransformer", data: Path, images: Path, max_loss: float, status: "Status"
    ) -> None:
        from conditional_detr.deploy.optimize import optimize
        from conditional_detr.inference.detector import Detector

        self.data, self.images, self.max_loss, self.status = data, images, max_loss, status
        self.before = self._ap(Detector(optimize(model)), "float32")
        if self.before < 0:
            raise ValueError(f"{data}: expected annotations to measure AP on, got none")
        self.tried: list[float] = []

    def __call__(self, exported: "ExportedModel") -> Mapping[str, Any]:
        """Return the AP before and after; raise _AccuracyError if the loss is too large."""
        from conditional_detr.inference.detector import Detector

        after = self._ap(Detector(exported), "int8")
        self.tried.append(after)
        if not self.before - after <= self.max_loss:
            print_line(
                f"AP {self.before:.4f} before, {after:.4f} after: lost more than {self.max_loss}", style="yellow"
            )
            raise _AccuracyError
        return {"AP": {"float32": self.before, "int8": after, "data": self.data.name}}

    def _ap(self, detector: "Detector", precision: str) -> float:
        from conditional_detr.evaluation.coco import evaluate

        def show(done: int, total: int) -> None:
            self.status.update(f"AP in {precision}: {done} of {total} images")

        return evaluate(detector, self.data, self.images, progress=show).metrics["AP"]


def _report(target: Path, description: "Description | None", check: _AccuracyCheck | None) -> None:
    """Print the exported model and its AP; exit with FAILED if nothing was written."""
    if description is None:
        assert check is not None  # only its error is suppressed
        best = max(check.tried)
        print_line(
            f"error: {target}: not written: AP was {check.before:.4f} before and at best {best:.4f} after,"
            f" lost more than {check.max_loss}; try more calibration images, --keep backbone,"
            " or a larger --max-loss",
            style="red",
        )
        raise typer.Exit(FAILED)
    report(target, description)
    kept = ", ".join(description.measured["calibration"]["also in float"]) or "none"
    print_line(f"parts kept in float32: {kept}", to=out)
    if check is None:
        print_line("AP was not measured; use --data and --images to measure it", to=out)
    else:
        print_line(f"AP {check.before:.4f} before, {check.tried[-1]:.4f} after, on {check.data.name}", to=out)
