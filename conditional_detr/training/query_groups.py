"""Several groups of object queries in training, one at inference: Group DETR (Chen et al., ICCV 2023, 2207.13085)."""

import torch
from torch import Tensor, nn

from conditional_detr.modeling.conditional_detr import ConditionalDETR, Output
from conditional_detr.training.loader import derive_seed


class QueryGroups(nn.Module):
    """A model whose images are decoded once by each of several groups of object queries, the model's own first.

    Groups do not see each other and each is matched to all targets by itself, so an image teaches as many times: the
    decoder learns in fewer epochs. The other groups are left behind when training ends, and the model is as before.

    Args:
        model: trained in place.
        groups: G, of the model's number of queries each, 2 or more.
        seed: what the others are drawn from.

    Attributes:
        model: the model.
        others: embedding ((G - 1)·N, D), the queries of the other groups.
    """

    def __init__(self, model: ConditionalDETR, groups: int, seed: int) -> None:
        super().__init__()
        self.model = model
        self.groups = groups
        queries = model.object_queries
        self.others = nn.Embedding((groups - 1) * queries.num_embeddings, queries.embedding_dim)
        nn.init.normal_(self.others.weight, generator=torch.Generator().manual_seed(derive_seed(seed, groups)))
        self.others.to(queries.weight).requires_grad_(queries.weight.requires_grad)

    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Detect objects, once for each group.

        Args:
            pixels: (B, 3, H, W), normalised.
            padding: (B, H, W) bool, True = padded; None: nothing is padded.

        Returns:
            Output as of G·B images, logits (L, G·B, N, C) and boxes (L, G·B, N, 4): all images as the first group,
            the model's own, sees them, then all as the second does.
        """
        model, images, groups = self.model, len(pixels), self.groups
        features, padding = model.backbone(pixels, padding)
        memory, positions = model.encode(features, padding)
        queries = torch.cat((model.object_queries.weight, self.others.weight)).unflatten(0, (groups, -1))  # (G, N, D)
        memory, positions = memory.repeat(groups, 1, 1), positions.repeat(groups, 1, 1)
        padding = None if padding is None else padding.repeat(groups, 1, 1)
        o_q = queries.repeat_interleave(images, dim=0)  # (G·B, N, D)
        return model.predict(*model.decode(memory, positions, padding, object_queries=o_q))
