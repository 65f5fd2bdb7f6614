"""Detect objects on a photograph: ``python examples/detect.py photo.jpg``.

Without ``--weights`` it makes an untrained checkpoint in the published format, so that every step runs where nothing
can be downloaded: the boxes and names it then prints are random.
"""

import argparse
import tempfile

from conditional_detr import ConditionalDETR, Config, Detector, Metadata
from conditional_detr.labels import COCO_NAMES


def main() -> None:
    """Load weights, detect, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", help="a photograph of yours")
    parser.add_argument("--weights", help="a folder, a file, or a hub id such as microsoft/conditional-detr-resnet-50")
    parser.add_argument("--output", default="found.png", help="where the annotated picture goes")
    options = parser.parse_args()

    if options.weights:
        detector = Detector.from_pretrained(options.weights)
        detections = detector(options.picture)
    else:
        print("No --weights: making an UNTRAINED model. What it finds is random.")
        with tempfile.TemporaryDirectory() as folder:
            ConditionalDETR(Config(), Metadata(COCO_NAMES)).save_pretrained(folder)
            detector = Detector.from_pretrained(folder)
        detections = detector(options.picture, threshold=0, top_k=5)

    print(f"{len(detections)} objects on {options.picture}, {detections.size[1]} x {detections.size[0]} pixels")
    for box, score, name in detections:
        print(f"{name:14s} {score:.3f}  " + " ".join(f"{value:7.1f}" for value in box))
    detections.draw().save(options.output)
    print(f"drawn in {options.output}")


if __name__ == "__main__":
    main()
