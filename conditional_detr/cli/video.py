"""``conditional-detr video``: detect and track objects on a video, a camera or a stream."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from conditional_detr.cli.console import AUTO, one_line_errors, print_line
from conditional_detr.cli.options import (
    BATCH_SIZE,
    BATCH_SIZE_DEFAULT,
    DEVICE,
    FAST_PREPROCESSING,
    THRESHOLDS,
    WEIGHTS,
    EngineChoice,
    check_one_threshold,
    open_detector,
)
from conditional_detr.modeling.metadata import PUBLISHED

if TYPE_CHECKING:
    from conditional_detr.inference.detector import Detector
    from conditional_detr.video.frames import Selection

_MODEL, _WHAT, _TRACKS, _WHERE, _LIMITS = "Model", "What to report", "Tracks", "Output", "Speed and limits"


def video(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A video file, a folder of frames, a URL (rtsp, http), or a camera: 0 or /dev/video0.",
        ),
    ],
    weights: Annotated[str | None, typer.Option(help=WEIGHTS, show_default=PUBLISHED, rich_help_panel=_MODEL)] = None,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel=_MODEL)] = AUTO,
    engine: Annotated[
        EngineChoice,
        typer.Option(
            metavar="ENGINE",
            help="torch; openvino or onnx, which export the model first; or auto: the fastest on the first frames.",
            rich_help_panel=_MODEL,
        ),
    ] = EngineChoice.TORCH,
    size: Annotated[
        int | None,
        typer.Option(
            help="Shorter side in pixels to which frames are resized for the model.",
            min=1,
            show_default="that of the weights",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Report detections with a higher score, 0 to 1.", show_default="0.5", rich_help_panel=_WHAT),
    ] = None,
    thresholds: Annotated[Path | None, typer.Option(help=THRESHOLDS, rich_help_panel=_WHAT)] = None,
    top_k: Annotated[int, typer.Option(help="Report at most this many per frame.", rich_help_panel=_WHAT)] = 100,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Report this class only; repeatable.", show_default="all", rich_help_panel=_WHAT),
    ] = None,
    every: Annotated[int, typer.Option(help="Use every Nth frame.", min=1, rich_help_panel=_WHAT)] = 1,
    fps: Annotated[
        float | None,
        typer.Option(help="Use at most so many frames per second.", show_default="all", rich_help_panel=_WHAT),
    ] = None,
    start: Annotated[float, typer.Option(help="Begin at this second.", rich_help_panel=_WHAT)] = 0.0,
    end: Annotated[
        float | None,
        typer.Option(help="Stop before this second.", show_default="that of the video", rich_help_panel=_WHAT),
    ] = None,
    track: Annotated[
        bool,
        typer.Option("--track", help="Give objects ids over frames, and draw their trails.", rich_help_panel=_TRACKS),
    ] = False,
    line: Annotated[
        list[str] | None,
        typer.Option(
            help="Count tracks that cross this line: x0,y0,x1,y1 in pixels; repeatable.", rich_help_panel=_TRACKS
        ),
    ] = None,
    zone: Annotated[
        list[str] | None,
        typer.Option(help="Count objects in this polygon: x,y,x,y,x,y...; repeatable.", rich_help_panel=_TRACKS),
    ] = None,
    mot: Annotated[
        bool, typer.Option("--mot", help="Also write tracks.txt, as in the MOT challenge.", rich_help_panel=_TRACKS)
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for detections.jsonl and annotated.mp4.", rich_help_panel=_WHERE)
    ] = Path("detections"),
    write_video: Annotated[
        bool, typer.Option("--video/--no-video", help="Write the annotated video.", rich_help_panel=_WHERE)
    ] = True,
    encoder: Annotated[
        str,
        typer.Option(help="FFmpeg's encoder of the video, such as mpeg4 or h264_nvenc.", rich_help_panel=_WHERE),
    ] = "libx264",
    font: Annotated[
        Path | None,
        typer.Option(help="TrueType file, for class names that PIL's own font cannot draw.", rich_help_panel=_WHERE),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show the frames in a window; q closes it.", rich_help_panel=_WHERE)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the lines of an earlier run end.", rich_help_panel=_WHERE)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing results.", rich_help_panel=_WHERE)
    ] = False,
    live: Annotated[
        bool,
        typer.Option("--live", help="Drop frames that arrive while the model is busy.", rich_help_panel=_LIMITS),
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(help=BATCH_SIZE, min=1, show_default=BATCH_SIZE_DEFAULT, rich_help_panel=_LIMITS),
    ] = None,
    fast_preprocessing: Annotated[
        bool, typer.Option("--fast-preprocessing", help=FAST_PREPROCESSING, rich_help_panel=_LIMITS)
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print where the time of a frame goes.", rich_help_panel=_LIMITS)
    ] = False,
) -> None:
    """Detect objects on a video: write an annotated copy, and a line of JSON per frame.

    Ctrl-C stops after the current frame; the files are complete up to there, and --resume continues.

    Exit codes: 0 success; 1 stopped by an error, what was done is kept; 2 usage or setup error; 130 interrupted.
    """
    with one_line_errors(), ExitStack() as stack:
        check_one_threshold(threshold, thresholds)
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        if (line or zone or mot) and not track:
            raise ValueError("--line, --zone and --mot: expected --track with them")
        lines = [_points("--line", text, 2, 2) for text in line or []]
        zones = [_points("--zone", text, 3, None) for text in zone or []]
        from conditional_detr.cli.video_run import VideoRun
        from conditional_detr.inference.drawing import load_font
        from conditional_detr.video.frames import Selection
        from conditional_detr.video.reading import Video
        from conditional_detr.video.tracking import Tracker
        from conditional_detr.video.writing import check_encoder

        load_font(font)  # now, not at the first frame
        selection = Selection(every, fps, start, end)
        opened = stack.enter_context(Video(source))
        if (resume or engine is EngineChoice.AUTO) and opened.is_live:
            raise ValueError(f"--resume and --engine auto: expected a file or folder, got {opened.name}")
        if resume and live:
            raise ValueError("expected --resume or --live, got both")
        if write_video:
            check_encoder(encoder)
        tracker = Tracker(float(opened.rate), lines=[(*a, *b) for a, b in lines], zones=zones) if track else None
        opening: dict[str, Any] = {"fast_preprocessing": fast_preprocessing, "thresholds": thresholds}
        detector = open_detector(weights or PUBLISHED, device, **opening)
        if size is not None:
            _resize_to(detector, size)
        postprocessing = detector.postprocessing(threshold=threshold, top_k=top_k, classes=classes)
        settings = {**detector.settings(postprocessing), **asdict(selection), "size": size}
        settings |= {"track": track, "line": line or [], "zone": zone or []}
        kept = encoder if write_video else None
        run = VideoRun(opened, selection, output, font, kept, tracker, resume=resume, overwrite=overwrite, mot=mot)
        run.check_files()  # before an export, which takes long
        run_by = _by_engine(detector, engine, source, selection, stack)
        try:
            if show:
                run.open_window()
            run.prepare(settings, detector.model.metadata)
            code = run.run(run_by, postprocessing, batch_size, live=live)
            run.report(profile=profile)
        finally:
            run.close()
    if code:
        raise typer.Exit(code)


def _points(option: str, text: str, least: int, most: int | None) -> list[tuple[float, float]]:
    """Parse points x,y,x,y,... in pixels."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    count = len(numbers) // 2
    finite = all(abs(number) < float("inf") for number in numbers)
    if len(numbers) % 2 or count < least or count > (most or count) or not finite:
        expected = f"{least} points" if most else f"at least {least} points"
        raise ValueError(f"{option}: expected {expected} as numbers x,y,x,y,..., got {text!r}")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _resize_to(detector: "Detector", size: int) -> None:
    """Change the size that frames are resized to, with the longest side in proportion."""
    metadata = detector.model.metadata
    try:
        preprocessing = metadata.preprocessing.with_shortest_edge(size)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from error
    detector.model.metadata = replace(metadata, preprocessing=preprocessing)


def _by_engine(
    detector: "Detector", choice: EngineChoice, source: str, selection: "Selection", stack: ExitStack
) -> "Detector":
    """Return the detector that an engine runs, with the preprocessing of the given one."""
    from conditional_detr.inference.exported import ExportedModel
    from conditional_detr.video.engines import available_engines, first_frames, measure, open_engine

    if isinstance(detector.model, ExportedModel) and choice in (EngineChoice.TORCH, EngineChoice.AUTO):
        return detector
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="conditional_detr_")))
    engines = available_engines(detector) if choice is EngineChoice.AUTO else [choice.value]
    opened = {name: open_engine(detector, name, folder) for name in engines}
    for other in opened.values():
        other.model.metadata = detector.model.metadata  # an exported model has no backend of preprocessing
    if len(opened) == 1:
        return next(iter(opened.values()))
    images = first_frames(source, selection)
    if not images:  # nothing to measure, and the run will report it
        return opened["torch"]
    seconds = {name: measure(other, images) for name, other in opened.items()}
    fastest = min(seconds, key=seconds.__getitem__)
    print_line(
        "engine: "
        + ", ".join(f"{name} {1000 * seconds[name]:.0f} ms" for name in sorted(seconds, key=seconds.__getitem__))
    )
    return opened[fastest]
