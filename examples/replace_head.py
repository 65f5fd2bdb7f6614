"""Replace the class head of a model: ``python examples/replace_head.py``.

There are two ways. With ``class_names``, the rows of the checkpoint's classes are kept, new rows are initialised at
the prior probability, and the model can still be saved and loaded. Or assign any module as a head.
"""

import argparse
import tempfile

import torch
from torch import Tensor, nn

from conditional_detr import ConditionalDETR, Config, Metadata
from conditional_detr.checkpoints.labels import COCO_NAMES


class BottleneckHead(nn.Module):
    """A class head of two layers: (..., D) to (..., C)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, classes))

    def forward(self, f: Tensor) -> Tensor:
        """Return the class logits of the decoder's states."""
        return self.layers(f)


def main() -> None:
    """Replace the class head in both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="folder, file or hub id; default: a small untrained network")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if not options.weights:
            ConditionalDETR(Config(backbone="resnet18", num_queries=50), Metadata(COCO_NAMES)).save_pretrained(folder)
        model = ConditionalDETR.from_pretrained(options.weights or folder, class_names=["cat", "hedgehog"])
    report = model.load_report
    print(f"kept {report.heads.kept_classes}, new {report.heads.new_classes}")

    model.class_head = BottleneckHead(model.config.width, 5)
    model.metadata = Metadata(["apple", "pear", "plum", "cherry", "quince"])
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)  # train only the transformer and the heads
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logits, boxes = model(torch.randn(1, 3, 192, 256))
    print(f"logits {tuple(logits.shape)}, boxes {tuple(boxes.shape)}, {trainable:,} trainable parameters")


if __name__ == "__main__":
    main()
