"""What holds for the package as a whole: layers, import, public names."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import conditional_detr
from conditional_detr.cli import app

PACKAGE = Path(conditional_detr.__file__).parent
COMMANDS = typer.main.get_command(app).commands

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
    "analysis": {"modeling", "system", "inference", "data", "evaluation"},
    "training": {"modeling", "system", "set_prediction", "inference", "checkpoints", "data", "deploy", "evaluation"},
    "serving": {"modeling", "inference"},
    "video": {"modeling", "system", "inference", "deploy"},
    "benchmark": {
        *("modeling", "set_prediction", "inference", "data", "deploy", "evaluation", "training", "video"),
    },
    "distributed": {"system", "inference"},
    "cli": {
        *("modeling", "system", "inference", "checkpoints", "data", "deploy", "evaluation", "training", "benchmark"),
        *("set_prediction", "analysis", "serving", "video", "distributed"),
    },
}
# The methods of the network, two lines each.
UPWARD = {("modeling", "checkpoints", name) for name in ("from_pretrained", "save_pretrained", "push_to_hub")}


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
    assert len(entries) <= len(ALLOWED) + 3  # __init__, __main__, py.typed
    assert len(ALLOWED) <= 15


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


def loaded_after(*statements: str) -> set[str]:
    """Return the modules that are loaded in a fresh interpreter after some statements."""
    code = "; ".join(("import sys", *statements, "print(*sys.modules)"))
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()[-1].split())


SLOW = {"torchvision", "timm", "scipy", "pycocotools", "hotcoco", "huggingface_hub", "transformers", "matplotlib"}
SLOW |= {"typer", "PIL"}


def test_importing_the_package_loads_nothing_slow():
    loaded = loaded_after("import conditional_detr")
    assert loaded.isdisjoint(SLOW | {"torch", "numpy"})
    assert {name for name in loaded if name.startswith("conditional_detr")} == {"conditional_detr"}


def test_importing_the_network_loads_torch_alone():
    assert loaded_after("from conditional_detr import ConditionalDETR").isdisjoint(SLOW)


def test_importing_the_detector_leaves_training_and_evaluation_out():
    loaded = loaded_after("from conditional_detr import Detector")
    assert loaded.isdisjoint(SLOW - {"torchvision", "PIL"})
    packages = {name.split(".")[1] for name in loaded if name.startswith("conditional_detr.")}
    assert packages == {"modeling", "inference", "system"}


@pytest.mark.parametrize("command", [(), *((name,) for name in sorted(COMMANDS))], ids=" ".join)
def test_help_loads_no_torch_and_fits_80_columns(command):
    """And cuts nothing off: rich marks what it cuts with an ellipsis."""
    code = f"""
import sys
from conditional_detr.cli import app
try:
    app([*{command!r}, "--help"], prog_name="conditional-detr")
finally:
    print("\\n", *sys.modules, sep=" ")
"""
    env = {**os.environ, "COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    help_text, _, loaded = output.rstrip("\n").rpartition("\n")
    assert set(loaded.split()).isdisjoint(SLOW - {"typer"} | {"torch", "numpy"})
    assert max(map(len, help_text.splitlines())) <= 80
    assert "…" not in help_text
    options = {option for p in COMMANDS[command[0]].params for option in p.opts if not p.hidden} if command else set()
    assert {option for option in options if option.startswith("--") and option not in help_text} == set()


def test_completion_loads_no_torch():
    """What a shell runs on every press of TAB."""
    code = "import sys; sys.argv = ['conditional-detr']; from conditional_detr.cli import app; app()"
    for words, expected in (("conditional-detr ev", "evaluate"), ("conditional-detr detect --to", "--top-k")):
        env = {
            **os.environ,
            "_CONDITIONAL_DETR_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        shown = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], env=env, capture_output=True, text=True, check=False
        )
        assert shown.stdout.split() == [expected]
        assert not re.search(r"\| +(torch|torchvision|numpy|PIL)$", shown.stderr, re.MULTILINE)


def test_python_dash_m_runs_the_command_line():
    command = [sys.executable, "-m", "conditional_detr", "--version"]
    assert subprocess.check_output(command, text=True).strip() == conditional_detr.__version__


def test_public_names_resolve_and_are_documented():
    assert conditional_detr._MODULES.keys() == set(conditional_detr.__all__)
    for name in conditional_detr.__all__:
        assert getattr(conditional_detr, name).__doc__
    assert set(conditional_detr.__all__) <= set(dir(conditional_detr))
    with pytest.raises(AttributeError, match="module 'conditional_detr' has no attribute 'Detectr'"):
        _ = conditional_detr.Detectr


def test_editors_see_the_public_names():
    """The names that type checkers read are those that are loaded on first use, from the same modules."""
    tree = ast.parse(Path(conditional_detr.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: node.module for node in block.body for name in node.names}
    assert seen == {name: f"conditional_detr.{module}" for name, module in conditional_detr._MODULES.items()}


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
