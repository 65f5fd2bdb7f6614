"""Several groups of object queries in training: Group DETR (Chen et al., ICCV 2023, arXiv 2207.13085)."""

import torch
from torch import Tensor, nn

from conditional_detr.data.seeds import derive_seed
from conditional_detr.modeling.detection_transformer import DetectionTransformer, Output


class QueryGroups(nn.Module):
    """A model that decodes each image once with each of several groups of object queries, the model's own first.

    Groups do not attend to each other, and each group is matched to all targets on its own. The decoder therefore gets
    G times the supervision from an image and needs fewer epochs. Only training uses the additional groups: the model
    itself is unchanged.

    Args:
        model: trained in place.
        groups: G, at least 2; each group has as many queries as the model.
        seed: seed of the additional queries.

    Attributes:
        model: the model.
        others: embedding ((G - 1)·N, D), the queries of the additional groups.
    """

    def __init__(self, model: DetectionTransformer, groups: int, seed: int) -> None:
        super().__init__()
        self.model = model
        self.groups = groups
        queries = model.object_queries
        generator = torch.Generator(device="cpu").manual_seed(derive_seed(seed, groups, bits=63))
        rows = (groups - 1) * queries.num_embeddings
        self.others = nn.Embedding(rows, queries.embedding_dim, device="cpu", dtype=torch.float32)
        nn.init.normal_(self.others.weight, generator=generator)
        self.others.to(queries.weight).requires_grad_(queries.weight.requires_grad)

    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> Output:
        """Predict logits and boxes with each group.

        Args:
            pixels: (B, 3, H, W), normalised.
            padding: (B, H, W) bool, True = padded; None: nothing is padded.

        Returns:
            Output of G·B images, logits (L, G·B, N, C) and boxes (L, G·B, N, 4): the predictions of the first group,
            the model's own, for all images, then those of the second, and so on.
        """
        model, images, groups = self.model, len(pixels), self.groups
        features, padding = model.backbone(pixels, padding)
        memory, positions = model.encode(features, padding)
        queries = torch.cat((model.object_queries.weight, self.others.weight)).unflatten(0, (groups, -1))  # (G, N, D)
        memory, positions = memory.repeat(groups, 1, 1), positions.repeat(groups, 1, 1)
        padding = None if padding is None else padding.repeat(groups, 1, 1)
        o_q = queries.repeat_interleave(images, dim=0)  # (G·B, N, D)
        return model.predict(*model.decode(memory, positions, padding, object_queries=o_q))
