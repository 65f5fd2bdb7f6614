"""Every form of preprocessing that transformers writes gives transformers' own pixels and detections."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConditionalDetrImageProcessorPil

from conditional_detr import Config, Detector, Metadata, Preprocessing
from conditional_detr.checkpoints.preprocessor_config import read_preprocessor, write_preprocessor
from conditional_detr.inference.exported import Description
from conditional_detr.inference.images import open_image
from conditional_detr.inference.preprocessing import resized_size, to_pixels
from helpers.models import ROOT

SIZES = ((60, 80), (80, 60), (33, 100), (100, 7), (64, 64), (48, 48))

FORMS = {  # what the processor is made with: the resizing that is read
    "fit": ({"size": {"max_height": 48, "max_width": 64}}, Preprocessing(resizing="fit", size=(48, 64))),
    "fit, padded": (
        {"size": {"max_height": 48, "max_width": 48}, "do_pad": True, "pad_size": {"height": 48, "width": 48}},
        Preprocessing(resizing="fit", size=(48, 48)),
    ),
    "stretch": ({"size": {"height": 40, "width": 56}}, Preprocessing(resizing="stretch", size=(40, 56))),
    "stretch, list": ({"size": [40, 56]}, Preprocessing(resizing="stretch", size=(40, 56))),
    "edges": ({"size": {"shortest_edge": 48, "longest_edge": 64}}, Preprocessing(48, 64)),
    "shortest above longest": ({"size": {"shortest_edge": 80, "longest_edge": 60}}, Preprocessing(80, 60)),
    "number": ({"size": 48, "max_size": 50}, Preprocessing(48, 50)),
    "own size": ({"do_resize": False}, Preprocessing(resizing="none")),
    "not normalised": (
        {"do_normalize": False, "size": [40, 56]},
        Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), resizing="stretch", size=(40, 56)),
    ),
    "one mean": (
        {"image_mean": 0.5, "image_std": 0.25, "size": [40, 56]},
        Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, resizing="stretch", size=(40, 56)),
    ),
    "factor": (
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3, "size": [40, 56]},
        Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, resizing="stretch", size=(40, 56)),
    ),
    "not rescaled": (
        {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51.0] * 3, "size": [40, 56]},
        Preprocessing(mean=(0.5,) * 3, std=(0.2,) * 3, resizing="stretch", size=(40, 56)),
    ),
}


def images():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def theirs(processor, image) -> torch.Tensor:
    """Return the pixels of transformers' processor without padding."""
    return processor(image, return_tensors="pt", do_pad=False)["pixel_values"][0]


@pytest.mark.parametrize("form", FORMS)
def test_pixels_equal_those_of_transformers(form, tmp_path):
    options, expected = FORMS[form]
    ConditionalDetrImageProcessorPil(**options).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    read = read_preprocessor(json.loads(path.read_text()), str(path))
    assert (read.resizing, read.size) == (expected.resizing, expected.size)
    assert (read.shortest_edge, read.longest_edge) == (expected.shortest_edge, expected.longest_edge)
    assert read.mean == pytest.approx(expected.mean, abs=1e-9)
    assert read.std == pytest.approx(expected.std, abs=1e-9)
    processor = ConditionalDetrImageProcessorPil.from_pretrained(tmp_path)
    path.write_text(json.dumps(write_preprocessor(read)))
    again = ConditionalDetrImageProcessorPil.from_pretrained(tmp_path)
    assert read_preprocessor(json.loads(path.read_text()), str(path)) == read
    for image in images():
        pixels = to_pixels(open_image(image, "image"), read)
        torch.testing.assert_close(pixels, theirs(processor, image).float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(pixels, theirs(again, image).float(), rtol=0, atol=1e-6)


def test_a_longest_edge_alone_fits_the_image_into_a_square():
    """transformers saves this form, but cannot resize an image with it."""
    read = read_preprocessor({"size": {"longest_edge": 48}}, "file")
    assert read == Preprocessing(resizing="fit", size=(48, 48))
    assert [resized_size(*size, read) for size in SIZES[:4]] == [(36, 48), (48, 36), (15, 48), (48, 3)]


@pytest.mark.parametrize("form", ["fit, padded", "stretch", "shortest above longest", "own size"])
def test_detections_equal_those_of_transformers(form, tiny, tmp_path):
    shutil.copytree(tiny.folder, tmp_path / "model")
    ConditionalDetrImageProcessorPil(**FORMS[form][0]).save_pretrained(tmp_path / "model")
    detector = Detector.from_pretrained(tmp_path / "model")
    detector.model.save_pretrained(tmp_path / "again")
    again = Detector.from_pretrained(tmp_path / "again")
    processor = ConditionalDetrImageProcessorPil.from_pretrained(tmp_path / "model")
    for image in images()[:3]:
        with torch.no_grad():
            output = tiny.transformers(theirs(processor, image)[None].float())
        height, width = image.height, image.width
        results = processor.post_process_object_detection(output, threshold=0, target_sizes=[(height, width)], top_k=5)
        ours, saved = detector(image, threshold=0, top_k=5), again(image, threshold=0, top_k=5)
        torch.testing.assert_close(ours.scores, results[0]["scores"], rtol=0, atol=1e-5)
        limits = torch.tensor([width, height, width, height])
        boxes = torch.minimum(results[0]["boxes"].clamp(min=0), limits)  # ours are clipped to the image
        torch.testing.assert_close(ours.boxes, boxes, rtol=0, atol=1e-2)
        assert ours.labels.tolist() == results[0]["labels"].tolist()
        assert torch.equal(saved.boxes, ours.boxes)


def test_the_example_without_this_library_resizes_in_the_same_way():
    from dataclasses import asdict

    spec = importlib.util.spec_from_file_location("run_onnx", ROOT / "examples" / "run_onnx.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for _, preprocessing in FORMS.values():
        settings = json.loads(json.dumps(asdict(preprocessing)))
        for size in SIZES:
            assert example.resized_size(*size, settings) == resized_size(*size, preprocessing)


def test_half_and_largest_sizes():
    assert Preprocessing(800, 1333).largest_size == (800, 1333)
    assert Preprocessing(800, 600).largest_size == (600, 600)
    assert Preprocessing(resizing="fit", size=(480, 640)).largest_size == (480, 640)
    assert Preprocessing(resizing="none").largest_size == (800, 1333)
    assert Preprocessing(800, 1333).halved() == Preprocessing(401, 667)
    assert Preprocessing(resizing="stretch", size=(480, 640)).halved().size == (241, 321)
    assert Preprocessing(resizing="none").halved() == Preprocessing(401, 667)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resizing": "crop"}, ValueError, "resizing: expected edges, fit, stretch or none, got 'crop'"),
        ({"resizing": "fit"}, ValueError, "size: expected one with the resizings fit and stretch only, got None"),
        ({"size": (9, 9)}, ValueError, r"size: expected one with .* got \(9, 9\)"),
        ({"resizing": "fit", "size": 9}, TypeError, r"size: expected a tuple \(height, width\), got 9"),
        ({"shortest_edge": 1.5}, TypeError, "shortest_edge: expected an int, got 1.5"),
        ({"longest_edge": 0}, ValueError, "longest_edge: expected 1 to 16384 pixels, got 0"),
        ({"std": (1.0, 1.0, 0.0)}, ValueError, "std: expected 3 numbers above 0"),
        ({"mean": (0.0, 0.0, float("nan"))}, ValueError, "mean: expected 3 numbers of at most"),
    ],
)
def test_preprocessing_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        Preprocessing(**options)


def test_a_mean_outside_the_colours_fills_with_the_nearest_one():
    """Zooming out fills the border with the mean, which other programs may set to any number."""
    from conditional_detr.data.augmentation import Augmentation, make_scene

    image = Image.new("RGB", (8, 8), (9, 9, 9))
    preprocessing = Preprocessing(mean=(-1.0, 0.5, 7.0), resizing="stretch", size=(32, 32))
    scene = make_scene(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)
    colours = {
        colour
        for _ in range(4)
        for _, colour in Augmentation(zoom=(0.2, 0.3))(scene, preprocessing, generator).image.getcolors(1024)
    }
    assert (0, 128, 255) in colours


def test_an_exported_model_keeps_the_resizing():
    metadata = Metadata(("cat",), preprocessing=Preprocessing(resizing="fit", size=(48, 64)))
    described = Description(Config(num_classes=1), metadata, "float32", None, (), "pattern", {}, {})
    assert Description.from_json(described.to_json()) == described
