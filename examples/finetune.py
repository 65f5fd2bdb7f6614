"""Fine-tune on your own data: ``python examples/finetune.py --data train.json --images images --weights ...``.

Without ``--data``, this writes a synthetic dataset. Without ``--weights``, it starts from a small untrained model. So
it needs no download. ``--resume`` continues an interrupted run. Under torchrun or accelerate launch, several processes
train together.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from conditional_detr import ConditionalDETR, Config, Detector, Preprocessing
from conditional_detr.data.dataset import Augmentation, CocoData
from conditional_detr.data.synthetic import write_shapes
from conditional_detr.training.config import TrainConfig
from conditional_detr.training.loop import train


def main() -> None:
    """Read the dataset, create the model, train it, and detect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="COCO JSON file; default: a synthetic dataset")
    parser.add_argument("--images", help="folder of the images")
    parser.add_argument("--val-data", help="COCO JSON file of the validation dataset")
    parser.add_argument("--val-images", help="folder of the images")
    parser.add_argument("--weights", help="folder, file or hub id; default: a small untrained network")
    parser.add_argument("--epochs", type=int, default=TrainConfig.finetune_small().epochs)
    parser.add_argument("--output", default="finetuned")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --output")
    options = parser.parse_args()
    if not options.data:
        options.data = write_shapes("shapes", 32, seed=0, split="train", size=(96, 128))
        options.val_data = write_shapes("shapes", 8, seed=0, split="val", size=(96, 128))
        options.images, options.val_images = Path("shapes/train"), Path("shapes/val")

    class_names = CocoData(options.data, options.images).class_names
    torch.manual_seed(0)
    if options.weights:
        model = ConditionalDETR.from_pretrained(options.weights, class_names=class_names)
        preprocessing = model.metadata.preprocessing
    else:
        sizes = {"width": 64, "heads": 4, "encoder_layers": 1, "decoder_layers": 2, "feedforward": 128}
        config = Config(len(class_names), num_queries=30, backbone="resnet18", backbone_stage=3, dropout=0.0, **sizes)
        model, preprocessing = ConditionalDETR(config), Preprocessing(96, 160)

    train_data = CocoData(options.data, options.images, augmentation=Augmentation.small(), preprocessing=preprocessing)
    val_data = None
    if options.val_data:
        val_data = CocoData(
            options.val_data, options.val_images, preprocessing=preprocessing, class_names=train_data.class_names
        )
    model.metadata = train_data.metadata
    config = replace(TrainConfig.finetune_small(), epochs=options.epochs)
    result = train(model, train_data, val_data, config, folder=options.output, resume=options.resume)

    best = result.best or result.last
    print(f"{result.steps} steps, weights in {best}" + (f", AP {result.best_ap:.3f}" if result.best else ""))
    image = train_data.describe(0)
    print(f"{len(Detector.from_pretrained(best)(image, threshold=0.3))} detections above 0.3 in {image}")


if __name__ == "__main__":
    main()
