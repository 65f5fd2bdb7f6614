"""List images: expand files, folders, globs, URLs and lists on standard input."""

import glob
import os
import re
import sys
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".heic", ".heif",
))
# fmt: on
"""Suffixes by which a file in a folder is recognised as an image."""


class ListedImage(NamedTuple):
    """An image to process.

    Attributes:
        image: its path or URL.
        output: path of its results below the output folder, without suffix; no two listed images share it.
    """

    image: str
    output: PurePath


class Listing(NamedTuple):
    """The images that arguments stand for.

    Attributes:
        images: in the order of the arguments; those of a folder or glob sorted by path.
        skipped: number of files in folders whose suffix is none of an image.
    """

    images: list[ListedImage]
    skipped: int


def list_images(arguments: Sequence[str], *, output: str | Path) -> Listing:
    """List the images that arguments stand for.

    Args:
        arguments: files, folders (with all folders below), globs, http(s) URLs; "-" reads a file, folder or URL from
            each line of standard input. Any other name is kept, and fails when it is opened.
        output: the folder of results; folders and globs do not list images in it.

    Raises:
        ValueError: an empty name, a folder or glob without an image, or no argument.
    """
    results = os.path.realpath(output)
    listed: list[tuple[str, PurePath]] = []
    skipped = 0
    for argument, from_stdin in expand_standard_input(arguments):
        if not argument:
            raise ValueError("images: expected files, folders, globs or URLs, got an empty name")
        if re.match("https?://", argument, re.IGNORECASE):
            listed.append((argument, _name_of_url(argument)))
        elif _check_path(argument, os.path.isdir):
            images, others = _list_folder(argument, results)
            skipped += others
            listed += images
            if not images:
                raise ValueError(f"{argument}: expected a folder with images, got one with {others} other files")
        elif not from_stdin and glob.has_magic(argument) and not _check_path(argument, os.path.lexists):
            listed += _list_glob(argument, results)
        else:
            listed.append((argument, PurePath(PurePath(argument).name)))
    if not listed:
        raise ValueError("images: expected at least one, got none")
    outputs = _make_unique(name.with_suffix("") if name.name else name for _, name in listed)
    return Listing([ListedImage(image, name) for (image, _), name in zip(listed, outputs, strict=True)], skipped)


def expand_standard_input(arguments: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield the arguments, with "-" replaced by the lines of standard input, and whether each comes from there."""
    for argument in arguments:
        if argument == "-":
            if sys.stdin is None:
                raise ValueError("images: expected one per line from standard input, got a closed one")
            lines = (line.rstrip("\r\n").removeprefix("\ufeff") for line in sys.stdin)
            yield from ((line, True) for line in lines if line)
        else:
            yield argument, False


def _check_path(name: str, check: Callable[[str], bool]) -> bool:
    """Return the check of a name that need not be a valid path, such as a data URI."""
    try:
        return check(name)
    except (OSError, ValueError):
        return False


def _list_folder(folder: str, results: str) -> tuple[list[tuple[str, PurePath]], int]:
    """Return the images in a folder and the folders below it, and the number of other files."""
    images, others = [], 0
    for path in walk_folder(folder, results):
        if is_image_name(path):
            images.append((path, PurePath(os.path.relpath(path, folder))))
        else:
            others += 1
    return sorted(images), others


def walk_folder(folder: str, results: str) -> Iterator[str]:
    """Yield the paths of the files in a folder and below it, those of one folder after the other, each sorted.

    Links to folders are followed; each folder is listed once. One that cannot be read is warned of.

    Args:
        folder: the folder.
        results: real path of a folder below it that is left out.
    """
    seen = set()

    def warn(error: OSError) -> None:
        warnings.warn(f"{error.filename}: the folder cannot be read: {error.strerror}", stacklevel=2)

    for current, below, files in os.walk(folder, followlinks=True, onerror=warn):
        real = os.path.realpath(current)
        if real in seen or (real == results and current != folder):
            below.clear()
            continue
        seen.add(real)
        below.sort()
        for file in sorted(files):
            yield os.path.join(current, file)  # noqa: PTH118  # a Path each would take most of the time and memory


def is_image_name(name: str) -> bool:
    """Return whether a file in a folder is taken for an image, by its name, path or URI."""
    path = PurePath(name)
    # macOS writes metadata of photo.jpg to ._photo.jpg on other file systems
    return path.suffix.lower() in SUFFIXES and not path.name.startswith("._")


def _list_glob(pattern: str, results: str) -> list[tuple[str, PurePath]]:
    """Return the files that match a glob, each once, named by their path below the fixed part of the pattern.

    Raises:
        ValueError: no file matches.
    """
    parts = PurePath(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = PurePath(*parts[:fixed])
    matches: dict[str, str] = {}  # by the real path: links may form circles
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207  # pathlib takes no absolute patterns
        real = os.path.realpath(match)
        if os.path.isfile(match) and not real.startswith(results + os.sep):  # noqa: PTH113
            matches.setdefault(real, match)
    if not matches:
        raise ValueError(f"{pattern}: no file matches")
    return [(match, PurePath(os.path.relpath(match, base))) for match in matches.values()]


def _name_of_url(url: str) -> PurePath:
    """Return the last part of a URL's path, without characters that a file name cannot have."""
    name = urllib.parse.unquote(PurePath(urllib.parse.urlsplit(url).path).name)
    return PurePath(re.sub(r"[^\w.-]+", "_", name).strip(".") or "image")


def _make_unique(names: Iterable[PurePath]) -> Iterator[PurePath]:
    """Number repeated names, ignoring case: name, name-2, name-3."""
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # so that many images of one name do not count from 2 each time
    for name in names:
        unique, key = name, str(name).casefold()
        while str(unique).casefold() in taken:
            numbers[key] = numbers.get(key, 1) + 1
            unique = name.with_name(f"{name.name}-{numbers[key]}")
        taken.add(str(unique).casefold())
        yield unique
