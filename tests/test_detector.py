"""From a photograph to named boxes: from Python and from the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Detections, Detector, Metadata, Output, Preprocessing
from conditional_detr.cli import app
from conditional_detr.detector import select


@pytest.fixture(scope="module")
def detector(tiny) -> Detector:
    model = ConditionalDETR.from_pretrained(tiny.folder)
    names = (None, "cat", "dog", "bird", "fish", "horse", "ant")
    model.metadata = Metadata(names, preprocessing=Preprocessing(shortest_edge=128, longest_edge=200))
    return Detector(model)


def test_equals_transformers_from_picture_to_boxes(tiny, photograph):
    """transformers' processor, model and post-processing on the same weights; no class is unused."""
    from transformers import ConditionalDetrImageProcessorPil

    processor = ConditionalDetrImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 200})
    image = Image.open(photograph)
    with torch.no_grad():
        outputs = tiny.transformers(**processor(images=image, return_tensors="pt"))
    expected = processor.post_process_object_detection(outputs, 0.3, target_sizes=[(96, 128)], top_k=20)[0]
    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.metadata = Metadata(
        model.metadata.class_names, preprocessing=Preprocessing(shortest_edge=128, longest_edge=200)
    )
    found = Detector(model)(photograph, threshold=0.3, top_k=20)
    assert len(found) == len(expected["scores"]) > 5
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-5)
    assert found.labels.tolist() == expected["labels"].tolist()
    limits = torch.tensor([128, 96, 128, 96])
    clipped = torch.minimum(expected["boxes"].clamp(min=0), limits)
    torch.testing.assert_close(found.boxes, clipped, rtol=0, atol=0.01)
    assert found.names == tuple(f"LABEL_{label}" for label in found.labels.tolist())


def test_selection_by_hand():
    """Two queries, three classes of which the first is unused; the picture is 100 high and 200 wide."""
    logits = torch.tensor([[[[9.0, 0.0, 2.0], [9.0, 1.0, -3.0]]]])
    boxes = torch.tensor([[[[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]]]])
    rows = torch.tensor([1, 2])
    found, scores, labels = select(Output(logits, boxes), 0, (100, 200), rows, 0.5, 10)
    assert labels.tolist() == [2, 1]
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0]).sigmoid())
    expected = torch.tensor([[80.0, 30, 120, 70], [140, 0, 200, 30]])  # the second reaches beyond and is cut
    torch.testing.assert_close(found, expected)
    assert len(select(Output(logits, boxes), 0, (100, 200), rows, 0.0, 3)[0]) == 3


def test_a_list_gives_what_its_pictures_give(detector, photograph):
    image = np.asarray(Image.open(photograph))
    pictures = [image, image[:80, :100], image[::-1], photograph, image[:, :50], image[:80, :100]]
    together = detector(pictures, threshold=0.3, batch_size=2)
    assert isinstance(together, list)
    for picture, found in zip(pictures, together, strict=True):
        alone = detector(picture, threshold=0.3)
        assert found.labels.tolist() == alone.labels.tolist()
        torch.testing.assert_close(found.boxes, alone.boxes, rtol=0, atol=1e-2)
        torch.testing.assert_close(found.scores, alone.scores, rtol=0, atol=1e-4)
        assert found.size == alone.size
    assert isinstance(detector([image])[0], Detections)
    assert detector([]) == []


def test_unused_rows_and_unwanted_classes_are_not_reported(detector, photograph):
    found = detector(photograph, threshold=0, top_k=1000)
    assert len(found) == 11 * 6
    assert set(found.names) == {"cat", "dog", "bird", "fish", "horse", "ant"}
    assert set(detector(photograph, threshold=0, classes=["cat", 5]).names) == {"cat", "horse"}
    assert len(detector(photograph, threshold=0, top_k=7)) == 7
    assert len(detector(photograph, threshold=1)) == 0


def test_detections_are_sorted_and_inside_the_picture(detector, photograph):
    found = detector(photograph, threshold=0)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([128, 96, 128, 96])).all()
    box, score, name = next(iter(found))
    assert box == found.boxes[0].tolist()
    assert (score, name) == (found.scores[0].item(), found.names[0])
    assert repr(found).startswith(f"Detections({len(found)} on 96x128: {name} {score:.2f}")


def test_the_model_stays_as_it_was(detector, photograph):
    detector.model.train()
    trained = detector(photograph, threshold=0.3)
    assert detector.model.training
    detector.model.eval()
    assert torch.equal(trained.scores, detector(photograph, threshold=0.3).scores)


def test_drawing_changes_boxes_and_nothing_else(detector, photograph):
    found = detector(photograph, threshold=0.3, top_k=1)
    original, drawn = np.asarray(Image.open(photograph)), np.asarray(found.draw())
    assert drawn.shape == original.shape
    x0, y0, x1, y1 = found.boxes[0].round().int().tolist()
    changed = (drawn != original).any(-1)
    assert changed[min(y1, 95), (x0 + x1) // 2]
    assert changed[(y0 + y1) // 2, min(x1, 127)]
    assert not changed[y0 + 30 : y1 - 3, x0 + 3 : x1 - 3].any()
    for picture in [original, torch.from_numpy(original / 255).permute(2, 0, 1)]:
        again = np.asarray(detector(picture, threshold=0.3, top_k=1).draw())
        assert again.shape == original.shape


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"threshold: expected 0\.\.1, got 1.5"),
        ({"top_k": 0}, ValueError, "top_k: expected an int of at least 1, got 0"),
        ({"batch_size": 2.0}, ValueError, "batch_size: expected an int of at least 1, got 2.0"),
        ({"classes": ["cow"]}, ValueError, "classes: got 'cow', expected any of cat, dog, bird"),
        ({"classes": [0]}, ValueError, "classes: got 0, expected any of"),
        ({"classes": "cat"}, TypeError, "classes: expected a list of names or rows, got the string 'cat'"),
    ],
)
def test_arguments_that_make_no_sense(detector, photograph, options, error, message):
    with pytest.raises(error, match=message):
        detector(photograph, **options)


def test_pictures_that_make_no_sense(detector, photograph):
    with pytest.raises(TypeError, match=r"images\[1\]: expected a path"):
        detector([photograph, 3])
    with pytest.raises(TypeError, match="pictures: expected a picture or a list of them, got int"):
        detector(3)
    with pytest.raises(TypeError, match="model: expected a ConditionalDETR, got str"):
        Detector("model")


def test_a_replaced_head_needs_names(tiny, photograph):
    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.class_head = torch.nn.Linear(32, 2)
    with pytest.raises(ValueError, match="its class head has 2 classes, but its metadata names 7"):
        Detector(model)(photograph)
    model.metadata = Metadata(["a", "b"])
    assert set(Detector(model)(photograph, threshold=0).names) == {"a", "b"}
    with pytest.raises(TypeError, match="class_names: expected a sequence of strings, got 'ab'"):
        Metadata("ab")


# ---- command line


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_detect_prints_draws_and_writes(tiny, photograph, tmp_path):
    output = tmp_path / "out"
    result = run("detect", photograph, "--weights", tiny.folder, "--threshold", 0.3, "--top-k", 4, "--output", output)
    assert result.exit_code == 0, result.output
    written = json.loads((output / "photograph.json").read_text())
    expected = Detector.from_pretrained(tiny.folder)(photograph, threshold=0.3, top_k=4)
    assert written["picture"] == str(photograph)
    assert written["size"] == {"height": 96, "width": 128}
    assert [d["name"] for d in written["detections"]] == list(expected.names)
    assert [d["box"] for d in written["detections"]] == expected.boxes.tolist()
    assert [d["label"] for d in written["detections"]] == expected.labels.tolist()
    with Image.open(output / "photograph.png") as drawn:
        assert drawn.size == (128, 96)
    assert "4 objects" in result.output
    assert f"{expected.scores[0]:.3f}" in result.output


@pytest.mark.parametrize(
    ("picture", "options", "message"),
    [
        ("none.jpg", (), "error: none.jpg: no such file"),
        (None, ("--threshold", "2"), "error: threshold: expected 0..1, got 2.0"),
        (None, ("--device", "abacus"), "error: device: expected one that this machine has, got 'abacus'"),
    ],
)
def test_detect_fails_in_one_line(tiny, photograph, tmp_path, picture, options, message):
    result = run("detect", picture or photograph, "--weights", tiny.folder, "--output", tmp_path, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_detect_without_network_says_what_to_do(photograph, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    result = run("detect", photograph)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: weights 'microsoft/conditional-detr-resnet-50': neither in the cache")
    assert "pass a folder or file on disk" in result.stderr
    assert result.stderr.count("\n") == 1
