"""Print text of any origin, such as class names and file names, verbatim and without effect on the terminal."""

import unicodedata
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

PIPE_CLOSED = 141
"""Exit code of a command whose standard output the reader has closed, as in shells."""

# U+202A to U+202E and U+2066 to U+2069 change the order in which a terminal shows the text that follows.
_DIRECTION = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_CONTROL = {"Cc", "Cs", "Zl", "Zp"}  # control characters, surrogates, separators of lines and paragraphs


def printable(text: str) -> str:
    r"""Return text with control characters as escape sequences, such as \x1b and \n; other text is unchanged."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _CONTROL or unicodedata.bidirectional(character) in _DIRECTION
        else character
        for character in text
    )


class PlainConsole(Console):
    """A console that shows strings as they are: no markup or emoji codes, control characters escaped.

    Every string that is printed, also in a cell of a table, goes through :meth:`render_str`. A ``rich.text.Text`` does
    not; it is for the program's own text only.
    """

    def on_broken_pipe(self) -> None:
        """Exit as a shell does, instead of with rich's 1, when the reader of the output has closed it."""
        with suppress(SystemExit):
            super().on_broken_pipe()  # also leads what is still written to nowhere
        raise SystemExit(PIPE_CLOSED)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as styled text."""
        readable = printable(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(readable, **{**options, "markup": False, "emoji": False})
