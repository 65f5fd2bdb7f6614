"""Convert published weights to the authors' names, by independent rules instead of the library's table."""

import re

import torch
from torch import Tensor

_ORIGINAL = [
    (r"^model\.backbone\.conv_encoder\.model\.", "backbone.0.body."),
    (r"^model\.input_projection\.", "input_proj."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^class_labels_classifier\.", "class_embed."),
    (r"^bbox_predictor\.", "bbox_embed."),
    (r"^model\.decoder\.layernorm\.", "transformer.decoder.norm."),
    (r"^model\.(encoder|decoder)\.", r"transformer.\1."),
    (r"\.fc(\d)\.", r".linear\1."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.encoder_attn\.", ".cross_attn."),
]


def to_original(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by the authors' names; query, key and value rows are concatenated in this order.

    Only DETR has three such tensors in the decoder, where the authors call cross-attention "multihead_attn".
    """
    original, joined = {}, {}
    detr = any(".encoder_attn.q_proj." in name for name in published)
    for name, tensor in published.items():
        for pattern, replacement in _ORIGINAL:
            name = re.sub(pattern, replacement, name)
        name = name.replace(".cross_attn.", ".multihead_attn.") if detr else name
        if match := re.match(r"(transformer\..*_attn)\.([qkv])_proj\.(\w+)", name):
            layer, which, kind = match.groups()
            joined.setdefault(f"{layer}.in_proj_{kind}", {})[which] = tensor
        else:
            original[name] = tensor.clone()
    return original | {name: torch.cat([parts[w] for w in "qkv"]) for name, parts in joined.items()}
