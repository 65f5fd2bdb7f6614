"""Which pictures the command line means: files, folders, globs, addresses, lists on standard input."""

import glob
import re
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif",
))
# fmt: on
"""What a file in a folder must end with to be taken for a picture."""


class Input(NamedTuple):
    """A picture to work on.

    Attributes:
        picture: its path or address.
        output: what its results are called below the output folder, without suffix; no two inputs share it.
    """

    picture: str
    output: PurePath


class Inputs(NamedTuple):
    """What the arguments came to.

    Attributes:
        pictures: in the arguments' order; those of a folder or glob sorted by path.
        passed_over: how many files in folders do not end as pictures do.
    """

    pictures: list[Input]
    passed_over: int


def list_pictures(arguments: Sequence[str], *, output: Path) -> Inputs:
    """Find the pictures that arguments mean.

    Args:
        arguments: files, folders (with all folders below), globs, http(s) addresses; "-": one such a line on
            standard input. A name that is nothing of these stays, to fail at its turn.
        output: the folder of results: pictures in it are none of a folder's own.

    Raises:
        ValueError: a folder or glob without a picture, or nothing at all.
    """
    found: list[tuple[str, PurePath]] = []
    passed_over = 0
    for argument in _expand_standard_input(arguments):
        path = Path(argument)
        if re.match("https?://", argument, re.IGNORECASE):
            found.append((argument, _name_of_address(argument)))
        elif path.is_dir():
            pictures, others = _list_folder(path, output)
            passed_over += others
            found += [(str(file), file.relative_to(path)) for file in pictures]
            if not pictures:
                raise ValueError(f"{argument}: the folder has no pictures, and {others} other files")
        elif not path.exists() and glob.has_magic(argument):
            matches = glob.glob(argument, recursive=True)  # noqa: PTH207  # pathlib takes no absolute patterns
            files = sorted(file for file in map(Path, matches) if file.is_file())
            found += [(str(file), PurePath(file.name)) for file in files]
            if not files:
                raise ValueError(f"{argument}: no file matches")
        else:
            found.append((argument, PurePath(path.name)))
    if not found:
        raise ValueError("pictures: expected at least one, got none")
    outputs = _without_doubles(name.with_suffix("") for _, name in found)
    pictures_found = [Input(picture, name) for (picture, _), name in zip(found, outputs, strict=True)]
    return Inputs(pictures_found, passed_over)


def _expand_standard_input(arguments: Sequence[str]) -> Iterator[str]:
    """Give the arguments, "-" replaced by what stands on standard input."""
    for argument in arguments:
        if argument == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
        else:
            yield argument


def _list_folder(folder: Path, output: Path) -> tuple[list[Path], int]:
    """Return the pictures in a folder and those below it, and the number of other files."""
    results = output.resolve()
    inside = folder.resolve() in results.parents  # a former run's annotated pictures are not pictures of the folder
    pictures, others = [], 0
    for path in folder.rglob("*"):
        if not path.is_file() or (inside and results in path.resolve().parents):
            continue
        if path.suffix.lower() in SUFFIXES:
            pictures.append(path)
        else:
            others += 1
    return sorted(pictures), others


def _name_of_address(url: str) -> PurePath:
    """Return the last part of an address's path, without what a file name cannot have."""
    name = urllib.parse.unquote(PurePath(urllib.parse.urlsplit(url).path).name)
    return PurePath(re.sub(r"[^\w.-]+", "_", name).strip(".") or "picture")


def _without_doubles(names: Iterable[PurePath]) -> Iterator[PurePath]:
    """Number names that come again, also in other letters' case: name, name-2, name-3."""
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # so that many pictures of one name do not count from 2 each time
    for name in names:
        unique, key = name, str(name).casefold()
        while str(unique).casefold() in taken:
            numbers[key] = numbers.get(key, 1) + 1
            unique = name.with_name(f"{name.name}-{numbers[key]}")
        taken.add(str(unique).casefold())
        yield unique
