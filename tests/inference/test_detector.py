"""The detector: from an image to detections."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conditional_detr import ConditionalDETR, Detections, Detector, Metadata, Preprocessing
from conditional_detr.inference.postprocessing import Postprocessing, postprocess
from helpers.models import assert_same_detections


@pytest.fixture(scope="module")
def detector(tiny) -> Detector:
    model = ConditionalDETR.from_pretrained(tiny.folder)
    names = (None, "cat", "dog", "bird", "fish", "horse", "ant")
    model.metadata = Metadata(names, preprocessing=Preprocessing(shortest_edge=128, longest_edge=200))
    return Detector(model)


def test_equals_transformers_from_image_to_boxes(tiny, photograph):
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
    detections = Detector(model)(photograph, threshold=0.3, top_k=20)
    assert len(detections) == len(expected["scores"]) > 5
    torch.testing.assert_close(detections.scores, expected["scores"], rtol=0, atol=1e-5)
    assert detections.labels.tolist() == expected["labels"].tolist()
    limits = torch.tensor([128, 96, 128, 96])
    clipped = torch.minimum(expected["boxes"].clamp(min=0), limits)
    torch.testing.assert_close(detections.boxes, clipped, rtol=0, atol=0.01)
    assert detections.names == tuple(f"LABEL_{label}" for label in detections.labels.tolist())


def test_postprocessing_by_hand():
    """Two queries, three classes of which the first is unused; the image is 100 high and 200 wide."""
    logits = torch.tensor([[9.0, 0.0, 2.0], [9.0, 1.0, -3.0]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]])
    rows = torch.tensor([1, 2])
    corners, scores, labels, queries = postprocess(logits, boxes, (100, 200), Postprocessing(rows, 0.5, 10))
    assert labels.tolist() == [2, 1]
    assert queries.tolist() == [0, 1]
    torch.testing.assert_close(scores, torch.tensor([2.0, 1.0]).sigmoid())
    expected = torch.tensor([[80.0, 30, 120, 70], [140, 0, 200, 30]])  # the second reaches beyond and is cut
    torch.testing.assert_close(corners, expected)
    assert len(postprocess(logits, boxes, (100, 200), Postprocessing(rows, 0.0, 3))[0]) == 3


def test_a_list_gives_the_same_as_its_images(detector, photograph):
    values = np.asarray(Image.open(photograph))
    images = [values, values[:80, :100], values[::-1], photograph, values[:, :50], values[:80, :100]]
    together = detector(images, threshold=0.3, batch_size=2)
    assert isinstance(together, list)
    for image, detections in zip(images, together, strict=True):
        alone = detector(image, threshold=0.3)
        assert detections.labels.tolist() == alone.labels.tolist()
        torch.testing.assert_close(detections.boxes, alone.boxes, rtol=0, atol=1e-2)
        torch.testing.assert_close(detections.scores, alone.scores, rtol=0, atol=1e-4)
        assert detections.size == alone.size
    assert isinstance(detector([values])[0], Detections)
    assert detector([]) == []


def test_unused_rows_and_unwanted_classes_are_not_reported(detector, photograph):
    detections = detector(photograph, threshold=0, top_k=1000)
    assert len(detections) == 11 * 6
    assert set(detections.names) == {"cat", "dog", "bird", "fish", "horse", "ant"}
    assert set(detector(photograph, threshold=0, classes=["cat", 5]).names) == {"cat", "horse"}
    assert len(detector(photograph, threshold=0, top_k=7)) == 7
    assert len(detector(photograph, threshold=1)) == 0


def test_detections_are_sorted_and_inside_the_image(detector, photograph):
    detections = detector(photograph, threshold=0)
    assert detections.scores.tolist() == sorted(detections.scores.tolist(), reverse=True)
    assert (detections.boxes >= 0).all()
    assert (detections.boxes <= torch.tensor([128, 96, 128, 96])).all()
    box, score, name = next(iter(detections))
    assert box == detections.boxes[0].tolist()
    assert (score, name) == (detections.scores[0].item(), detections.names[0])
    assert repr(detections).startswith(f"Detections({len(detections)} on 96x128: {name} {score:.2f}")


def test_the_mode_of_the_model_is_kept(detector, photograph):
    detector.model.train()
    trained = detector(photograph, threshold=0.3)
    assert detector.model.training
    detector.model.eval()
    assert torch.equal(trained.scores, detector(photograph, threshold=0.3).scores)


def test_drawing_changes_boxes_and_nothing_else(detector, photograph):
    detections = detector(photograph, threshold=0.3, top_k=1)
    original, drawn = np.asarray(Image.open(photograph)), np.asarray(detections.draw())
    assert drawn.shape == original.shape
    x0, y0, x1, y1 = detections.boxes[0].round().int().tolist()
    changed = (drawn != original).any(-1)
    assert changed[min(y1, 95), (x0 + x1) // 2]
    assert changed[(y0 + y1) // 2, min(x1, 127)]
    assert not changed[y0 + 30 : y1 - 3, x0 + 3 : x1 - 3].any()
    for image in [original, torch.from_numpy(original / 255).permute(2, 0, 1)]:
        again = np.asarray(detector(image, threshold=0.3, top_k=1).draw())
        assert again.shape == original.shape


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, r"threshold: expected 0\.\.1, got 1.5"),
        ({"top_k": 0}, ValueError, "top_k: expected an int of at least 1, got 0"),
        ({"batch_size": 2.0}, ValueError, "batch_size: expected an int of at least 1, got 2.0"),
        (
            {"classes": ["cow"]},
            ValueError,
            "classes: expected names or rows .*, got 'cow'; the names are cat, dog, bird",
        ),
        ({"classes": [0]}, ValueError, "classes: expected names or rows .*, got 0; the names are"),
        ({"classes": "cat"}, TypeError, "classes: expected a list of names or rows, got the string 'cat'"),
    ],
)
def test_invalid_arguments(detector, photograph, options, error, message):
    with pytest.raises(error, match=message):
        detector(photograph, **options)


def test_invalid_images(detector, photograph):
    with pytest.raises(TypeError, match=r"images\[1\]: expected a path"):
        detector([photograph, 3])
    for image in (3, {"a": photograph}, {photograph}):
        with pytest.raises(TypeError, match="images: expected an image, or a list or iterator of them, got"):
            detector(image)
    with pytest.raises(
        TypeError, match="model: expected a ConditionalDETR or DETR, an optimised copy or an ExportedModel, got str"
    ):
        Detector("model")


def test_a_replaced_head_needs_names(tiny, photograph):
    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.class_head = torch.nn.Linear(32, 2)
    with pytest.raises(ValueError, match=r"model\.metadata: expected 2 class names, .*, got 7"):
        Detector(model)(photograph)
    model.metadata = Metadata(["a", "b"])
    assert set(Detector(model)(photograph, threshold=0).names) == {"a", "b"}
    with pytest.raises(TypeError, match="class_names: expected a sequence of strings, got 'ab'"):
        Metadata("ab")


def test_equals_transformers_on_photographs(shared, r50):
    """The published size, R50, real images: transformers' processor, model and post-processing."""
    from transformers import ConditionalDetrImageProcessorPil

    processor = ConditionalDetrImageProcessorPil()
    detector = Detector.from_pretrained(r50.folder)
    paths = sorted((shared / "data/coco/val2017").glob("*.jpg"))[:30:15]
    for path, detections in zip(paths, detector(paths, threshold=0, top_k=50), strict=True):
        image = Image.open(path).convert("RGB")
        with torch.no_grad():
            outputs = r50.transformers(**processor(images=image, return_tensors="pt"))
        expected = processor.post_process_object_detection(outputs, 0.0, target_sizes=[image.size[::-1]], top_k=50)[0]
        torch.testing.assert_close(detections.scores, expected["scores"], rtol=0, atol=1e-4)
        boxes = expected["boxes"].clamp(min=0).minimum(torch.tensor([*image.size, *image.size]))
        torch.testing.assert_close(detections.boxes, boxes, rtol=0, atol=0.05)
        assert detections.labels.tolist() == expected["labels"].tolist()


def test_images_of_mixed_sizes_equal_one_at_a_time(detector, shared):
    paths = sorted((shared / "data/coco/val2017").glob("*.jpg"))
    assert len(paths) == 66
    together = detector(paths, threshold=0.5, batch_size=4)
    for path, many in zip(paths, together, strict=True):
        alone = detector(path, threshold=0.5)
        assert many.source == alone.source == path
        assert_same_detections(many, alone, 0.5)


def test_an_iterator_gives_an_iterator_with_bounded_reading_ahead(detector, photograph):
    read = 0

    def images():
        nonlocal read
        for _ in range(40):
            read += 1
            yield photograph

    detections = detector(images(), threshold=0, top_k=1, batch_size=2)
    assert not isinstance(detections, list)
    first = next(detections)
    assert read <= 2 + 4 + 2
    assert torch.equal(first.boxes, detector([photograph] * 2, threshold=0, top_k=1)[0].boxes)
    assert len(list(detections)) == 39
    with pytest.raises(ValueError, match="threshold"):
        detector(images(), threshold=2)  # at once, not at the first result


def test_a_model_with_values_that_are_not_finite(tiny, photograph):
    detector = Detector(ConditionalDETR.from_pretrained(tiny.folder))
    with torch.no_grad():
        detector.model.class_head.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"photograph\.png: the model returned logits or boxes that are not finite"):
        detector([photograph])


def test_a_part_in_eval_mode_stays_in_eval_mode(tiny, photograph):
    model = ConditionalDETR.from_pretrained(tiny.folder).train()
    model.encoder.eval()
    Detector(model)(photograph)
    assert not model.encoder.training
    assert not model.encoder.layers[0].training
    assert model.decoder.training


def test_attention_is_drawn_for_the_query_of_a_detection(detector, photograph):
    """The figure equals one drawn from the model's maps of the query."""
    from conditional_detr.inference.drawing import draw_attention
    from conditional_detr.inference.images import open_image
    from conditional_detr.inference.preprocessing import to_pixels

    detections = detector(photograph, threshold=0, top_k=9)
    box, score, name = detections[8]
    model = detector.model
    pixels = to_pixels(open_image(photograph, "image"), model.metadata.preprocessing)[None]
    with torch.no_grad():
        maps = model.attention_maps(pixels, layers=(0, 2))
    of_query = [part[0, :, detections.queries[8]] for part in maps]
    title = f"{name} {score:.2f}, decoder layer 0, 2"
    expected = draw_attention(Image.open(photograph), *of_query, box=box, title=title)
    figure = detector.draw_attention(detections, 8, layers=(0, 2))
    assert np.array_equal(np.asarray(figure), np.asarray(expected))
    assert not np.array_equal(np.asarray(figure), np.asarray(detector.draw_attention(detections, 0, layers=(0, 2))))
    with pytest.raises(IndexError):
        detector.draw_attention(detections, 9)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_images(small, tmp_path):
    """Compare the peak memory of a process after 66 images and after ten times as many."""
    generator = np.random.default_rng(0)
    for number in range(66):
        size = (int(generator.integers(200, 400)), int(generator.integers(200, 400)), 3)
        Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(tmp_path / f"{number}.png")
    code = f"""
import re
from pathlib import Path
from conditional_detr import Detector
detector = Detector.from_pretrained({str(small)!r})
paths = sorted(Path({str(tmp_path)!r}).glob("*.png"))
for times in (1, 10):
    count = sum(len(detections) for detections in detector(iter(paths * times), threshold=0.0, batch_size=2))
    assert count == 11 * 7 * len(paths) * times
    print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])  # rusage has the parent's peak
"""
    few, many = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    assert many < 1.05 * few, (few, many)


@pytest.mark.parametrize(
    ("size", "count", "batch_size", "expected"),
    [
        ((600, 700), 3, None, [1, 1, 1]),
        ((400, 450), 5, None, [2, 2, 1]),
        ((32, 32), 11, None, [8, 3]),
        ((600, 700), 3, 4, [3]),
    ],
)
def test_large_images_run_in_smaller_batches_on_a_cpu(tiny, size, count, batch_size, expected):
    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.metadata = Metadata(model.metadata.class_names, preprocessing=Preprocessing(resizing="none"))
    runs = []
    model.register_forward_pre_hook(lambda _, arguments: runs.append(len(arguments[0])))
    Detector(model)([Image.new("RGB", size[::-1])] * count, batch_size=batch_size)
    assert runs == expected
