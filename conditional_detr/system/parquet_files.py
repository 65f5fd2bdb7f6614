"""Open Parquet files with images, on this machine or in an object store."""

from typing import Any

from conditional_detr.system.storage import locate


def open_parquet(name: str) -> Any:
    """Return the ``pyarrow.parquet.ParquetFile`` of a path or URI.

    Raises:
        OSError: it cannot be read, or is no Parquet file.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    filesystem, path = locate(name)
    try:
        return ParquetFile(filesystem.open_input_file(path))
    except ArrowInvalid as error:
        raise OSError(f"{name}: expected a Parquet file: {error}") from error


def image_column(name: str, schema: Any) -> str:
    """Return the column with the bytes of images: a binary one, or one of structs with ``bytes``, as of Hugging Face.

    Raises:
        ValueError: there is none, or there are several and none is called "image" or "bytes".
    """
    from pyarrow import types

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found = {field.name: field.name for field in schema if is_binary(field.type)}
    for field in schema:
        if types.is_struct(field.type) and any(
            part.name == "bytes" and is_binary(part.type) for part in field.type.fields
        ):
            found[field.name] = f"{field.name}.bytes"
    for preferred in ("image", "bytes", *(found if len(found) == 1 else ())):
        if preferred in found:
            return found[preferred]
    raise ValueError(
        f"{name}: expected a column 'image' or 'bytes' with the bytes of image files, got {', '.join(schema.names)}"
    )


def image_bytes(values: Any) -> list[bytes | None]:
    """Return the bytes of a column that :func:`image_column` names; None: a row has none."""
    from pyarrow import types

    found: list[bytes | None] = (values.field("bytes") if types.is_struct(values.type) else values).to_pylist()
    return found
