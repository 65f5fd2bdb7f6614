"""What holds for the package as a whole: layers, import, public names."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import conditional_detr

PACKAGE = Path(conditional_detr.__file__).parent

# Which packages each package may import; only ``cli`` imports them all.
ALLOWED = {
    "modeling": set(),
    "system": set(),
    "set_prediction": {"modeling"},
    "inference": {"modeling", "system"},
    "checkpoints": {"modeling", "system", "inference"},
    "data": {"modeling", "system", "inference"},
    "deploy": {"modeling", "system", "inference", "checkpoints"},
    "evaluation": {"modeling", "inference", "data"},
    "training": {"modeling", "system", "set_prediction", "inference", "checkpoints", "data", "deploy", "evaluation"},
    "benchmark": {"modeling", "set_prediction", "inference", "deploy", "training"},
    "cli": {"modeling", "system", "inference", "checkpoints", "data", "deploy", "evaluation", "training", "benchmark"},
}
# The class methods of the network, two lines each.
UPWARD = {("modeling", "checkpoints", "from_pretrained"), ("modeling", "checkpoints", "save_pretrained")}


def imports_of(path: Path) -> set[tuple[str, str]]:
    """Return (package or module of this library that is imported, function that imports it, or nothing)."""
    found = set()

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import"
                if (child.module or "").split(".")[0] == "conditional_detr":
                    found.update((f"{child.module}.{name.name}".split(".")[1], function) for name in child.names)
            elif isinstance(child, ast.Import):
                assert not any(alias.name.startswith("conditional_detr") for alias in child.names)
            visit(child, child.name if isinstance(child, ast.FunctionDef) else function)

    visit(ast.parse(path.read_text()), "")
    return found


def test_packages_import_only_what_is_allowed():
    found = {
        (path.relative_to(PACKAGE).parts[0], imported, function)
        for path in PACKAGE.glob("*/**/*.py")
        for imported, function in imports_of(path)
    }
    across = {(package, imported, function) for package, imported, function in found if package != imported}
    upward = {
        (package, imported, function) for package, imported, function in across if imported not in ALLOWED[package]
    }
    assert upward == UPWARD
    used = {(package, imported) for package, imported, _ in across - UPWARD}
    assert used == {(package, imported) for package, allowed in ALLOWED.items() for imported in allowed}


def test_allowed_imports_go_downward():
    """Every package comes after all that it may import: there is no circle."""
    order = list(ALLOWED)
    assert all(order.index(imported) < order.index(package) for package in order for imported in ALLOWED[package])


def test_the_top_of_the_package_is_short():
    """Packages and the files that Python itself asks for; counted as a clone has them, without caches."""
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "shipped_weights")]
    assert {path.name for path in entries if path.is_dir()} == ALLOWED.keys()
    assert len(entries) <= 15


def test_no_module_imports_itself_in_a_circle():
    """Modules, at the top of their files: what each imports, followed to the end, never comes back to it."""
    arrows = {}
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("conditional_detr", *path.relative_to(PACKAGE).with_suffix("").parts))
        tree = ast.parse(path.read_text())
        arrows[module] = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        arrows[module] |= {
            f"{node.module}.{a.name}" for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names
        }
    for module in arrows:
        reached, todo = set(), [module]
        while todo:
            for target in arrows.get(todo.pop(), ()):
                if target in arrows and target not in reached:
                    reached.add(target)
                    todo.append(target)
        assert module not in reached, module


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
