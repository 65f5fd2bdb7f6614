"""Detect objects in an image: ``python examples/detect.py photo.jpg --weights owner/name``.

Without an image, this draws a synthetic one. Without ``--weights``, it uses the library's own weights for synthetic
images. So it needs no download.
"""

import argparse

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image, image_index


def main() -> None:
    """Load a checkpoint, detect, and print and draw the detections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", nargs="?", help="path of an image; default: a synthetic image")
    parser.add_argument("--weights", default="shapes", help="folder, file, hub id or name of shipped weights")
    parser.add_argument("--output", default="detections.png", help="path of the drawing")
    options = parser.parse_args()

    image = options.image
    if image is None:
        image, _, _ = draw_image(0, image_index("demo", 0))
    detections = Detector.from_pretrained(options.weights)(image, threshold=0.5)

    height, width = detections.size
    print(f"{len(detections)} detections in {options.image or 'a synthetic image'}, {width} x {height} pixels")
    for box, score, name in detections:
        print(f"{name:14s} {score:.3f}  " + " ".join(f"{value:7.1f}" for value in box))
    detections.draw().save(options.output)
    print(f"drawn in {options.output}")


if __name__ == "__main__":
    main()
