"""Which images the command line means: files, folders, globs, addresses, lists on standard input."""

import glob
import os
import re
import sys
import urllib.parse
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif",
))
# fmt: on
"""What a file in a folder must end with to be taken for an image."""


class Input(NamedTuple):
    """An image to work on.

    Attributes:
        image: its path or address.
        output: what its results are called below the output folder, without suffix; no two inputs share it.
    """

    image: str
    output: PurePath


class Inputs(NamedTuple):
    """What the arguments came to.

    Attributes:
        images: in the arguments' order; those of a folder or glob sorted by path.
        passed_over: how many files in folders do not end as images do.
    """

    images: list[Input]
    passed_over: int


def list_images(arguments: Sequence[str], *, output: Path) -> Inputs:
    """Find the images that arguments mean.

    Args:
        arguments: files, folders (with all folders below), globs, http(s) addresses; "-": a file, folder or address
            each line of standard input. A name that is nothing of these stays, to fail at its turn.
        output: the folder of results: images in it are none of a folder's or glob's own.

    Raises:
        ValueError: an empty name, a folder or glob without an image, or nothing at all.
    """
    results = os.path.realpath(output)
    found: list[tuple[str, PurePath]] = []
    passed_over = 0
    for argument, listed in _expand_standard_input(arguments):
        if not argument:
            raise ValueError("images: expected files, folders, globs or addresses, got an empty name")
        if re.match("https?://", argument, re.IGNORECASE):
            found.append((argument, _name_of_address(argument)))
        elif _is(argument, os.path.isdir):
            images, others = _list_folder(argument, results)
            passed_over += others
            found += images
            if not images:
                raise ValueError(f"{argument}: the folder has no images, and {others} other files")
        elif not listed and glob.has_magic(argument) and not _is(argument, os.path.lexists):
            found += _list_glob(argument, results)
        else:
            found.append((argument, PurePath(PurePath(argument).name)))
    if not found:
        raise ValueError("images: expected at least one, got none")
    outputs = _without_doubles(name.with_suffix("") if name.name else name for _, name in found)
    images_found = [Input(image, name) for (image, _), name in zip(found, outputs, strict=True)]
    return Inputs(images_found, passed_over)


def _expand_standard_input(arguments: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Give the arguments, "-" replaced by the lines of standard input, and whether they stood there."""
    for argument in arguments:
        if argument == "-":
            lines = (line.rstrip("\r\n").removeprefix("\ufeff") for line in sys.stdin)
            yield from ((line, True) for line in lines if line)
        else:
            yield argument, False


def _is(name: str, kind: object) -> bool:
    """Ask the file system about a name that may be none at all, such as a data URI."""
    try:
        return bool(kind(name))  # type: ignore[operator]
    except (OSError, ValueError):
        return False


def _list_folder(folder: str, results: str) -> tuple[list[tuple[str, PurePath]], int]:
    """Return the images in a folder and those below it, and the number of other files.

    Links to folders are followed, each folder is gone through once.
    """
    images, others, seen = [], 0, set()

    def tell(error: OSError) -> None:
        warnings.warn(f"{error.filename}: the folder cannot be entered: {error.strerror}", stacklevel=2)

    for place, below, files in os.walk(folder, followlinks=True, onerror=tell):
        real = os.path.realpath(place)
        if real in seen or (real == results and place != folder):
            below.clear()
            continue
        seen.add(real)
        below.sort()
        for file in files:
            path = os.path.join(place, file)  # noqa: PTH118  # a Path each would take most of the time and memory
            if PurePath(file).suffix.lower() in SUFFIXES:
                images.append((path, PurePath(os.path.relpath(path, folder))))
            else:
                others += 1
    return sorted(images), others


def _list_glob(pattern: str, results: str) -> list[tuple[str, PurePath]]:
    """Return the files that match a glob, each once, by their path below the part of it that is fixed.

    Raises:
        ValueError: no file matches.
    """
    parts = PurePath(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = PurePath(*parts[:fixed])
    matches: dict[str, str] = {}  # by the real path: links may lead in circles
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207  # pathlib takes no absolute patterns
        real = os.path.realpath(match)
        if os.path.isfile(match) and not real.startswith(results + os.sep):  # noqa: PTH113
            matches.setdefault(real, match)
    if not matches:
        raise ValueError(f"{pattern}: no file matches")
    return [(match, PurePath(os.path.relpath(match, base))) for match in matches.values()]


def _name_of_address(url: str) -> PurePath:
    """Return the last part of an address's path, without what a file name cannot have."""
    name = urllib.parse.unquote(PurePath(urllib.parse.urlsplit(url).path).name)
    return PurePath(re.sub(r"[^\w.-]+", "_", name).strip(".") or "image")


def _without_doubles(names: Iterable[PurePath]) -> Iterator[PurePath]:
    """Number names that come again, also in other letters' case: name, name-2, name-3."""
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # so that many images of one name do not count from 2 each time
    for name in names:
        unique, key = name, str(name).casefold()
        while str(unique).casefold() in taken:
            numbers[key] = numbers.get(key, 1) + 1
            unique = name.with_name(f"{name.name}-{numbers[key]}")
        taken.add(str(unique).casefold())
        yield unique
