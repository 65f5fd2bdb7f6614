"""Read and write ``config.json`` and the authors' training arguments.

Reading accepts all forms that transformers has written; writing uses a form that transformers reads as the same
network. An unsupported setting that changes the numbers is an error and never ignored.
"""

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from conditional_detr.checkpoints.labels import COCO_NAMES, UNUSED
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.checkpoints.preprocessor_config import read_preprocessor
from conditional_detr.modeling.architectures import ARCHITECTURES
from conditional_detr.modeling.backbone import Backbone
from conditional_detr.modeling.config import Config
from conditional_detr.modeling.metadata import Metadata, Preprocessing

_log = logging.getLogger(__name__)

NOT_IN_SHAPES = {"heads": "nheads", "backbone": "backbone", "dilation": "dilation", "dropout": "dropout"}
"""Settings that cannot be inferred from tensor shapes: the Config's name, the authors' argument."""

_IN_SHAPES = {  # settings that can be inferred from tensor shapes
    "width": "hidden_dim",
    "encoder_layers": "enc_layers",
    "decoder_layers": "dec_layers",
    "feedforward": "dim_feedforward",
    "num_queries": "num_queries",
}
_CLASSES = {"conditional_detr": "ConditionalDetrForObjectDetection", "detr": "DetrForObjectDetection"}
_MOST_STAGES = 100
_OUT_INDICES = [1, 2, 3, 4]  # transformers' default for timm backbones; the last is used
_RESNETS = {  # block, blocks per stage -> timm's name
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


def read_config(json: Mapping[str, Any], path: str, architecture: str = "conditional_detr") -> Config:
    """Convert a ``config.json`` to a Config.

    Args:
        json: the parsed file.
        path: the file's path, for messages.
        architecture: name of the architecture.

    Raises:
        ValueError: the file is of another model, or of a network that this library does not build.
    """
    _expect(json, "model_type", architecture, path)
    _expect(json, "position_embedding_type", "sine", path)
    _expect(json, "activation_function", "relu", path)
    _expect(json, "num_channels", 3, path)
    for part in ("attention_heads", "ffn_dim"):
        encoder, decoder = json.get(f"encoder_{part}"), json.get(f"decoder_{part}")
        if encoder != decoder:
            raise ValueError(f"{path}: expected equal encoder_{part} and decoder_{part}, got {encoder} and {decoder}")
    backbone, stage, dilation = _read_backbone(json, path)
    default = ARCHITECTURES[architecture].default_config
    names = _read_names(json, path)
    try:
        return Config(
            num_classes=len(names),
            num_queries=json.get("num_queries", default.num_queries),
            width=json.get("d_model", default.width),
            heads=_typed(json, "encoder_attention_heads", int, default.heads, path),
            encoder_layers=json.get("encoder_layers", default.encoder_layers),
            decoder_layers=json.get("decoder_layers", default.decoder_layers),
            feedforward=_typed(json, "encoder_ffn_dim", int, default.feedforward, path),
            dropout=json.get("dropout", default.dropout),
            backbone=backbone,
            backbone_stage=stage,
            dilation=dilation,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_metadata(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, path: str, preprocessor_path: str
) -> Metadata:
    """Convert the class names of a ``config.json`` and, if given, a ``preprocessor_config.json`` to Metadata.

    Raises:
        ValueError: duplicate category ids, class numbers with gaps, or unsupported preprocessing.
    """
    names, ids = _read_classes(config, path)
    preprocessing = Preprocessing() if preprocessor is None else read_preprocessor(preprocessor, preprocessor_path)
    try:
        return Metadata(names, ids, preprocessing)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_config(architecture: str, config: Config, metadata: Metadata) -> dict[str, Any]:
    """Return the content of the ``config.json`` that transformers reads as this network."""
    names = [UNUSED if name is None else name for name in metadata.class_names]
    return {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "dtype": "float32",
        "activation_function": "relu",
        # one rate everywhere, as the authors train
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        "auxiliary_loss": False,
        "backbone_config": {
            "model_type": "timm_backbone",
            "backbone": config.backbone,
            "out_indices": [config.backbone_stage],
            "output_stride": _output_stride(config) if config.dilation else None,
            "features_only": True,
            "use_pretrained_backbone": False,
            "num_channels": 3,
        },
        # transformers keeps these two when it trains other classes; class_names then differ from id2label
        "category_ids": list(metadata.category_ids),
        "class_names": list(metadata.class_names),
        "d_model": config.width,
        "decoder_attention_heads": config.heads,
        "decoder_ffn_dim": config.feedforward,
        "decoder_layers": config.decoder_layers,
        "dilation": config.dilation,
        "encoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.feedforward,
        "encoder_layers": config.encoder_layers,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "is_encoder_decoder": True,
        "label2id": {name: i for i, name in enumerate(names)},
        "num_channels": 3,
        "num_queries": config.num_queries,
        "position_embedding_type": "sine",
    }


def read_arguments(arguments: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the settings of a Config that the authors' training arguments contain and tensor shapes do not.

    Raises:
        ValueError: a network that this library does not build.
    """
    positions, pre_norm = arguments.get("position_embedding", "sine"), arguments.get("pre_norm", False)
    if positions not in ("sine", "v2") or pre_norm:
        raise ValueError(
            f"{path}: expected sine positions and no pre_norm, got position_embedding {positions!r}"
            f" and pre_norm {pre_norm!r}"
        )
    return {setting: arguments[argument] for setting, argument in NOT_IN_SHAPES.items() if argument in arguments}


def write_arguments(config: Config) -> Namespace:
    """Return the authors' training arguments that build this network."""
    values = {argument: getattr(config, setting) for setting, argument in (NOT_IN_SHAPES | _IN_SHAPES).items()}
    return Namespace(**values, position_embedding="sine", pre_norm=False)


def default_metadata(num_classes: int) -> Metadata:
    """Return the metadata assumed without a ``config.json``: COCO's names if the number of classes is COCO's."""
    return Metadata(COCO_NAMES) if num_classes == len(COCO_NAMES) else Metadata.numbered(num_classes)


def _typed(json: Mapping[str, Any], field: str, kind: type, default: Any, path: str) -> Any:
    """Return the value of a field, or the default if it is missing or null."""
    value = json.get(field)
    if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise ValueError(f"{path}: expected {field} as {kind.__name__}, got {value!r}")
    return default if value is None else value


def _expect(json: Mapping[str, Any], field: str, expected: Any, path: str) -> None:
    if (got := json.get(field, expected)) != expected:
        raise ValueError(f"{path}: expected {field} {expected!r}, got {got!r}")


def _read_names(json: Mapping[str, Any], path: str) -> list[str]:
    """Return the class names in the order of the class head's rows."""
    names = _typed(json, "id2label", dict, None, path)
    if names is None:
        count = _typed(json, "num_labels", int, Config().num_classes, path)
        try:
            return [f"LABEL_{i}" for i in range(Config(num_classes=count).num_classes)]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if not all(isinstance(name, str | int) for name in names.values()):
        raise ValueError(f"{path}: expected id2label with names as strings, got {names}")
    if {str(i) for i in range(len(names))} != {str(key) for key in names}:
        raise ValueError(
            f"{path}: expected id2label with the {len(names)} keys 0..{len(names) - 1}, got {sorted(names)}"
        )
    by_number = {int(key): str(name) for key, name in names.items()}
    return [by_number[i] for i in range(len(names))]


def _read_classes(json: Mapping[str, Any], path: str) -> tuple[tuple[str | None, ...], tuple[int, ...]]:
    """Return the class names, None for unused rows, and the category ids; no ids stand for 0, 1, 2, ...

    ``class_names`` are the names that ``category_ids`` were written for. The published file has neither: there, the
    rows of the ids that COCO does not use are called "N/A".
    """
    names = tuple(_read_names(json, path))
    ids = tuple(_typed(json, "category_ids", list, [], path))
    written_for = tuple(_typed(json, "class_names", list, [], path))
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        raise ValueError(f"{path}: expected category_ids as a list of integers, got {list(ids)}")
    if written_for and tuple(UNUSED if name is None else name for name in written_for) == names:
        return written_for, ids
    if ids and not written_for and len(ids) == len(names):  # as version 0.1.0 wrote it
        if "transformers_version" in json:
            _log.warning("%s: saved by transformers; category_ids may belong to other classes", path)
        return tuple(None if name == UNUSED else name for name in names), ids
    if ids and ids != tuple(range(len(names))):
        _log.warning("%s: category_ids were written for other classes; using 0, 1, 2, ...", path)
    unused = {i for i, name in enumerate(names) if name == UNUSED}
    if len(names) != len(COCO_NAMES) or unused != {i for i, name in enumerate(COCO_NAMES) if name is None}:
        return names, ()
    return tuple(None if name == UNUSED else name for name in names), ()


def _read_backbone(json: Mapping[str, Any], path: str) -> tuple[str, int, bool]:
    """Return the backbone's name, stage and dilation from any of the forms that transformers has written."""
    backbone_config = _typed(json, "backbone_config", dict, {}, path)
    options = _typed(json, "backbone_kwargs", dict, {}, path)
    kind = backbone_config.get("model_type", "timm_backbone")
    if kind == "timm_backbone":
        name = _typed(backbone_config, "backbone", str, None, path) or _typed(json, "backbone", str, "resnet50", path)
    elif kind == "resnet":
        name = _read_transformers_resnet(backbone_config, path)
    else:
        raise ValueError(f"{path}: expected a backbone_config of model_type timm_backbone or resnet, got {kind!r}")
    indices, stride = (
        _typed(backbone_config, field, kind, None, path) or _typed(options, field, kind, default, path)
        for field, kind, default in (("out_indices", list, _OUT_INDICES), ("output_stride", int, None))
    )
    if not indices or not all(isinstance(index, int) and index >= 0 for index in indices):
        raise ValueError(f"{path}: expected out_indices counted from 0, got {indices}")
    stage = max(indices)
    if stage > _MOST_STAGES:
        raise ValueError(f"{path}: expected out_indices of at most {_MOST_STAGES}, got {stage}")
    dilation = _typed(json, "dilation", bool, False, path)
    if dilation and backbone_config and stride is None:
        raise ValueError(
            f"{path}: expected an output_stride in backbone_config with dilation true, got none; transformers runs"
            " this network undilated: set dilation to false, or output_stride to half the backbone's stride"
        )
    if stride is not None:
        full = _full_stride(name, stage)
        if (stride < full and stride != full // 2) or (dilation and stride >= full):
            raise ValueError(
                f"{path}: expected an output_stride of {full}, or {full // 2} for dilation,"
                f" got {stride} and dilation {dilation}"
            )
        dilation = stride < full
    return name, stage, dilation


def _read_transformers_resnet(backbone_config: Mapping[str, Any], path: str) -> str:
    """Return timm's name of the ResNet that transformers' own ``backbone_config`` describes."""
    block = _typed(backbone_config, "layer_type", str, "bottleneck", path)
    blocks = tuple(_typed(backbone_config, "depths", list, [3, 4, 6, 3], path))
    sizes = [64, 128, 256, 512] if block == "basic" else [256, 512, 1024, 2048]
    _expect(backbone_config, "embedding_size", 64, path)
    _expect(backbone_config, "hidden_sizes", sizes, path)
    _expect(backbone_config, "hidden_act", "relu", path)
    _expect(backbone_config, "downsample_in_bottleneck", False, path)
    _expect(backbone_config, "downsample_in_first_stage", False, path)
    if (block, blocks) not in [*_RESNETS]:  # a list: the blocks may not be hashable
        raise ValueError(f"{path}: expected a ResNet of {sorted(_RESNETS.values())}, got {block} blocks {blocks}")
    return _RESNETS[block, blocks]


def _full_stride(backbone: str, stage: int) -> int:
    """Return the stride of a backbone's stage without dilation."""
    if backbone in _RESNETS.values():  # known without building one
        return int(2 ** (stage + 1))
    with MetaInit():
        return Backbone(backbone, stage=stage, dilation=False).stride


def _output_stride(config: Config) -> int:
    """Return the stride of a dilated backbone."""
    return _full_stride(config.backbone, config.backbone_stage) // 2
