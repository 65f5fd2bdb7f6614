"""Record of all that decides the numbers of a run, which its training state stores and a resumed run compares."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from conditional_detr.data.coco import Annotations
from conditional_detr.data.image_check import digest_of
from conditional_detr.modeling.architectures import ARCHITECTURES
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.modeling.metadata import Metadata, Preprocessing
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.consistency import MatchedClasses, parts_of
from conditional_detr.training.loader import SampleDataset

CHANGEABLE = (
    *("workers", "save_every", "epochs", "patience", "evaluate_every", "gradient_checkpointing", "max_bad_images"),
)
"""Settings that may change on resume. Any other setting would change the numbers of the run."""
ADDED: dict[str, Any] = {
    **{"time_limit": 0.0, "layer_decay": 1.0, "freeze": (), "balanced": False, "class_weights": None},
    **{"optimizer": "AdamW", "callbacks": [], "sharding": None},
}
"""Settings that states of earlier versions do not have, with the only values that there were."""
_DEFAULTS = {"architecture": asdict(Config()), "preprocessing": asdict(Preprocessing())}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def describe_run(
    model: DetectionTransformer,
    train_data: SampleDataset,
    val_data: SampleDataset | None,
    config: TrainConfig,
    criterion: Any,
    *,
    processes: int,
    optimizer: str,
    callbacks: list[str],
) -> dict[str, Any]:
    """Return all that decides the numbers of a run, by name, in types that a training state can store."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {
        **asdict(config),
        "criterion": _text(criterion),
        "class_weights": getattr(criterion.class_loss, "class_weights", None),
        "model": model.architecture,
        "architecture": asdict(model.config),
        "classes": list(model.metadata.class_names),
        "images": len(train_data),
        "processes": processes,
        "preprocessing": _plain(asdict(model.metadata.preprocessing)),
        "augmentation": _of_parts(train_data, "augmentation"),
        "data_seed": _of_parts(train_data, "seed"),
        "sharding": _of_parts(train_data, "sharding"),
        "annotations": _digest(train_data),
        "validation": None if val_data is None else _digest(val_data),
        "frozen_parameters": f"{len(frozen)} ({hashlib.sha256(repr(frozen).encode()).hexdigest()[:16]})",
        "optimizer": optimizer,
        "callbacks": callbacks,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def differences(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return each difference as "name got, not before", of the settings that may not change.

    Settings that ``before`` does not have are not compared; nor is the validation data if only one of them has some.
    """
    found = []
    for name, old in before.items():
        new = settings.get(name)
        if name in CHANGEABLE or (name == "validation" and None in (old, new)):
            continue
        if name in _DEFAULTS and isinstance(old, Mapping) and isinstance(new, Mapping):
            old = {**_plain(_DEFAULTS[name]), **old}
            fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
            found += [f"{name}.{field} {new.get(field)!r}, not {old.get(field)!r}" for field in fields]
        elif new != old:
            found.append(f"{name} {new!r}, not {old!r}")
    return found


def initial_model(state: Mapping[str, Any]) -> DetectionTransformer:
    """Return a model of the architecture and the metadata of a training state, with new weights."""
    settings = state["settings"]
    sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["preprocessing"].items()}
    preprocessing = Preprocessing(**sizes)
    metadata = Metadata(tuple(settings["classes"]), tuple(state["category_ids"]), preprocessing)
    return ARCHITECTURES[settings["model"]](Config(**settings["architecture"]), metadata)


def _digest(data: Any) -> str | None:
    """Return a digest of a dataset's annotations, in the order of a Subset or ConcatDataset; None if it has none."""
    if isinstance(data, MatchedClasses):
        return _digest(data.data)
    if not isinstance(data, Subset | ConcatDataset):
        annotations = getattr(data, "annotations", None)
        return digest_of(annotations) if isinstance(annotations, Annotations) else None
    parts, order = ([data.dataset], data.indices) if isinstance(data, Subset) else (data.datasets, ())
    digests = [_digest(part) for part in parts]
    if None in digests:
        return None
    return hashlib.sha256(repr((digests, [int(index) for index in order])).encode()).hexdigest()


def _of_parts(data: Any, name: str) -> Any:
    """Return an attribute of a dataset as text, None if it has none; a list if the dataset has several parts."""
    values = [None if (value := getattr(part, name, None)) is None else _text(value) for part in parts_of(data)]
    return values[0] if len(values) == 1 else values


def _text(value: Any) -> str:
    """Return the repr of a value without its address in memory."""
    return _ADDRESS.sub("", repr(value))


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with lists instead of tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
