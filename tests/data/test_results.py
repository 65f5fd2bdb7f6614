"""Results that are read together are those that are read one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conditional_detr.data import results as module
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.results import read_results
from helpers.fuzzing import LIMITS

TRUTH = read_annotations(
    {
        "images": [{"id": 1}, {"id": 2**70}],
        "categories": [{"id": "a", "name": "cat"}, {"id": "b", "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": "a", "bbox": [0, 0, 5, 5]}],
    }
)
RIGHT = {"image_id": 1, "category_id": "b", "bbox": [1, 2.5, 3, 0], "score": 0.5}
NUMBERS = (
    st.integers(-1, 3) | st.floats() | st.sampled_from([True, "1", None, 10**400, 1e15, 10**15 + 1, np.float32(1)])
)
BOXES = st.lists(NUMBERS, min_size=3, max_size=5) | st.sampled_from([(1, 1, 2, 2), np.ones(4), "1234", 7, None, [[]]])
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "image_id": st.sampled_from([1, 2**70, 1.0, True, np.int64(1), "1", None, [1]]),
        "category_id": st.sampled_from(["a", "b", "c", np.str_("a"), b"a", {}]),
        "bbox": BOXES,
        "score": NUMBERS,
    },
)


def outcome(content):
    """Return what is read, or the message of the error."""
    try:
        read = read_results(content, TRUTH)
    except ValueError as error:
        return str(error)
    return read.image_ids, read.category_ids, read.boxes.tolist(), read.scores.tolist()


@LIMITS
@given(st.lists(CHANGES, max_size=3), st.sampled_from([None, "image_id", "category_id", "bbox", "score"]))
def test_together_or_one_by_one(changes, missing):
    content = [RIGHT, *({**RIGHT, **change} for change in changes)]
    content.append({key: value for key, value in RIGHT.items() if key != missing})
    together = outcome(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_read_columns", lambda *_: None)
        assert together == outcome(content)


@pytest.mark.parametrize("content", [[], [RIGHT] * 3, [RIGHT, {**RIGHT, "image_id": 2**70, "score": 10**300}]])
def test_usual_results_are_read_together(content):
    read = module._read_columns(content, TRUTH)
    assert outcome(content) == (read.image_ids, read.category_ids, read.boxes.tolist(), read.scores.tolist())
    assert read.boxes.shape == (len(content), 4)
    assert (read.boxes.dtype, read.scores.dtype) == (np.float64, np.float64)
