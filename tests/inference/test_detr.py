"""Detections of DETR: against transformers from image to boxes, and post-processing by hand."""

import pytest
import torch
from PIL import Image

from conditional_detr import DETR, Detector, Metadata, Preprocessing
from conditional_detr.inference.postprocessing import Postprocessing, postprocess
from conditional_detr.modeling.scores import SigmoidScores, SoftmaxScores

NAMES = (None, "cat", "dog", "bird", "fish", "horse", "ant")


def model_of(checkpoint, names=None) -> DETR:
    model = DETR.from_pretrained(checkpoint.folder)
    names = names or model.metadata.class_names
    model.metadata = Metadata(names, preprocessing=Preprocessing(shortest_edge=128, longest_edge=200))
    return model


def test_equals_transformers_from_image_to_boxes(tiny_detr, photograph):
    """transformers' processor, model and post-processing on the same weights; no class is unused."""
    from transformers import DetrImageProcessorPil

    processor = DetrImageProcessorPil(size={"shortest_edge": 128, "longest_edge": 200})
    image = Image.open(photograph)
    with torch.no_grad():
        outputs = tiny_detr.transformers(**processor(images=image, return_tensors="pt"))
    expected = processor.post_process_object_detection(outputs, 0.15, target_sizes=[(96, 128)])[0]
    detections = Detector(model_of(tiny_detr))(photograph, threshold=0.15)
    assert 3 < len(detections) == len(expected["scores"])
    order = expected["scores"].argsort(descending=True)
    torch.testing.assert_close(detections.scores, expected["scores"][order], rtol=0, atol=1e-4)
    assert detections.labels.tolist() == expected["labels"][order].tolist()
    limits = torch.tensor([128, 96, 128, 96])
    clipped = torch.minimum(expected["boxes"][order].clamp(min=0), limits)
    torch.testing.assert_close(detections.boxes, clipped, rtol=0, atol=0.05)


def test_postprocessing_by_hand():
    """Four queries, two classes and "no object": a class, "no object", the unreported class, and a class less sure."""
    scores = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.1, 0.7], [0.1, 0.7, 0.2], [0.35, 0.25, 0.4]])
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1] * 4, [0.2] * 4, [0.9, 0.1, 0.4, 0.4]])
    options = Postprocessing(torch.tensor([0]), 0.0, 10, SoftmaxScores())
    corners, found, labels, queries = postprocess(scores.log() + 5, boxes, (100, 200), options)
    assert labels.tolist() == [0, 0, 0]
    assert queries.tolist() == [0, 3, 1]
    torch.testing.assert_close(found, torch.tensor([0.6, 0.35, 0.2]), rtol=0, atol=1e-6)
    torch.testing.assert_close(corners[:2], torch.tensor([[80.0, 30, 120, 70], [140, 0, 200, 30]]))
    both = Postprocessing(torch.tensor([0, 1]), 0.3, 2, SoftmaxScores())
    assert [x.tolist() for x in postprocess(scores.log(), boxes, (100, 200), both)[2:]] == [[1, 0], [2, 0]]


def test_scores_by_hand():
    logits = torch.tensor([1.0, 2.0, 5.0]).log()
    torch.testing.assert_close(SoftmaxScores()(logits), torch.tensor([1 / 8, 2 / 8]))
    torch.testing.assert_close(SigmoidScores()(logits), torch.tensor([1 / 2, 2 / 3, 5 / 6]))


def test_a_query_gives_one_detection_and_classes_select_among_them(tiny_detr, photograph):
    detector = Detector(model_of(tiny_detr, NAMES))
    everything = detector(photograph, threshold=0, top_k=1000)
    assert len(set(everything.queries.tolist())) == len(everything) <= 11
    assert None not in everything.names
    chosen = [everything.names[0]]
    some = detector(photograph, threshold=0, classes=chosen)
    assert some.names == everything.filter(classes=chosen).names
    assert torch.equal(some.scores, everything.filter(classes=chosen).scores)
    assert len(detector(photograph, threshold=0, top_k=2)) == 2


def test_attention_is_drawn(tiny_detr, photograph):
    detector = Detector(model_of(tiny_detr))
    drawn = detector.draw_attention(detector(photograph, threshold=0), layers=(0, -1))
    assert drawn.width > drawn.height > 0


def test_a_model_with_other_class_names_than_rows_is_refused(tiny_detr, photograph):
    model = model_of(tiny_detr)
    model.metadata = Metadata.numbered(8)
    with pytest.raises(ValueError, match=r"model\.metadata: expected 7 class names"):
        Detector(model)(photograph)
