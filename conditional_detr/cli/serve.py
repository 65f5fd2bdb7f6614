"""``conditional-detr serve``: detect objects for other programs, over HTTP."""

import ipaddress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from conditional_detr.cli.console import AUTO, one_line_errors, print_line
from conditional_detr.cli.options import (
    DEVICE,
    FAST_PREPROCESSING,
    THRESHOLDS,
    WEIGHTS,
    check_one_threshold,
    open_detector,
)
from conditional_detr.system.paths import expand_home

if TYPE_CHECKING:
    from conditional_detr.inference.detector import Detector
    from conditional_detr.serving.gate import Gate
    from conditional_detr.serving.settings import ServiceSettings

_MODEL, _ACCESS, _LIMITS, _PROCESS = "Models", "Access", "Limits", "Processes"
_MB = 2**20


def serve(
    weights: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{WEIGHTS} Repeatable; NAME=WEIGHTS names a model in requests.",
            show_default="shapes",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE, rich_help_panel=_MODEL)] = AUTO,
    fast_preprocessing: Annotated[
        bool, typer.Option("--fast-preprocessing", help=FAST_PREPROCESSING, rich_help_panel=_MODEL)
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Report detections with a higher score, by default.", show_default="0.5", rich_help_panel=_MODEL
        ),
    ] = None,
    thresholds: Annotated[Path | None, typer.Option(help=THRESHOLDS, rich_help_panel=_MODEL)] = None,
    top_k: Annotated[
        int, typer.Option(help="Report at most this many detections per image, by default.", rich_help_panel=_MODEL)
    ] = 100,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_ACCESS)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.", rich_help_panel=_ACCESS)] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a key a line, as it is or as sha256:HEX; read again on SIGHUP.", rich_help_panel=_ACCESS
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Serve a public address without keys.", rich_help_panel=_ACCESS)
    ] = False,
    rate_limit: Annotated[
        str | None, typer.Option(help="Requests per key and time, such as 60/minute.", rich_help_panel=_ACCESS)
    ] = None,
    rate_storage: Annotated[
        str,
        typer.Option(help="Where they are counted; memory:// counts in each process.", rich_help_panel=_ACCESS),
    ] = "memory://",
    allow_urls: Annotated[
        list[str] | None,
        typer.Option(
            help="Host to download images from: images.example.org, *.example.org, or * for all public hosts; "
            "repeatable.",
            show_default="none",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Run at most this many images together.", rich_help_panel=_LIMITS)
    ] = 8,
    max_wait_ms: Annotated[
        float, typer.Option(help="Wait for images that are being opened at most.", rich_help_panel=_LIMITS)
    ] = 5.0,
    max_queue: Annotated[
        int, typer.Option(help="Requests in the service; others get 503.", rich_help_panel=_LIMITS)
    ] = 64,
    max_images: Annotated[int, typer.Option(help="Images per request.", rich_help_panel=_LIMITS)] = 16,
    max_tiles: Annotated[int, typer.Option(help="Tiles and other views of a request.", rich_help_panel=_LIMITS)] = 64,
    max_body_mb: Annotated[int, typer.Option(help="Size of a request.", rich_help_panel=_LIMITS)] = 32,
    max_pixels: Annotated[
        int, typer.Option(help="Pixels of an image, checked before it is decoded.", rich_help_panel=_LIMITS)
    ] = 64_000_000,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes; each loads the models.", rich_help_panel=_PROCESS)
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads of the model in each process.", show_default="all", rich_help_panel=_PROCESS
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Time that requests have to finish after SIGTERM.", rich_help_panel=_PROCESS)
    ] = 30.0,
) -> None:
    """Serve models over HTTP, with OpenAI-compatible endpoints and a page to try them on.

    Endpoints: POST /v1/chat/completions, /v1/responses, /v1/detect, /v1/infer; GET /v1/models, /health/live,
    /health/ready, /metrics, /docs. The log has one line of JSON per request, on standard error.

    Exit codes: 0 after SIGTERM or Ctrl-C; 1 the service could not start; 2 usage error.
    """
    with one_line_errors():
        from conditional_detr.inference.url_guard import UrlGuard
        from conditional_detr.serving.keys import ApiKeys
        from conditional_detr.serving.server import ServerOptions, listen, log_to_stderr, run
        from conditional_detr.serving.settings import ServiceSettings

        check_one_threshold(threshold, thresholds)
        if api_key_file is None and not insecure and not _is_loopback(host):
            raise ValueError(f"--host: expected --api-key-file, or --insecure, for the public address {host}")
        if api_key_file is not None:
            ApiKeys(api_key_file)  # errors come before the models are loaded
        settings = ServiceSettings(
            max_batch=max_batch,
            max_wait=max_wait_ms / 1000,
            max_queue=max_queue,
            max_images=max_images,
            max_tiles=max_tiles,
            max_body=max_body_mb * _MB,
            max_bodies=max(512, max_body_mb) * _MB,
            max_pixels=max_pixels,
            urls=UrlGuard(*(allow_urls or ())),
            rate_limit=rate_limit,
            rate_storage=rate_storage,
            threshold=threshold,
            top_k=top_k,
        )
        create = _Application(
            _named(weights or ["shapes"]), device, fast_preprocessing, threads, settings, api_key_file, thresholds
        )
        if workers > 1:
            create.load()  # an error here is one line, and not one of each process
        try:
            listener = listen(host, port)
        except OSError as error:
            raise OSError(f"--host {host} --port {port}: {error}") from error
        with listener:
            log_to_stderr()
            address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
            started = partial(print_line, f"serving {', '.join(create.weights)} on {address}")
            code = run(create, listener, ServerOptions(workers, drain_seconds), started)
    if code:
        raise typer.Exit(code)


@dataclass(frozen=True)
class _Application:
    """What a process needs to create the application.

    Attributes:
        weights: by name.
        device: as the option.
        fast_preprocessing: as the option.
        threads: as the option.
        settings: limits and defaults.
        keys: file of the API keys.
        thresholds: file of the thresholds of each class, which all models have.
    """

    weights: dict[str, str]
    device: str
    fast_preprocessing: bool
    threads: int | None
    settings: "ServiceSettings"
    keys: Path | None
    thresholds: Path | None

    def load(self) -> "dict[str, Detector]":
        """Load the models."""
        return {
            name: open_detector(
                source, self.device, fast_preprocessing=self.fast_preprocessing, thresholds=self.thresholds
            )
            for name, source in self.weights.items()
        }

    def __call__(self) -> "Gate":
        """Load the models and return the application."""
        import torch

        from conditional_detr.checkpoints.model_card import read_licence
        from conditional_detr.serving.app import create_app
        from conditional_detr.serving.keys import ApiKeys

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        keys = None if self.keys is None else ApiKeys(self.keys)
        licences = {name: read_licence(source) for name, source in self.weights.items()}
        stated = {name: licence for name, licence in licences.items() if licence is not None}
        return create_app(self.load(), self.settings, keys=keys, licences=stated)


def _named(weights: list[str]) -> dict[str, str]:
    """Return weights by the name that requests use: what stands before "=", else a short or hub name, else the file's.

    Raises:
        ValueError: two models of one name, or no name or weights beside "=".
    """
    named: dict[str, str] = {}
    for text in weights:
        name, equals, source = text.partition("=")
        path = expand_home(text)
        if not equals or path.exists():
            source, path = text, path.resolve()
            name = text if not path.exists() else path.name if path.is_dir() else path.stem
        if not name or not source:
            raise ValueError(f"--weights: expected WEIGHTS or NAME=WEIGHTS, got {text!r}")
        if name in named:
            raise ValueError(f"--weights: expected different names, got {name!r} twice; NAME=WEIGHTS gives another")
        named[name] = source
    return named


def _is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
