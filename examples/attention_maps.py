"""Draw the attention maps of a detection: ``python examples/attention_maps.py photo.jpg``.

This draws the paper's figure 1 for the best detection, and prints the distance between the box's centre and the mean
position of each head's attention. Without ``--weights``, the model is small and untrained, and its maps mean nothing.
"""

import argparse

import torch

from conditional_detr import ConditionalDETR, Config, Detector
from conditional_detr.inference.images import open_image
from conditional_detr.inference.preprocessing import to_pixels


def main() -> None:
    """Run the detector, draw the attention maps of the best detection, and print their mean positions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", help="path of an image")
    parser.add_argument("--weights", help="folder, file or hub id; default: a small untrained network")
    parser.add_argument("--output", default="attention.png", help="path of the figure")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.weights:
        detector = Detector.from_pretrained(options.weights)
    else:
        detector = Detector(ConditionalDETR(Config(num_classes=3, backbone="resnet18", num_queries=50)))

    detections = detector(options.image, threshold=0, top_k=1)
    detector.draw_attention(detections, 0).save(options.output)
    (x0, y0, x1, y1), score, name = detections[0]
    print(f"{name} {score:.2f}, drawn in {options.output}")

    # The same maps as tensors: (B, M, N, h, w), each sums to 1
    model = detector.model
    pixels = to_pixels(open_image(options.image, "image"), model.metadata.preprocessing)[None]
    with torch.no_grad():
        maps = model.attention_maps(pixels).combined[0, :, detections.queries[0]]  # (M, h, w)
    height, width = detections.size
    y = (torch.arange(maps.shape[1]) + 0.5) / maps.shape[1] * height
    x = (torch.arange(maps.shape[2]) + 0.5) / maps.shape[2] * width
    for head, weights in enumerate(maps, 1):
        mean_x, mean_y = (weights.sum(0) @ x).item(), (weights.sum(1) @ y).item()
        print(f"head {head}: {mean_x - (x0 + x1) / 2:+7.1f} {mean_y - (y0 + y1) / 2:+7.1f} pixels from the centre")


if __name__ == "__main__":
    main()
