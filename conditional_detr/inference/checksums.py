"""Checksums at the end of exported models, which the runtimes ignore."""

import zlib
from pathlib import Path

_KEY = b"conditional_detr.checksum"
_LENGTH = 16  # hexadecimal digits of the number of bytes
_DIGITS = _LENGTH + 8  # followed by those of the CRC-32


def _onnx_entry() -> bytes:
    """Return the bytes before the checksum in an ``.onnx``, the start of another ``metadata_props`` entry.

    Protocol buffers allow appending to a message: repeated fields need not be adjacent.
    """
    key = bytes([1 << 3 | 2, len(_KEY)]) + _KEY  # field 1, bytes
    value = bytes([2 << 3 | 2, _DIGITS])  # field 2, bytes
    return bytes([14 << 3 | 2, len(key) + len(value) + _DIGITS]) + key + value  # field 14, a message


_DELIMITERS = {".onnx": (_onnx_entry(), b""), ".xml": (b"<!-- " + _KEY + b" ", b" -->\n")}
"""Bytes before and after the checksum."""


def files_of(path: Path) -> tuple[Path, ...]:
    """Return the files of an exported model: the path, and for OpenVINO the ``.bin`` beside it."""
    return (path, path.with_suffix(".bin")) if path.suffix.lower() == ".xml" else (path,)


def append_checksum(path: Path) -> None:
    """Append the checksum of an ``.onnx``, or of an ``.xml`` and the ``.bin`` beside it, to the file."""
    before, after = _DELIMITERS[path.suffix.lower()]
    value = _checksum(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(before + value + after)


def is_intact(path: Path) -> bool:
    """Return False if a file was changed since its checksum was appended, as far as that can be detected.

    A file without a checksum counts as intact. So does a file of another length: another program has rewritten it, or
    it is truncated, which the runtimes detect. Any change that keeps the length counts as damage.

    Raises:
        OSError: the file, or the ``.bin`` beside it, cannot be read.
    """
    before, after = _DELIMITERS[path.suffix.lower()]
    size = path.stat().st_size - len(before) - _DIGITS - len(after)
    if size < 0:
        return True
    with path.open("rb") as file:
        file.seek(size)
        end = file.read()
    stored = end[len(before) : len(before) + _DIGITS]
    if end != before + stored + after:
        return True
    value = _checksum(path, size)
    return value == stored or value[:_LENGTH] != stored[:_LENGTH]


def _checksum(path: Path, size: int) -> bytes:
    """Return the length and CRC-32 of the first ``size`` bytes of a file and, for an ``.xml``, of its ``.bin``."""
    total, crc, remaining = 0, 0, size
    with path.open("rb") as file:
        while part := file.read(min(remaining, 1 << 20)):
            total, crc, remaining = total + len(part), zlib.crc32(part, crc), remaining - len(part)
    if path.suffix.lower() == ".xml":
        with path.with_suffix(".bin").open("rb") as file:
            while part := file.read(1 << 20):
                total, crc = total + len(part), zlib.crc32(part, crc)
    return f"{total:016x}{crc:08x}".encode()
