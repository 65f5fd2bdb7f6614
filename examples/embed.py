"""Use the model as a part of your own module: ``python examples/embed.py``.

A small head counts the objects of each class from the decoder's states. The model's own heads predict classes and
boxes from the same states, so backbone, encoder and decoder run once. The gradient of the counts reaches every part
of the model except its own heads, and the backbone's frozen stem and first stage.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conditional_detr import ConditionalDETR, Config, Output


class CountingDetector(nn.Module):
    """A detector that also counts objects.

    Args:
        detr: the model, whose parts are called one by one.
    """

    def __init__(self, detr: ConditionalDETR) -> None:
        super().__init__()
        self.detr = detr
        self.count = nn.Linear(detr.config.width, detr.config.num_classes)

    def forward(self, pixels: Tensor, padding: Tensor | None = None) -> tuple[Output, Tensor]:
        """Return the model's output, and the number of objects (B, C)."""
        features, padding = self.detr.backbone(pixels, padding)
        memory, positions = self.detr.encode(features, padding)
        f, s = self.detr.decode(memory, positions, padding)  # (L, B, N, D), (B, N, 2)
        counts = self.count(f[-1]).sigmoid().sum(dim=1)  # (B, C)
        return self.detr.predict(f, s), counts


def main() -> None:
    """Run the module on two images of different sizes, and train one step on the counts alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="folder, file or hub id; default: a small untrained network")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.weights:
        detr = ConditionalDETR.from_pretrained(options.weights)
    else:
        detr = ConditionalDETR(Config(num_classes=3, backbone="resnet18", num_queries=50))
    model = CountingDetector(detr)

    pixels = torch.randn(2, 3, 192, 256)
    padding = torch.zeros(2, 192, 256, dtype=torch.bool)  # True = padded
    padding[1, :, 160:] = True
    output, counts = model(pixels, padding)
    print(f"boxes {tuple(output.boxes.shape)}, counts {tuple(counts.shape)}")

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    before = F.mse_loss(counts, torch.zeros_like(counts))
    before.backward()
    optimizer.step()
    after = F.mse_loss(model(pixels, padding)[1], torch.zeros_like(counts))
    print(f"loss {before.item():.3f}, after one step {after.item():.3f}")


if __name__ == "__main__":
    main()
