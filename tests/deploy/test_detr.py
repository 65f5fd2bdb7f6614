"""Optimised, exported and quantised copies of a DETR equal it, with post-processing, at sizes it was not traced at."""

import pytest
import torch

from conditional_detr import DETR, Detector, ExportedModel, Metadata, Preprocessing, export, optimize, quantize
from conditional_detr.deploy.summary import summarise
from helpers.models import LEAST, Published, assert_same_detections, differences, pixels_of, two_images

BOUNDS = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.2, 0.03), torch.float16: (0.03, 0.004)}
SIZES = [(1, 64, 96), (2, 97, 131), (3, 160, 64)]


@pytest.fixture(scope="module")
def plain(tiny_detr) -> DETR:
    return DETR.from_pretrained(tiny_detr.folder)


@pytest.fixture(scope="module")
def least(tmp_path_factory) -> DETR:
    folder = tmp_path_factory.mktemp("least_detr")
    model = DETR.from_pretrained(Published(folder, architecture="detr", **LEAST).folder)
    model.metadata = Metadata((None, *model.metadata.class_names[1:]), preprocessing=Preprocessing(96, 160))
    return model


@pytest.mark.parametrize("dtype", BOUNDS)
def test_an_optimised_copy_equals_the_plain_model(plain, dtype):
    fast = optimize(plain, dtype=dtype)
    inputs = [(pixels_of(*size),) for size in SIZES] + [two_images(96, 128)]
    for logits, boxes in (differences(fast, plain, *one) for one in inputs):
        assert logits < BOUNDS[dtype][0]
        assert boxes < BOUNDS[dtype][1]


def test_the_published_architecture(r50_detr):
    plain = DETR.from_pretrained(r50_detr.folder)
    logits, boxes = differences(optimize(plain), plain, *two_images(96, 128))
    assert logits < 1e-4
    assert boxes < 1e-5


def test_a_compiled_copy_equals_the_plain_model(least):
    fast = optimize(least, compile=True)
    for size in ((1, 160, 224), (1, 97, 131)):
        assert max(differences(fast, least, pixels_of(*size))) < 1e-4


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_exported_models_equal_the_model(least, suffix, tmp_path, photograph):
    description = export(least, tmp_path / f"detr{suffix}", top_k=5)
    assert description.architecture == "detr"
    exported = ExportedModel(tmp_path / f"detr{suffix}")
    assert exported.description == description
    for size in SIZES:
        logits, boxes = differences(exported, least, pixels_of(*size))
        assert logits < 1e-4
        assert boxes < 1e-5
    assert_same_detections(Detector(exported)(photograph, threshold=0), Detector(least)(photograph, threshold=0), 0)


def test_postprocessing_in_the_file_equals_the_detectors(least, tmp_path, photograph):
    """The file has K rows for every image: scores of 0 stand for queries whose best class is not reported."""
    import onnxruntime

    export(least, tmp_path / "detr.onnx", top_k=11)
    session = onnxruntime.InferenceSession(tmp_path / "detr.onnx")
    pixels = pixels_of(1, 97, 131)
    corners, scores, labels = session.run(
        ["corners", "scores", "labels"], {"pixels": pixels.numpy(), "sizes": torch.tensor([[96, 128]]).numpy()}
    )
    with torch.no_grad():
        output = least(pixels)
    best, classes = output.logits[-1, 0].softmax(-1)[:, :-1].max(-1)
    best = best * (classes != 0)  # the first class has no name
    torch.testing.assert_close(torch.from_numpy(scores)[0], best.sort(descending=True).values, rtol=0, atol=1e-5)
    reported = scores[0] > 0
    assert labels[0][reported].tolist() == classes[best.argsort(descending=True)][reported].tolist()
    assert (corners >= 0).all()


def test_int8_has_the_form_of_the_model(least, tmp_path, photograph):
    pytest.importorskip("nncf")
    description = quantize(least, tmp_path / "int8.xml", [photograph], top_k=5)
    assert (description.precision, description.architecture) == ("int8", "detr")
    logits, boxes = differences(ExportedModel(tmp_path / "int8.xml"), least, pixels_of(1, 64, 96))
    assert logits < 5
    assert boxes < 0.5


def test_the_summary_counts_the_network_of_the_model(plain):
    summary = summarise(plain, (64, 96))
    assert summary.network == "DETR"
    assert summary.total == sum(parameter.numel() for parameter in plain.parameters())
    assert summarise(optimize(plain), (64, 96)) == summary
