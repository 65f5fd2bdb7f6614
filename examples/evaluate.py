"""Measure a detector on a data set: ``python examples/evaluate.py --data val.json --images images --weights ...``.

COCO's twelve numbers, and the classes from the worst to the best. Without ``--data`` it draws a data set of shapes,
and without ``--weights`` it makes an untrained network, whose numbers are next to 0.
"""

import argparse

import torch

from conditional_detr import ConditionalDETR, Config, Detector, Metadata, Preprocessing
from conditional_detr.data.synthetic import CLASS_NAMES, write_shapes
from conditional_detr.evaluation.coco import evaluate


def main() -> None:
    """Load, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="COCO's json; default: shapes that are drawn now")
    parser.add_argument("--images", help="the folder of its images")
    parser.add_argument("--weights", help="a folder, a file or a hub id; default: a small untrained network")
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
    for name, numbers in sorted(result.per_class.items(), key=lambda item: item[1]["AP"]):
        print(f"{name:16s} {numbers['objects']:4d} objects  AP {numbers['AP']:.3f}  AP50 {numbers['AP50']:.3f}")


if __name__ == "__main__":
    main()
