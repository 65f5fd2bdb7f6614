"""A training step against transformers': ``python examples/benchmarks/training_step.py``.

Forward, loss and backward of the ResNet-50 network on the same pixels and targets, ours as ``train`` runs it: one step
of each in turn, in one process. Peak memory is that of a process for each alone. Needs ``transformers``.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from conditional_detr import ConditionalDETR, Config, SetLoss
from conditional_detr.training.optimisation import linears_convolved, norms_folded

Step = Callable[[], float]


def pictures(batch: int, size: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Draw pixels (B, 3, H, W) and targets of 7 objects each, COCO's mean."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    targets = []
    for _ in range(batch):
        sides = torch.rand(7, 2, generator=generator) * 0.3 + 0.05
        centres = sides / 2 + torch.rand(7, 2, generator=generator) * (1 - sides)
        labels = torch.randint(0, 91, (7,), generator=generator)
        targets.append({"labels": labels, "boxes": torch.cat((centres, sides), dim=1)})
    return pixels, targets


def ours(batch: int, size: int, stack: ExitStack) -> Step:
    """Return a step of this library's."""
    pixels, targets = pictures(batch, size)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    model, criterion = ConditionalDETR(Config()).train(), SetLoss()
    model.backbone.to(memory_format=torch.channels_last)

    def step() -> float:
        model.zero_grad()
        loss = criterion(model(pixels), targets)["total"]
        loss.backward()
        return loss.item()

    for faster in (norms_folded, linears_convolved):
        stack.enter_context(faster(model))  # for as long as steps are done
    return step


def theirs(batch: int, size: int, _: ExitStack) -> Step:
    """Return a step of transformers'."""
    from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    pixels, targets = pictures(batch, size)
    labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in targets]
    trunk = {"model_type": "timm_backbone", "backbone": "resnet50", "out_indices": [4], "features_only": True}
    trunk["use_pretrained_backbone"] = False
    torch.manual_seed(0)
    everywhere = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}  # as the authors', and ours
    config = ConditionalDetrConfig(backbone_config=trunk, num_labels=91, auxiliary_loss=True, **everywhere)
    model = ConditionalDetrForObjectDetection(config).train()
    for name, parameter in model.model.backbone.named_parameters():
        parameter.requires_grad_(any(f"layer{stage}" in name for stage in (2, 3, 4)))

    def step() -> float:
        model.zero_grad()
        loss = model(pixel_values=pixels, labels=labels).loss
        loss.backward()
        return loss.item()

    return step


SIDES = {"ours": ours, "transformers": theirs}


def peak_memory(side: str, batch: int, size: int) -> float:
    """Return the megabytes at the peak of a process that does three steps."""
    command = [sys.executable, __file__, "--alone", side, "--batch", str(batch), "--size", str(size)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=512, help="pixels of both sides of a picture")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--alone", choices=SIDES, help="do three steps of one side and print the peak memory in MB")
    options = parser.parse_args()
    if options.alone:
        with ExitStack() as stack:
            step = SIDES[options.alone](options.batch, options.size, stack)
            for _ in range(3):
                step()
        print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3)
        return

    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        steps = {name: make(options.batch, options.size, stack) for name, make in SIDES.items()}
        for step in steps.values():
            step()
        for _ in range(options.rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        memory = peak_memory(name, options.batch, options.size)
        print(f"{name:14s} {statistics.median(times):.3f} s a step (least {min(times):.3f}), peak {memory:.0f} MB")
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    print(f"ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
