"""Detect objects on a photograph: ``python examples/detect.py photo.jpg --weights owner/name``.

Without a photograph it draws an image of shapes, and without ``--weights`` it takes those that the library brings for
such images, so that every step runs where nothing can be downloaded.
"""

import argparse

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image, image_index


def main() -> None:
    """Load weights, detect, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", nargs="?", help="a photograph of yours")
    parser.add_argument("--weights", default="shapes", help="a folder, a file, a hub id, or a name of shipped weights")
    parser.add_argument("--output", default="found.png", help="where the annotated image goes")
    options = parser.parse_args()

    image = options.image
    if image is None:
        image, _, _ = draw_image(0, image_index("demo", 0))
    detections = Detector.from_pretrained(options.weights)(image, threshold=0.5)

    height, width = detections.size
    print(f"{len(detections)} objects on {options.image or 'an image of shapes'}, {width} x {height} pixels")
    for box, score, name in detections:
        print(f"{name:14s} {score:.3f}  " + " ".join(f"{value:7.1f}" for value in box))
    detections.draw().save(options.output)
    print(f"drawn in {options.output}")


if __name__ == "__main__":
    main()
