"""Evaluate a detector on a dataset: ``python examples/evaluate.py --data val.json --images images --weights ...``.

This prints COCO's twelve metrics, and the classes from the worst to the best. Without ``--data``, it writes a
synthetic dataset. Without ``--weights``, it uses an untrained model, whose metrics are close to 0.
"""

import argparse

import torch

from conditional_detr import ConditionalDETR, Config, Detector, Metadata, Preprocessing
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from conditional_detr.evaluation.coco import evaluate


def main() -> None:
    """Load a checkpoint, evaluate it, and print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="COCO JSON file; default: a synthetic dataset")
    parser.add_argument("--images", help="folder of the images")
    parser.add_argument("--weights", help="folder, file or hub id; default: a small untrained network")
    options = parser.parse_args()
    if not options.data:
        options.data = write_shapes("shapes", 8, seed=0, split="val", size=(96, 128))
        options.images = "shapes/val"
    if options.weights:
        detector = Detector.from_pretrained(options.weights)
    else:
        torch.manual_seed(0)
        config = Config(len(CLASS_NAMES), num_queries=50, backbone="resnet18", encoder_layers=1, decoder_layers=2)
        detector = Detector(ConditionalDETR(config, Metadata(CLASS_NAMES, preprocessing=Preprocessing(96, 160))))

    result = evaluate(detector, options.data, options.images)
    print("  ".join(f"{name} {value:.3f}" for name, value in result.metrics.items()))
    for name, metrics in sorted(result.per_class.items(), key=lambda item: item[1]["AP"]):
        count, ap, ap50 = (metrics[key] for key in ("annotations", "AP", "AP50"))
        print(f"{name:16s} {count:4d} annotations  AP {ap:.3f}  AP50 {ap50:.3f}")


if __name__ == "__main__":
    main()
