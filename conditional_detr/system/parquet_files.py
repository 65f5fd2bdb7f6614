"""Open Parquet files with images, on this machine or in an object store."""

from typing import Any

from conditional_detr.system.storage import locate


def check_pyarrow() -> None:
    """Raise ModuleNotFoundError, with what to install, unless pyarrow is installed."""
    try:
        import pyarrow  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Parquet files need {error.name}, which is not installed: pip install 'conditional-detr[parquet]'"
        ) from error


def open_parquet(name: str, footer: Any = None) -> Any:
    """Return the ``pyarrow.parquet.ParquetFile`` of a path or URI.

    Args:
        name: the path or URI.
        footer: its ``metadata``, from an earlier call, so that it is not read again.

    Raises:
        OSError: it cannot be read, or is no Parquet file.
    """
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    filesystem, path = locate(name)
    try:
        return ParquetFile(filesystem.open_input_file(path), metadata=footer)
    except ArrowInvalid as error:
        raise OSError(f"{name}: expected a Parquet file: {error}") from error


def image_column(name: str, schema: Any) -> str:
    """Return the column with the bytes of images: a binary one, or one of structs with ``bytes``, as of Hugging Face.

    Raises:
        ValueError: there is none, or there are several and none is called "image" or "bytes", or one that is has
            something else.
    """
    from pyarrow import types

    def is_binary(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))

    found = {field.name: field.name for field in schema if is_binary(field.type)}
    for field in schema:
        if types.is_struct(field.type) and any(
            part.name == "bytes" and is_binary(part.type) for part in field.type.fields
        ):
            found[field.name] = f"{field.name}.bytes"
    named = [name for name in ("image", "bytes") if name in schema.names]
    for name_of_column in named or (found if len(found) == 1 else ()):
        if name_of_column in found:
            return found[name_of_column]
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(f"{name}: expected a column 'image' or 'bytes' with the bytes of image files, got {columns}")


def image_bytes(values: Any) -> list[bytes | None]:
    """Return the bytes of a column that :func:`image_column` names; None: a row has none."""
    from pyarrow import types

    found: list[bytes | None] = (values.field("bytes") if types.is_struct(values.type) else values).to_pylist()
    return found
