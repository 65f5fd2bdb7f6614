"""The folder of a bulk detection: its manifest, its plan, and one Parquet file of results for each finished unit."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from conditional_detr.distributed.units import RESULTS, Unit
from conditional_detr.system.atomic_files import encode_text
from conditional_detr.system.storage import child, is_file, is_folder, locate, read, remove, walk, write

if TYPE_CHECKING:
    from conditional_detr.inference.detections import Detections

MANIFEST, PLAN = "_manifest.json", "_plan.parquet"  # readers of Parquet folders leave out names with an underscore
_FORMAT = 1
_GROUP = 64  # units in a row group of the plan
_LONGEST = 300  # characters of settings or inputs in a message


def create(folder: str, units: Iterable[Unit], header: Mapping[str, Any], *, resume: bool, overwrite: bool) -> int:
    """Prepare a folder of results, and return its number of units.

    Args:
        folder: its path or URI.
        units: what is to be done; not read where a plan exists.
        header: settings and inputs, as JSON has them; compared with those of a job that is resumed.
        resume: go on with the job in this folder, if there is one.
        overwrite: remove its results first.

    Raises:
        OSError: the folder cannot be written.
        ValueError: it has results and neither is given, or those of other settings or inputs.
    """
    manifest = child(folder, MANIFEST)
    header = {"format": _FORMAT, **json.loads(json.dumps(header))}
    if overwrite:
        for name in (manifest, *(_file_of(folder, digest) for digest in finished(folder)), child(folder, PLAN)):
            remove(name)
    if is_file(manifest):
        if not resume:
            raise ValueError(f"{manifest}: already exists; --resume adds to these results, --overwrite replaces them")
        return _check_manifest(manifest, header)
    if finished(folder):
        raise ValueError(f"{folder}: expected no results without {MANIFEST}, got some; --overwrite replaces them")
    count = 0

    def write_plan(file: Any) -> None:
        nonlocal count
        count = _write_plan(file, units)

    write(child(folder, PLAN), write_plan)
    text = json.dumps({**header, "units": count}, indent=2) + "\n"
    write(manifest, lambda file: file.write(text.encode()))  # last: with it, the plan is complete
    return count


def _check_manifest(name: str, header: Mapping[str, Any]) -> int:
    """Return the number of units of a job; raise ValueError unless it has these settings and inputs."""
    try:
        found = dict(json.loads(read(name)))
        count = int(found.pop("units"))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{name}: expected the manifest of a bulk detection, got {error!r}") from error
    if found != header:
        names = [key for key in {**found, **header} if found.get(key) != header.get(key)]
        got = "; ".join(f"{key} {_shorten(found.get(key))}, not {_shorten(header.get(key))}" for key in names)
        raise ValueError(
            f"{name}: expected a job with the settings and inputs of this one, got {got}; --overwrite replaces its"
            " results, --output names another folder"
        )
    return count


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _write_plan(file: Any, units: Iterable[Unit]) -> int:
    """Write the plan and return the number of units; names are bytes, as a file system may have any."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = pa.schema([("names", pa.list_(pa.binary())), ("row_group", pa.int32())])
    count, rows = 0, []
    with ParquetWriter(file, schema, compression="zstd") as writer:
        for unit in units:
            count += 1
            rows.append({"names": [*map(os.fsencode, unit.names)], "row_group": unit.row_group})
            if len(rows) == _GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema))
    return count


def planned(folder: str) -> Iterator[Unit]:
    """Yield the units of a job, read from its plan as they are needed."""
    from pyarrow.parquet import ParquetFile

    filesystem, path = locate(child(folder, PLAN))
    with ParquetFile(filesystem.open_input_file(path)) as plan:
        for batch in plan.iter_batches(_GROUP):
            for row in batch.to_pylist():
                yield Unit(tuple(map(os.fsdecode, row["names"])), row["row_group"])


def finished(folder: str) -> set[str]:
    """Return the digests of the units that are done: those whose files are there, not those of jobs below."""
    files = walk(folder) if is_folder(folder) else ()
    matches = ((name, found[2]) for name in files if (found := RESULTS.search(name)))
    return {digest for name, digest in matches if name == _file_of(folder, digest)}


def _file_of(folder: str, digest: str) -> str:
    return child(folder, f"part={digest[:2]}", f"{digest}.parquet")


def write_results(
    folder: str, unit: Unit, keys: Sequence[str], outcomes: Sequence["Detections | Exception"]
) -> dict[str, Any]:
    """Write the results of a unit, a row for each image, and return their counts.

    Returns:
        {"images": number of rows, "objects": number of detections, "failed": number of rows with an error, "errors":
        the first few errors}.

    Raises:
        OSError: the file cannot be written.
    """
    from pyarrow.parquet import write_table

    table = as_table(keys, outcomes)
    write(_file_of(folder, unit.digest), lambda file: write_table(table, file, compression="zstd"))
    errors = [str(outcome) or repr(outcome) for outcome in outcomes if isinstance(outcome, Exception)]
    objects = sum(len(outcome) for outcome in outcomes if not isinstance(outcome, Exception))
    return {"images": len(outcomes), "objects": objects, "failed": len(errors), "errors": errors[:3]}


def as_table(keys: Sequence[str], outcomes: Sequence["Detections | Exception"]) -> Any:
    """Return detections as a ``pyarrow.Table``.

    Its columns are image; height, width in pixels; boxes (K, 4) x0 y0 x1 y1 in pixels, scores, labels (row of the
    class head), names, the highest score first; error. An image that failed has only its error.
    """
    import pyarrow as pa

    schema = pa.schema(
        [
            ("image", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
            ("scores", pa.list_(pa.float32())),
            ("labels", pa.list_(pa.int64())),
            ("names", pa.list_(pa.string())),
            ("error", pa.string()),
        ]
    )
    return pa.Table.from_pylist([_row(*pair) for pair in zip(keys, outcomes, strict=True)], schema)


def _row(key: str, outcome: "Detections | Exception") -> dict[str, Any]:
    """Return the row of an image; bytes of names that are no UTF-8 become escape sequences."""
    if isinstance(outcome, Exception):
        return {"image": encode_text(key), "error": encode_text(str(outcome) or repr(outcome))}
    return {
        "image": encode_text(key),
        "height": outcome.size[0],
        "width": outcome.size[1],
        "boxes": outcome.boxes.tolist(),
        "scores": outcome.scores.tolist(),
        "labels": outcome.labels.tolist(),
        "names": [*map(encode_text, outcome.names)],
    }
