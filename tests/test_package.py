"""What holds for the package as a whole: layers, import, public names."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import conditional_detr

PACKAGE = Path(conditional_detr.__file__).parent

# From top to bottom; a module imports only from lines below its own.
LAYERS = [
    {"__init__"},
    {"cli"},
    {"benchmark"},
    {"training"},
    {"deploy"},
    {"detector"},
    {"weights", "trunk_weights", "saving", "summary", "losses"},
    {"detections", "heads", "checkpoint", "config_files", "matcher", "exported"},
    {"images"},
    {"model", "labels", "targets"},
    {"backbone", "encoder", "decoder"},
    {"positions", "boxes"},
    {"runtimes"},
    {"attention", "layers", "metadata", "parameter_names", "skeleton"}
    | {
        "tensor_checks",
        "drawing",
        "files",
        "checksums",
        "pipeline",
        "sources",
        "selection",
        "progress",
        "interruption",
    },
]
EXCEPTIONS = {("model", "weights", "from_pretrained"), ("model", "saving", "save_pretrained")}


def imports_of(path: Path) -> set[tuple[str, str]]:
    """Return (module or room of this package that is imported, function it is imported in, or nothing)."""
    found = set()

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("conditional_detr"):
                found.add((f"{child.module}.__init__".split(".")[1], function))
            elif isinstance(child, ast.Import):
                assert not any(alias.name.startswith("conditional_detr") for alias in child.names)
            visit(child, child.name if isinstance(child, ast.FunctionDef) else function)

    visit(ast.parse(path.read_text()), "")
    return found


def test_imports_go_downward():
    level = {module: i for i, modules in enumerate(LAYERS) for module in modules}
    files = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    assert {parts[0] for parts in files.values()} == level.keys()
    upward = {
        (room, imported, function)
        for path, (room, *inner) in files.items()
        for imported, function in imports_of(path)
        # the files of one room may import each other
        if level[imported] <= level[room] and not (inner and imported == room)
    }
    assert upward == EXCEPTIONS


def test_import_is_fast_and_leaves_the_slow_packages_out():
    code = """
import json, sys, time
import torch, torchvision
start = time.perf_counter()
import conditional_detr
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""
    runs = [json.loads(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < 0.3
    slow = {"timm", "scipy", "huggingface_hub", "pycocotools", "transformers", "matplotlib", "typer"}
    assert slow.isdisjoint(runs[0][1])


def test_public_names_are_there_and_documented():
    for name in conditional_detr.__all__:
        assert getattr(conditional_detr, name).__doc__


def test_version_is_the_packages():
    from importlib.metadata import version

    assert version("conditional-detr") == conditional_detr.__version__


def test_nothing_is_drawn_and_nothing_printed_on_import():
    code = """
import torch
state = torch.get_rng_state()
import conditional_detr
assert torch.equal(state, torch.get_rng_state())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == result.stderr == ""
