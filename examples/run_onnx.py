"""Run an exported model without PyTorch and without this library: ``python run_onnx.py model.onnx photo.jpg``.

This needs numpy, pillow and onnxruntime. The file has the class names and the preprocessing.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resized_size(height: int, width: int, settings: dict) -> tuple[int, int]:
    """Return the height and width that an image is resized to."""
    if settings.get("resizing", "edges") != "edges":  # "fit", "stretch" or "none"
        largest = settings["size"] or (height, width)
        scale = min(largest[0] / height, largest[1] / width)
        return tuple(largest) if settings["resizing"] == "stretch" else (int(height * scale), int(width * scale))
    short, long = min(height, width), max(height, width)
    target = min(settings["shortest_edge"], settings["longest_edge"] * short / long)
    resized = (short, long) if round(target) == short else (max(round(target), 1), int(target * long / short))
    return resized if height <= width else resized[::-1]


def main() -> None:
    """Run the model on an image, and print the class name, score and box of each detection."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="ONNX file from `conditional-detr export`")
    parser.add_argument("image")
    parser.add_argument("--threshold", type=float, default=0.5)
    options = parser.parse_args()

    session = onnxruntime.InferenceSession(options.model, providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["conditional_detr"])["metadata"]
    names, settings = metadata["class_names"], metadata["preprocessing"]

    image = ImageOps.exif_transpose(Image.open(options.image)).convert("RGB")
    height, width = resized_size(image.height, image.width, settings)
    values = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    values = (values - np.float32(settings["mean"])) / np.float32(settings["std"])  # (H, W, 3)
    inputs = {"pixels": values.transpose(2, 0, 1)[None]}
    if len(session.get_inputs()) > 1:  # the file includes post-processing, which this script does not use
        inputs["sizes"] = np.array([[image.height, image.width]], dtype=np.int64)
    logits, boxes = (output[0] for output in session.run(["logits", "boxes"], inputs))  # (N, C), (N, 4)

    scores = 1 / (1 + np.exp(-logits))
    scores[:, [name is None for name in names]] = 0  # unused rows of the class head
    limits = np.array([image.width, image.height] * 2)
    for pair in np.argsort(-scores, axis=None, kind="stable")[:100]:
        query, label = np.unravel_index(pair, scores.shape)
        if scores[query, label] > options.threshold:
            centre, half = boxes[query, :2], boxes[query, 2:] / 2
            corners = np.clip(np.concatenate([centre - half, centre + half]) * limits, 0, limits)
            print(f"{names[label]:14s} {scores[query, label]:.4f}  " + " ".join(f"{value:8.2f}" for value in corners))


if __name__ == "__main__":
    main()
