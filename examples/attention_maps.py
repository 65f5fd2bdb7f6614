"""See where the model looks for an object: ``python examples/attention_maps.py photo.jpg``.

Draws the paper's figure 1 for the best detection, and says how far from the box's centre each head looks. Without
``--weights`` the network is small and untrained, and so are its maps.
"""

import argparse

import torch

from conditional_detr import ConditionalDETR, Config, Detector
from conditional_detr.inference.images import open_image, to_pixels


def main() -> None:
    """Detect, draw the best object's attention, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", help="a photograph of yours")
    parser.add_argument("--weights", help="a folder, a file or a hub id")
    parser.add_argument("--output", default="attention.png", help="where the image goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.weights:
        detector = Detector.from_pretrained(options.weights)
    else:
        detector = Detector(ConditionalDETR(Config(num_classes=3, backbone="resnet18", num_queries=50)))

    found = detector(options.image, threshold=0, top_k=1)
    detector.draw_attention(found, 0).save(options.output)
    (x0, y0, x1, y1), score, name = found[0]
    print(f"{name} {score:.2f}, drawn in {options.output}")

    # The same maps as tensors: (B, M, N, h, w), each summing to 1
    model = detector.model
    pixels = to_pixels(open_image(options.image, "image"), model.metadata.preprocessing)[None]
    with torch.no_grad():
        maps = model.attention_maps(pixels).combined[0, :, found.queries[0]]  # (M, h, w)
    height, width = found.size
    y = (torch.arange(maps.shape[1]) + 0.5) / maps.shape[1] * height
    x = (torch.arange(maps.shape[2]) + 0.5) / maps.shape[2] * width
    for head, weights in enumerate(maps, 1):
        looks_x, looks_y = (weights.sum(0) @ x).item(), (weights.sum(1) @ y).item()
        print(f"head {head}: {looks_x - (x0 + x1) / 2:+7.1f} {looks_y - (y0 + y1) / 2:+7.1f} pixels from the centre")


if __name__ == "__main__":
    main()
