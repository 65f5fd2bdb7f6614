"""Map native parameter names to the names in each published checkpoint format.

The tables have one row per parameter of the native models and one column per name format. ``*`` is the layer index;
``.weight`` and ``.bias`` are appended. The authors store the query, key and value projections of the encoder, and those
of DETR's decoder, in one tensor for the weight and one for the bias: ``{p}`` is "weight" or "bias", and ``#0 #1 #2``
are the thirds of its rows.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

NameFormat = Literal["published", "transformers5", "original"]
FileFormat = Literal["native", "published", "transformers5", "original"]  # native: a model's own state_dict()

# fmt: off
_SHARED: tuple[tuple[str, str, str, str], ...] = (
    # native                                   published                                  transformers5                                      original
    ("projection",                             "model.input_projection",                  "model.input_projection",                          "input_proj"),
    ("object_queries",                         "model.query_position_embeddings",         "model.query_position_embeddings",                 "query_embed"),
    ("class_head",                             "class_labels_classifier",                 "class_labels_classifier",                         "class_embed"),
    ("box_head.layers.*",                      "bbox_predictor.layers.*",                 "bbox_predictor.layers.*",                         "bbox_embed.layers.*"),
    ("encoder.layers.*.self_attention.query",  "model.encoder.layers.*.self_attn.q_proj", "model.encoder.layers.*.self_attn.q_proj",         "transformer.encoder.layers.*.self_attn.in_proj_{p}#0"),
    ("encoder.layers.*.self_attention.key",    "model.encoder.layers.*.self_attn.k_proj", "model.encoder.layers.*.self_attn.k_proj",         "transformer.encoder.layers.*.self_attn.in_proj_{p}#1"),
    ("encoder.layers.*.self_attention.value",  "model.encoder.layers.*.self_attn.v_proj", "model.encoder.layers.*.self_attn.v_proj",         "transformer.encoder.layers.*.self_attn.in_proj_{p}#2"),
    ("encoder.layers.*.self_attention.output", "model.encoder.layers.*.self_attn.out_proj", "model.encoder.layers.*.self_attn.o_proj",       "transformer.encoder.layers.*.self_attn.out_proj"),
    ("encoder.layers.*.self_attention_norm",   "model.encoder.layers.*.self_attn_layer_norm", "model.encoder.layers.*.self_attn_layer_norm", "transformer.encoder.layers.*.norm1"),
    ("encoder.layers.*.feedforward.hidden",    "model.encoder.layers.*.fc1",              "model.encoder.layers.*.mlp.fc1",                  "transformer.encoder.layers.*.linear1"),
    ("encoder.layers.*.feedforward.output",    "model.encoder.layers.*.fc2",              "model.encoder.layers.*.mlp.fc2",                  "transformer.encoder.layers.*.linear2"),
    ("encoder.layers.*.feedforward_norm",      "model.encoder.layers.*.final_layer_norm", "model.encoder.layers.*.final_layer_norm",         "transformer.encoder.layers.*.norm2"),
    ("decoder.norm",                           "model.decoder.layernorm",                 "model.decoder.layernorm",                         "transformer.decoder.norm"),
    ("decoder.layers.*.self_attention.output",         "model.decoder.layers.*.self_attn.out_proj", "model.decoder.layers.*.self_attn.o_proj",         "transformer.decoder.layers.*.self_attn.out_proj"),
    ("decoder.layers.*.self_attention_norm",           "model.decoder.layers.*.self_attn_layer_norm", "model.decoder.layers.*.self_attn_layer_norm",   "transformer.decoder.layers.*.norm1"),
    ("decoder.layers.*.cross_attention_norm",          "model.decoder.layers.*.encoder_attn_layer_norm", "model.decoder.layers.*.encoder_attn_layer_norm", "transformer.decoder.layers.*.norm2"),
    ("decoder.layers.*.feedforward.hidden",    "model.decoder.layers.*.fc1",              "model.decoder.layers.*.mlp.fc1",                  "transformer.decoder.layers.*.linear1"),
    ("decoder.layers.*.feedforward.output",    "model.decoder.layers.*.fc2",              "model.decoder.layers.*.mlp.fc2",                  "transformer.decoder.layers.*.linear2"),
    ("decoder.layers.*.feedforward_norm",      "model.decoder.layers.*.final_layer_norm", "model.decoder.layers.*.final_layer_norm",         "transformer.decoder.layers.*.norm3"),
)

_CONDITIONAL_DETR: tuple[tuple[str, str, str, str], ...] = (
    # native                                   published                                  transformers5                                      original
    ("decoder.reference_point.layers.*",       "model.decoder.ref_point_head.layers.*",   "model.decoder.ref_point_head.layers.*",           "transformer.decoder.ref_point_head.layers.*"),
    ("decoder.transformation.layers.*",        "model.decoder.query_scale.layers.*",      "model.decoder.query_scale.layers.*",              "transformer.decoder.query_scale.layers.*"),
    ("decoder.layers.*.self_attention.content_query",  "model.decoder.layers.*.sa_qcontent_proj",   "model.decoder.layers.*.self_attn.q_content_proj", "transformer.decoder.layers.*.sa_qcontent_proj"),
    ("decoder.layers.*.self_attention.position_query", "model.decoder.layers.*.sa_qpos_proj",       "model.decoder.layers.*.self_attn.q_pos_proj",     "transformer.decoder.layers.*.sa_qpos_proj"),
    ("decoder.layers.*.self_attention.content_key",    "model.decoder.layers.*.sa_kcontent_proj",   "model.decoder.layers.*.self_attn.k_content_proj", "transformer.decoder.layers.*.sa_kcontent_proj"),
    ("decoder.layers.*.self_attention.position_key",   "model.decoder.layers.*.sa_kpos_proj",       "model.decoder.layers.*.self_attn.k_pos_proj",     "transformer.decoder.layers.*.sa_kpos_proj"),
    ("decoder.layers.*.self_attention.value",          "model.decoder.layers.*.sa_v_proj",          "model.decoder.layers.*.self_attn.v_proj",         "transformer.decoder.layers.*.sa_v_proj"),
    ("decoder.layers.*.cross_attention.content_query", "model.decoder.layers.*.ca_qcontent_proj",   "model.decoder.layers.*.encoder_attn.q_content_proj",  "transformer.decoder.layers.*.ca_qcontent_proj"),
    ("decoder.layers.*.cross_attention.object_query",  "model.decoder.layers.*.ca_qpos_proj",       "model.decoder.layers.*.encoder_attn.q_pos_proj",      "transformer.decoder.layers.*.ca_qpos_proj"),
    ("decoder.layers.*.cross_attention.spatial_query", "model.decoder.layers.*.ca_qpos_sine_proj",  "model.decoder.layers.*.encoder_attn.q_pos_sine_proj", "transformer.decoder.layers.*.ca_qpos_sine_proj"),
    ("decoder.layers.*.cross_attention.content_key",   "model.decoder.layers.*.ca_kcontent_proj",   "model.decoder.layers.*.encoder_attn.k_content_proj",  "transformer.decoder.layers.*.ca_kcontent_proj"),
    ("decoder.layers.*.cross_attention.spatial_key",   "model.decoder.layers.*.ca_kpos_proj",       "model.decoder.layers.*.encoder_attn.k_pos_proj",      "transformer.decoder.layers.*.ca_kpos_proj"),
    ("decoder.layers.*.cross_attention.value",         "model.decoder.layers.*.ca_v_proj",          "model.decoder.layers.*.encoder_attn.v_proj",          "transformer.decoder.layers.*.ca_v_proj"),
    ("decoder.layers.*.cross_attention.output",        "model.decoder.layers.*.encoder_attn.out_proj", "model.decoder.layers.*.encoder_attn.o_proj",       "transformer.decoder.layers.*.cross_attn.out_proj"),
)

_DETR: tuple[tuple[str, str, str, str], ...] = (
    # native                                   published                                  transformers5                                      original
    ("decoder.layers.*.self_attention.query",    "model.decoder.layers.*.self_attn.q_proj",      "model.decoder.layers.*.self_attn.q_proj",      "transformer.decoder.layers.*.self_attn.in_proj_{p}#0"),
    ("decoder.layers.*.self_attention.key",      "model.decoder.layers.*.self_attn.k_proj",      "model.decoder.layers.*.self_attn.k_proj",      "transformer.decoder.layers.*.self_attn.in_proj_{p}#1"),
    ("decoder.layers.*.self_attention.value",    "model.decoder.layers.*.self_attn.v_proj",      "model.decoder.layers.*.self_attn.v_proj",      "transformer.decoder.layers.*.self_attn.in_proj_{p}#2"),
    ("decoder.layers.*.cross_attention.query",   "model.decoder.layers.*.encoder_attn.q_proj",   "model.decoder.layers.*.encoder_attn.q_proj",   "transformer.decoder.layers.*.multihead_attn.in_proj_{p}#0"),
    ("decoder.layers.*.cross_attention.key",     "model.decoder.layers.*.encoder_attn.k_proj",   "model.decoder.layers.*.encoder_attn.k_proj",   "transformer.decoder.layers.*.multihead_attn.in_proj_{p}#1"),
    ("decoder.layers.*.cross_attention.value",   "model.decoder.layers.*.encoder_attn.v_proj",   "model.decoder.layers.*.encoder_attn.v_proj",   "transformer.decoder.layers.*.multihead_attn.in_proj_{p}#2"),
    ("decoder.layers.*.cross_attention.output",  "model.decoder.layers.*.encoder_attn.out_proj", "model.decoder.layers.*.encoder_attn.o_proj",   "transformer.decoder.layers.*.multihead_attn.out_proj"),
)

# Backbone parameters keep timm's names after these prefixes.
NATIVE_BACKBONE = "backbone.body."
_BACKBONE: dict[FileFormat, str] = {
    "native":        NATIVE_BACKBONE,
    "published":     "model.backbone.conv_encoder.model.",
    "transformers5": "model.backbone.model.",
    "original":      "backbone.0.body.",
}

# transformers' own ResNet (instead of timm's) has other names: timm's pattern, transformers' replacement.
_TRANSFORMERS_RESNET = (
    (r"^conv1\.",                          "embedder.embedder.convolution."),
    (r"^bn1\.",                            "embedder.embedder.normalization."),
    (r"^layer(\d)\.(\d+)\.conv(\d)\.",     "encoder.stages.{0}.layers.{1}.layer.{2}.convolution."),
    (r"^layer(\d)\.(\d+)\.bn(\d)\.",       "encoder.stages.{0}.layers.{1}.layer.{2}.normalization."),
    (r"^layer(\d)\.(\d+)\.downsample\.0\.", "encoder.stages.{0}.layers.{1}.shortcut.convolution."),
    (r"^layer(\d)\.(\d+)\.downsample\.1\.", "encoder.stages.{0}.layers.{1}.shortcut.normalization."),
)
# fmt: on

_COLUMNS: tuple[FileFormat, ...] = ("native", *get_args(NameFormat))
_ROWS = {
    architecture: {row[0]: dict(zip(_COLUMNS, row, strict=True)) for row in (*_SHARED, *table)}
    for architecture, table in (("conditional_detr", _CONDITIONAL_DETR), ("detr", _DETR))
}
# Parameters that only files of this architecture have, and by which their names are told apart.
_MARKS = {
    "conditional_detr": ("decoder.layers.*.cross_attention.spatial_query",),
    "detr": ("decoder.layers.*.cross_attention.query", "decoder.layers.*.cross_attention.output"),
}


class KeyMap(NamedTuple):
    """The parameter names of a file.

    Attributes:
        name_format: the column of the table.
        transformers_resnet: whether the backbone is transformers' own ResNet.
        prefix: what precedes every name, such as "module.", which DataParallel adds.
        architecture: name of the architecture.
    """

    name_format: FileFormat
    transformers_resnet: bool = False
    prefix: str = ""
    architecture: str = "conditional_detr"

    def __str__(self) -> str:
        resnet = " with transformers' ResNet" if self.transformers_resnet else ""
        return self.name_format + resnet + (f" after {self.prefix!r}" if self.prefix else "")


@dataclass(frozen=True)
class Source:
    """The tensor of a file that holds a native parameter.

    Attributes:
        name: the tensor's name.
        third: which third of the tensor's rows, 0 to 2; None: all rows.
    """

    name: str
    third: int | None = None

    def __str__(self) -> str:
        return self.name if self.third is None else f"{self.name}[third {self.third + 1} of its rows]"


@cache
def source_of(native: str, key_map: KeyMap) -> Source:
    """Return the tensor of a file with these names that holds the native parameter ``native``.

    Raises:
        KeyError: the native model has no parameter of this name.
    """
    if native.startswith(NATIVE_BACKBONE):
        backbone = native.removeprefix(NATIVE_BACKBONE)
        if key_map.transformers_resnet:
            backbone = _transformers_resnet(backbone)
        return Source(key_map.prefix + _BACKBONE[key_map.name_format] + backbone)
    stem, kind = native.rsplit(".", 1)
    layer = "".join(re.findall(r"(?<=layers\.)\d+", stem))
    row = _ROWS[key_map.architecture][re.sub(r"(?<=layers\.)\d+", "*", stem)]
    name = row[key_map.name_format].replace("*", layer)
    name = key_map.prefix + name
    if "{p}" in name:
        name, third = name.replace("{p}", kind).split("#")
        return Source(name, int(third))
    return Source(f"{name}.{kind}")


def detect_key_map(names: Iterable[str]) -> KeyMap | None:
    """Detect the key map of a file from its tensor names; return None if it holds no network of this library."""
    names = set(names)
    for architecture, marks in _MARKS.items():
        for name_format in _COLUMNS:
            found = (_prefixes(names, _ROWS[architecture][mark][name_format]) for mark in marks)
            if prefixes := set.intersection(*found):
                prefix = min(prefixes)
                stages = f"{prefix}{_BACKBONE[name_format]}encoder.stages."
                resnet = any(name.startswith(stages) for name in names)
                return KeyMap(name_format, resnet, prefix, architecture)
    return None


def _prefixes(names: set[str], parameter: str) -> set[str]:
    """Return what precedes a parameter, as the table has it, in tensor names; nothing if no tensor holds it."""
    stem, in_one_tensor, _ = parameter.partition("_{p}#")
    kind = (r"_" if in_one_tensor else r"\.") + "(?:weight|bias)"
    pattern = re.compile(r"(|.*\.)" + re.escape(stem).replace(r"\*", r"\d+") + kind, re.DOTALL)
    return {match.group(1) for name in names if (match := pattern.fullmatch(name))}


def _transformers_resnet(name: str) -> str:
    """Return transformers' name of a ResNet parameter, from timm's; transformers counts stages and layers from 0."""
    for pattern, replacement in _TRANSFORMERS_RESNET:
        if match := re.match(pattern, name):
            stage_block_conv = match.groups()
            numbers = [int(group) - (0 if position == 1 else 1) for position, group in enumerate(stage_block_conv)]
            return replacement.format(*numbers) + name[match.end() :]
    return name
