"""Checksums of exported files, at their ends, where runtimes pass over them."""

import zlib
from pathlib import Path

_KEY = b"conditional_detr.checksum"
_LENGTH = 16  # digits of a value that tell how many bytes there are
_DIGITS = _LENGTH + 8  # and those of their CRC-32, all hexadecimal


def _onnx_entry() -> bytes:
    """Return what stands before the value in an ``.onnx``: one more entry of the model's ``metadata_props``.

    Messages of protocol buffers may be continued: fields that repeat are appended to, wherever they stand.
    """
    key = bytes([1 << 3 | 2, len(_KEY)]) + _KEY  # field 1, bytes
    value = bytes([2 << 3 | 2, _DIGITS])  # field 2, bytes
    return bytes([14 << 3 | 2, len(key) + len(value) + _DIGITS]) + key + value  # field 14, a message


_AROUND = {".onnx": (_onnx_entry(), b""), ".xml": (b"<!-- " + _KEY + b" ", b" -->\n")}
"""What stands before and after the value."""


def seal(path: Path) -> None:
    """Append its checksum to an ``.onnx``, or to an ``.xml`` that of it and of the ``.bin`` beside it."""
    before, after = _AROUND[path.suffix]
    value = _value(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(before + value + after)


def is_whole(path: Path) -> bool:
    """Return whether a file is what was sealed, as far as can be told.

    Of a file that was never sealed it cannot, nor of one of another length than was sealed, which other programs have
    written anew, or from which something is missing that runtimes miss as well. A change that keeps the length, by
    whatever program, is taken for damage.

    Raises:
        OSError: it cannot be read, or the ``.bin`` beside it.
    """
    before, after = _AROUND[path.suffix.lower()]
    size = path.stat().st_size - len(before) - _DIGITS - len(after)
    if size < 0:
        return True
    with path.open("rb") as file:
        file.seek(size)
        end = file.read()
    found = end[len(before) : len(before) + _DIGITS]
    if end != before + found + after:
        return True
    value = _value(path, size)
    return value == found or value[:_LENGTH] != found[:_LENGTH]


def _value(path: Path, size: int) -> bytes:
    """Return the checksum of the first bytes of a file, and of the whole ``.bin`` beside an ``.xml``."""
    total, crc, left = 0, 0, size
    with path.open("rb") as file:
        while part := file.read(min(left, 1 << 20)):
            total, crc, left = total + len(part), zlib.crc32(part, crc), left - len(part)
    if path.suffix.lower() == ".xml":
        with path.with_suffix(".bin").open("rb") as file:
            while part := file.read(1 << 20):
                total, crc = total + len(part), zlib.crc32(part, crc)
    return f"{total:016x}{crc:08x}".encode()
