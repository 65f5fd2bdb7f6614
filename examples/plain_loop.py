"""Train in a plain PyTorch loop: ``python examples/plain_loop.py``.

This uses your own dataset, PyTorch's DataLoader, AdamW and a learning rate schedule. From this library, it uses only
the model, its loss and its class names. The images are synthetic: discs and squares on noise.
"""

import argparse

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from conditional_detr import ConditionalDETR, Config, Metadata, SetLoss


class DiscsAndSquares(Dataset):
    """Images (3, 96, 128), normalised, with one to three objects each. An image depends on its index alone."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(index)
        pixels = 0.3 * torch.randn(3, 96, 128, generator=generator)
        y, x = torch.meshgrid(torch.arange(96), torch.arange(128), indexing="ij")
        count = int(torch.randint(1, 4, (), generator=generator))
        labels = torch.randint(0, 2, (count,), generator=generator)
        boxes = torch.zeros(count, 4)  # cx cy w h in [0, 1]
        for box, label in zip(boxes, labels, strict=True):
            r = 10 + 10 * torch.rand((), generator=generator)
            cx, cy = r + (torch.tensor([128, 96]) - 2 * r) * torch.rand(2, generator=generator)
            far = (x - cx).hypot(y - cy) if label == 0 else torch.maximum((x - cx).abs(), (y - cy).abs())
            pixels[:, far <= r] = torch.tensor([2.0, -1.0, 0.0] if label == 0 else [-1.0, 0.0, 2.0])[:, None]
            box[:] = torch.stack((cx / 128, cy / 96, 2 * r / 128, 2 * r / 96))
        return pixels, {"labels": labels, "boxes": boxes}


def collate(samples: list) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Stack images of one size. Images of several sizes need padding, and the mask for the model, True = padded."""
    return torch.stack([pixels for pixels, _ in samples]), [target for _, target in samples]


def main() -> None:
    """Train a small detector and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="folder, file or hub id to start from; default: a small untrained network")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--output", default="plain")
    options = parser.parse_args()
    torch.manual_seed(0)
    names = ("disc", "square")
    if options.weights:
        model = ConditionalDETR.from_pretrained(options.weights, class_names=names)
    else:
        sizes = {"width": 64, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 128}
        config = Config(num_classes=2, num_queries=20, backbone="resnet18", backbone_stage=2, dropout=0.0, **sizes)
        model = ConditionalDETR(config, Metadata(names))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()

    loader = DataLoader(DiscsAndSquares(options.images), batch_size=8, shuffle=True, collate_fn=collate)
    criterion = SetLoss()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))
    for epoch in range(options.epochs):
        total = 0.0
        for pixels, targets in loader:
            losses = criterion(model(pixels.to(device)), targets)  # targets stay on the CPU
            losses["total"].backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            total += losses["total"].item()
        print(f"epoch {epoch + 1}: loss {total / len(loader):.3f}")
    model.save_pretrained(options.output)
    print(f"saved in {options.output}")


if __name__ == "__main__":
    main()
