"""Generate the pages that come from the code: the command line, the Python API, the changelog."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "modeling": "The network: tensors in, tensors out.",
    "set_prediction": "Matching, losses, targets and boxes.",
    "inference": "From images to detections.",
    "checkpoints": "Load, save and convert weights.",
    "data": "COCO annotations, datasets, augmentation.",
    "evaluation": "COCO's twelve numbers.",
    "analysis": "What goes wrong in detections, and where.",
    "training": "The training loop and its settings.",
    "video": "Detection and tracks on videos, cameras and streams.",
    "deploy": "Optimised copies, exported models, quantization.",
    "serving": "The HTTP service.",
    "distributed": "More than one machine.",
    "benchmark": "Time this library and others side by side.",
    "system": "Atomic files, shutdown requests, progress bars.",
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the generated API pages in the navigation."""
    python = [f"api/{name}.md" for name in ("index", *PACKAGES)]
    for section in config.nav or []:
        for entry in next(iter(section.values())) if isinstance(section, dict) else ():
            if isinstance(entry, dict) and "Python" in entry:
                entry["Python"] = python
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages.

    Raises:
        ValueError: the library has another set of packages than the reference.
    """
    library = importlib.import_module("conditional_detr")
    found = {module.name for module in pkgutil.iter_modules(library.__path__) if module.ispkg} - {"cli"}
    if found != PACKAGES.keys():
        raise ValueError(f"docs/hooks.py: expected the packages {sorted(found)}, got {sorted(PACKAGES)}")
    pages = {"cli.md": command_line(), "changelog.md": (ROOT / "CHANGELOG.md").read_text(), "api/index.md": overview()}
    pages |= {f"api/{name}.md": package_page(name, summary) for name, summary in PACKAGES.items()}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


# The command line: typer brings a click of its own since 0.20, so only what both have is used


def command_line() -> str:
    """Return the reference of all commands as Markdown."""
    from conditional_detr.cli import app

    group: Any = typer.main.get_command(app)
    context = group.make_context("conditional-detr", [], resilient_parsing=True)
    parts = ["# Command line", _prose(group.help), _tables(group, context)]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command.hidden:
            continue
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        usage = " ".join([inner.command_path, *command.collect_usage_pieces(inner)])
        parts += [f"## {name}", _prose(command.help), f"```text\n{usage}\n```", _tables(command, inner)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _prose(text: str | None) -> str:
    """Return a help text as paragraphs."""
    paragraphs = re.sub("[\b\f]", "", inspect.cleandoc(text or "")).split("\n\n")
    return "\n\n".join(_escaped(" ".join(paragraph.split())) for paragraph in paragraphs)


def _tables(command: Any, context: Any) -> str:
    """Return the arguments and the options of a command as tables."""
    arguments, options = [], []
    for parameter in command.get_params(context):
        if parameter.hidden:
            continue
        about = _escaped(" ".join((parameter.help or "").split()))
        if parameter.param_type_name == "argument":
            arguments.append(f"| `{' '.join(parameter.get_usage_pieces(context))}` | {about} |")
        else:
            names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
            options.append(f"| {names} | {_value(parameter, context)} | {_default(parameter, context)} | {about} |")
    tables = []
    if arguments:
        tables.append("\n".join(["| argument | |", "|---|---|", *arguments]))
    if options:
        tables.append("\n".join(["| option | value | default | |", "|---|---|---|---|", *options]))
    return "\n\n".join(tables)


def _value(option: Any, context: Any) -> str:
    """Return what an option takes; nothing for a flag."""
    if option.is_flag:
        return ""
    describe = getattr(option, "display_type", None) or option.make_metavar
    shown = option.metavar or describe(context).strip("<>").replace("|", ", ")
    return _escaped(re.sub(r"^list\[(.*)\]$", r"\1, repeatable", shown))


def _default(option: Any, context: Any) -> str:
    """Return an option's default, as its help shows it."""
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return _escaped(option.show_default)
    value = option.get_default(context)
    if not option.show_default or value is None or value is False or value in ("", (), []):
        return ""
    return f"`{option.opts[0]}`" if value is True else f"`{getattr(value, 'value', value)}`"


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([\\|<>*_\[\]`])", r"\\\1", text)


# The Python API


def overview() -> str:
    """Return the page of the public names, each with its first sentence and a link."""
    package = importlib.import_module("conditional_detr")
    rows = []
    for name in sorted(package.__all__):
        value = getattr(package, name)
        room = value.__module__.split(".")[1]
        summary = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", inspect.getdoc(value) or "").split("\n")[0]
        target = f"{value.__module__}.{value.__qualname__}"
        rows.append(f"| [`{name}`]({room}.md#{target}) | {summary} |")
    packages = [f"| [`conditional_detr.{name}`]({name}.md) | {summary} |" for name, summary in PACKAGES.items()]
    head = [
        "# Python API",
        "",
        "## Top-level names",
        "",
        "`from conditional_detr import ...`",
        "",
        "| name | |",
        "|---|---|",
    ]
    return "\n".join([*head, *rows, "", "## Packages", "", "| package | |", "|---|---|", *packages, ""])


def package_page(name: str, summary: str) -> str:
    """Return the page of a package: its modules, for mkdocstrings to fill."""
    package = importlib.import_module(f"conditional_detr.{name}")
    parts = [f"# conditional_detr.{name}", summary]
    parts += [f"::: {module.__name__}" for module in (package, *_modules(package)) if _has_public(module)]
    return "\n\n".join(parts) + "\n"


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    """Yield the public modules of a package and of the packages in it."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.rpartition(".")[2].startswith("_"):
            yield importlib.import_module(found.name)


def _has_public(module: ModuleType) -> bool:
    """Return whether a module defines a public class or function."""
    own = [value for name, value in vars(module).items() if not name.startswith("_")]
    return any((inspect.isclass(one) or inspect.isfunction(one)) and one.__module__ == module.__name__ for one in own)
