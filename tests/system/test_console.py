"""Text of strangers is printed verbatim, without effect on the terminal; nothing is printed past the console."""

import ast
import io
import re

import pytest
from rich.table import Table

from conditional_detr.system.console import PlainConsole, printable
from helpers.models import ROOT

EVIL = "\x1b]0;owned\x07\x1b[2J\x1b[31mFAKE"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x1b[31mFAKE"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (EVIL, SHOWN),
        ("a\nb\tc\rd\0", r"a\nb\tc\rd\x00"),
        ("\x9b2J\x7f\x85", r"\x9b2J\x7f\x85"),  # the 8-bit forms of the same
        ("\u202egpj.exe\u2066", r"\u202egpj.exe\u2066"),  # reversed text
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("caf\udce9 \ud800", r"caf\udce9 \ud800"),
        ("Hündin, 犬, 👨‍👩‍👧, می‌خواهم, a\\n [b] :dog:", "Hündin, 犬, 👨‍👩‍👧, می‌خواهم, a\\n [b] :dog:"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


NAMES = ["sign [stop]", "on/off [/]", "[/red]", "[link=https://x.example/]cat[/link]", ":dog:", "N/A", "a,b", '"c"']


@pytest.mark.parametrize("name", NAMES)
def test_no_markup(name):
    table = Table("class [x]", min_width=120, title=f"{name} [b]t[/b]")
    table.add_row(name)
    console = PlainConsole(file=io.StringIO(), width=200, force_terminal=True)
    console.print(table)
    console.print(f"{name} [b]", soft_wrap=True)
    text = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())
    assert text.count(name) == 3
    assert "[b]t[/b]" in text
    assert "class [x]" in text
    assert text.endswith(f"{name} [b]\n")


def test_a_terminal_of_few_characters():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    PlainConsole(file=file, width=80).print("Hündin")
    file.flush()
    assert file.buffer.getvalue() == b"H\\xfcndin\n"


def test_everything_is_printed_by_the_console():
    """Only numbers and ASCII, for other programs, are printed in another way; Text goes past the console's checks."""
    printed = {"benchmark/worker.py", "cli/__init__.py", "cli/benchmark.py", "cli/info.py"}
    texts = {"cli/benchmark.py", "system/console.py"}
    package = ROOT / "conditional_detr"
    for path in package.rglob("*.py"):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), path.relative_to(package).as_posix()
        calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        others = [call for call in calls if call in ("print", "typer.echo", "typer.secho", "Console")]
        assert len(others) == (name in printed), name
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
        assert ("Text" in imported) == (name in texts), name
