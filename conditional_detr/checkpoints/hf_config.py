"""``config.json`` and ``preprocessor_config.json``, as transformers writes and wrote them, and the authors' args.

Reading understands every shape the files have had; writing uses the one that transformers reads back to the same
network. A setting that would change the numbers and that this library does not have is an error, never ignored.
"""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from conditional_detr.checkpoints.labels import COCO_NAMES, UNUSED
from conditional_detr.checkpoints.meta_init import MetaInit
from conditional_detr.modeling.backbone import Backbone
from conditional_detr.modeling.conditional_detr import Config
from conditional_detr.modeling.metadata import Metadata, Preprocessing

UNSEEN = {"heads": "nheads", "backbone": "backbone", "dilation": "dilation", "dropout": "dropout"}
"""What no tensor's shape tells of the architecture: our setting, the authors' argument."""

_SEEN = {  # what the shapes tell as well
    "width": "hidden_dim",
    "encoder_layers": "enc_layers",
    "decoder_layers": "dec_layers",
    "feedforward": "dim_feedforward",
    "num_queries": "num_queries",
}
_OUT_INDICES = [1, 2, 3, 4]  # transformers' default for timm backbones; the last is used
_RESNETS = {  # block, blocks per stage -> timm's name
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
    ("bottleneck", (3, 8, 36, 3)): "resnet152",
}


def read_config(json: Mapping[str, Any], where: str) -> Config:
    """Translate a ``config.json`` into a Config.

    Args:
        json: the parsed file.
        where: its name, for messages.

    Raises:
        ValueError: another model's file, or a network this library does not build.
    """
    _expect(json, "model_type", "conditional_detr", where)
    _expect(json, "position_embedding_type", "sine", where)
    _expect(json, "activation_function", "relu", where)
    _expect(json, "num_channels", 3, where)
    for part in ("attention_heads", "ffn_dim"):
        encoder, decoder = json.get(f"encoder_{part}"), json.get(f"decoder_{part}")
        if encoder != decoder:
            raise ValueError(f"{where}: expected encoder_{part} and decoder_{part} alike, got {encoder} and {decoder}")
    backbone, stage, dilation = _read_backbone(json, where)
    default = Config()
    try:
        return Config(
            num_classes=len(_read_names(json, where)),
            num_queries=json.get("num_queries", default.num_queries),
            width=json.get("d_model", default.width),
            heads=json.get("encoder_attention_heads") or default.heads,
            encoder_layers=json.get("encoder_layers", default.encoder_layers),
            decoder_layers=json.get("decoder_layers", default.decoder_layers),
            feedforward=json.get("encoder_ffn_dim") or default.feedforward,
            dropout=json.get("dropout", default.dropout),
            backbone=backbone,
            backbone_stage=stage,
            dilation=dilation,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def read_metadata(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None, where: str, preprocessor_where: str
) -> Metadata:
    """Translate the names of a ``config.json`` and, if there is one, a ``preprocessor_config.json``.

    Raises:
        ValueError: names or ids that stand twice or have gaps, or preprocessing this library does not do.
    """
    names = tuple(None if name == UNUSED else name for name in _read_names(config, where))
    preprocessing = Preprocessing() if preprocessor is None else _read_preprocessing(preprocessor, preprocessor_where)
    try:
        return Metadata(names, tuple(config.get("category_ids", ())), preprocessing)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def write_config(config: Config, metadata: Metadata) -> dict[str, Any]:
    """Return the ``config.json`` that transformers reads as this network."""
    names = [UNUSED if name is None else name for name in metadata.class_names]
    return {
        "architectures": ["ConditionalDetrForObjectDetection"],
        "model_type": "conditional_detr",
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
        "category_ids": list(metadata.category_ids),
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


def read_arguments(arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what the authors' training arguments tell of a Config and the tensors do not.

    Raises:
        ValueError: a network this library does not build.
    """
    positions, pre_norm = arguments.get("position_embedding", "sine"), arguments.get("pre_norm", False)
    if positions not in ("sine", "v2") or pre_norm:
        raise ValueError(
            f"{where}: expected sine positions and no pre_norm, got position_embedding {positions!r}"
            f" and pre_norm {pre_norm!r}"
        )
    return {ours: arguments[theirs] for ours, theirs in UNSEEN.items() if theirs in arguments}


def write_arguments(config: Config) -> Namespace:
    """Return the authors' training arguments that build this network."""
    settings = {theirs: getattr(config, ours) for ours, theirs in (UNSEEN | _SEEN).items()}
    return Namespace(**settings, position_embedding="sine", pre_norm=False)


def default_metadata(num_classes: int) -> Metadata:
    """Return what is assumed of weights that no ``config.json`` describes: COCO's names if the number is COCO's."""
    return Metadata(COCO_NAMES) if num_classes == len(COCO_NAMES) else Metadata.numbered(num_classes)


def write_preprocessor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return the ``preprocessor_config.json`` of these numbers."""
    return {
        "image_processor_type": "ConditionalDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {
            "shortest_edge": preprocessing.shortest_edge,
            "longest_edge": preprocessing.longest_edge,
        },
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
        "do_pad": True,
    }


def _expect(json: Mapping[str, Any], field: str, expected: Any, where: str) -> None:
    if (got := json.get(field, expected)) != expected:
        raise ValueError(f"{where}: expected {field} {expected!r}, got {got!r}")


def _read_names(json: Mapping[str, Any], where: str) -> list[str]:
    """Return the class names in the order of their rows."""
    names = json.get("id2label")
    if names is None:
        return [f"LABEL_{i}" for i in range(json.get("num_labels", Config().num_classes))]
    if {str(i) for i in range(len(names))} != {str(key) for key in names}:
        raise ValueError(
            f"{where}: expected id2label to number its {len(names)} names 0..{len(names) - 1}, got {sorted(names)}"
        )
    by_number = {int(key): str(name) for key, name in names.items()}
    return [by_number[i] for i in range(len(names))]


def _read_backbone(json: Mapping[str, Any], where: str) -> tuple[str, int, bool]:
    """Return the backbone's name, stage and dilation from any of the forms they have had."""
    described = json.get("backbone_config") or {}
    options = json.get("backbone_kwargs") or {}
    kind = described.get("model_type", "timm_backbone")
    if kind == "timm_backbone":
        name = described.get("backbone") or json.get("backbone") or "resnet50"
    elif kind == "resnet":
        name = _read_transformers_resnet(described, where)
    else:
        raise ValueError(f"{where}: expected a backbone_config of model_type timm_backbone or resnet, got {kind!r}")
    indices = described.get("out_indices") or options.get("out_indices") or _OUT_INDICES
    stage = max(indices)
    if min(indices) < 0:
        raise ValueError(f"{where}: expected out_indices counted from 0, got {indices}")
    stride = described.get("output_stride") or options.get("output_stride")
    dilation = bool(json.get("dilation", False))
    if dilation and described and stride is None:
        raise ValueError(
            f"{where}: dilation is true, but backbone_config has no output_stride, so that transformers runs this"
            " network undilated; set dilation to false, or output_stride to half the backbone's stride, as is meant"
        )
    if stride is not None:
        full = _full_stride(name, stage)
        if (stride < full and stride != full // 2) or (dilation and stride >= full):
            raise ValueError(
                f"{where}: expected an output_stride of {full}, or {full // 2} for dilation,"
                f" got {stride} and dilation {dilation}"
            )
        dilation = stride < full
    return name, stage, dilation


def _read_transformers_resnet(described: Mapping[str, Any], where: str) -> str:
    """Return timm's name of the backbone that transformers' own ResNet describes."""
    block, blocks = described.get("layer_type", "bottleneck"), tuple(described.get("depths", (3, 4, 6, 3)))
    sizes = [64, 128, 256, 512] if block == "basic" else [256, 512, 1024, 2048]
    _expect(described, "embedding_size", 64, where)
    _expect(described, "hidden_sizes", sizes, where)
    _expect(described, "hidden_act", "relu", where)
    _expect(described, "downsample_in_bottleneck", False, where)
    _expect(described, "downsample_in_first_stage", False, where)
    if (block, blocks) not in _RESNETS:
        raise ValueError(f"{where}: expected a ResNet of {sorted(_RESNETS.values())}, got {block} blocks {blocks}")
    return _RESNETS[block, blocks]


def _full_stride(backbone: str, stage: int) -> int:
    """Return the stride of a backbone's stage without dilation; of the ResNets, without building one."""
    if backbone in _RESNETS.values():
        return int(2 ** (stage + 1))
    with MetaInit():
        return Backbone(backbone, stage=stage, dilation=False).stride


def _output_stride(config: Config) -> int:
    """Return the stride of a dilated backbone."""
    return _full_stride(config.backbone, config.backbone_stage) // 2


def _read_preprocessing(json: Mapping[str, Any], where: str) -> Preprocessing:
    """Translate a ``preprocessor_config.json``, old (size 800, max_size 1333) or new."""
    for field in ("do_resize", "do_normalize", "do_rescale"):
        _expect(json, field, True, where)
    _expect(json, "resample", 2, where)  # PIL's bilinear
    if abs(json.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError(f"{where}: expected rescale_factor 1/255, got {json['rescale_factor']}")
    default = Preprocessing()
    size = json.get("size", default.shortest_edge)
    if not isinstance(size, Mapping):
        size = {"shortest_edge": size}
    size = {"longest_edge": json.get("max_size", default.longest_edge), **size}
    if set(size) != {"shortest_edge", "longest_edge"}:
        raise ValueError(f"{where}: expected a size of shortest_edge and longest_edge, got {json['size']}")
    try:
        return Preprocessing(
            shortest_edge=int(size["shortest_edge"]),
            longest_edge=int(size["longest_edge"]),
            mean=tuple(json.get("image_mean", default.mean)),
            std=tuple(json.get("image_std", default.std)),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
