"""Train with query denoising, as DN-DETR does: ``python examples/denoising.py``.

Besides the model's own queries, the decoder gets a query for each target, which starts at a noisy box and has to
recover the box and its class. This shows the seams of the decoder (initial content, reference points, a mask between
queries) and of the loss (a matcher of one's own). The trained model has no additional parts. DN-DETR: Li et al., CVPR
2022, arXiv 2203.01305. The images are those of ``plain_loop.py``.
"""

import argparse

import torch
from plain_loop import DiscsAndSquares, collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conditional_detr import ConditionalDETR, Config, Metadata, Output, SetLoss
from conditional_detr.set_prediction.matcher import Matches
from conditional_detr.set_prediction.targets import JoinedTargets


class InOrder:
    """A matcher for queries that know their targets: the k-th query of an image has its k-th target."""

    def match(self, logits: Tensor, boxes: Tensor, targets: JoinedTargets) -> Matches:
        """Return the same pairs for every layer."""
        queries = torch.cat([torch.arange(count) for count in targets.counts]).expand(len(logits), -1)
        return Matches(queries, torch.arange(len(targets.labels)).expand_as(queries), targets.images)


class Denoiser(nn.Module):
    """The model with its queries of noisy targets, which only training has."""

    def __init__(self, model: ConditionalDETR, noise: float) -> None:
        super().__init__()
        self.model, self.noise = model, noise
        self.label = nn.Embedding(model.config.num_classes, model.config.width)
        self.box = nn.Linear(4, model.config.width)

    def forward(self, pixels: Tensor, targets: list[dict[str, Tensor]]) -> tuple[Output, Output]:
        """Return the predictions of the model's own queries, and those of the noisy targets."""
        model, images, own = self.model, len(pixels), self.model.config.num_queries
        pad, device = nn.utils.rnn.pad_sequence, pixels.device
        boxes = pad([target["boxes"] for target in targets], batch_first=True).to(device)
        labels = pad([target["labels"] for target in targets], batch_first=True).to(device)
        centres = boxes[..., :2] + self.noise * boxes[..., 2:] * (torch.rand_like(boxes[..., :2]) - 0.5)
        noisy = torch.cat((centres, boxes[..., 2:] * (1 + self.noise * (torch.rand_like(centres) - 0.5))), -1)

        o_q = model.object_queries.weight.expand(images, -1, -1)
        all_queries = torch.cat((o_q, self.box(noisy)), 1)
        content = torch.cat((torch.zeros_like(o_q), self.label(labels)), 1)
        points = torch.cat((model.decoder.points(o_q)[0], noisy[..., :2].clamp(0, 1)), 1)
        count = all_queries.shape[1]
        hidden = torch.zeros(images, count, count, dtype=torch.bool, device=device)
        hidden[:, :own, own:] = True  # the own queries must not see the answers
        for image, target in enumerate(targets):
            hidden[image, own:, own + len(target["labels"]) :] = True  # padding

        memory, p_k = model.encode(model.backbone(pixels, None)[0])
        f, s = model.decoder(all_queries, memory, p_k, content=content, points=points, hidden=hidden)
        logits, predicted = model.predict(f, s)
        return Output(logits[:, :, :own], predicted[:, :, :own]), Output(logits[:, :, own:], predicted[:, :, own:])


def main() -> None:
    """Train a small detector."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--noise", type=float, default=0.4, help="of centres and sides, as a part of the sides")
    parser.add_argument("--output", default="denoised")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"width": 64, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 128}
    config = Config(num_classes=2, num_queries=20, backbone="resnet18", backbone_stage=2, dropout=0.0, **sizes)
    model = ConditionalDETR(config, Metadata(("disc", "square")))
    denoiser = Denoiser(model, options.noise).train()
    loader = DataLoader(DiscsAndSquares(options.images), batch_size=8, shuffle=True, collate_fn=collate)
    criterion, known = SetLoss(), SetLoss(matcher=InOrder())
    optimizer = torch.optim.AdamW([p for p in denoiser.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-4)
    for epoch in range(options.epochs):
        totals = torch.zeros(2)
        for pixels, targets in loader:
            own, denoised = denoiser(pixels, targets)
            losses = torch.stack((criterion(own, targets)["total"], known(denoised, targets)["total"]))
            losses.sum().backward()
            nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            totals += losses.detach()
        mean = (totals / len(loader)).tolist()
        print(f"epoch {epoch + 1}: loss {mean[0]:.3f}, of noisy targets {mean[1]:.3f}")
    model.save_pretrained(options.output)
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
