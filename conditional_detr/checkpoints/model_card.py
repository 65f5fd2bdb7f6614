"""Read the licence of a checkpoint from the README.md beside it."""

from pathlib import Path
from typing import Any

from conditional_detr.checkpoints.files import shipped_folder

_README = "README.md"
_OTHER = "other"  # the hub's word for a licence that "license_name" names


def read_licence(weights: str | Path) -> str | None:
    """Return the licence that the front matter of a model card states.

    Args:
        weights: a folder or a file with a README.md beside it, or the name of shipped weights.

    Returns:
        The licence as the card has it, such as "apache-2.0"; None without a card, or if it states none.

    Raises:
        ValueError: the front matter is no YAML.
    """
    path = Path(weights).expanduser()
    folder = path if path.is_dir() else path.parent if path.is_file() else shipped_folder(str(weights))
    if folder is None or not (folder / _README).is_file():
        return None
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        stated: dict[str, Any] = metadata_load(folder / _README) or {}
    except (YAMLError, ValueError) as error:
        raise ValueError(f"{folder / _README}: expected front matter in YAML: {error}") from error
    licence = stated.get("license")
    if licence == _OTHER:
        licence = stated.get("license_name", licence)
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    return None if licence is None else str(licence)
