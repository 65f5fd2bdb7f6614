"""hotcoco's metrics are pycocotools', to the last bit; pycocotools computes them where hotcoco is missing."""

import contextlib
import io
import multiprocessing
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conditional_detr.evaluation import average_precision as engines
from conditional_detr.evaluation.coco import METRICS, evaluate_detections
from helpers.fuzzing import LIMITS

IDS = {
    "small": lambda i: i,
    "negative": lambda i: -7 * i,
    "beyond 2**63": lambda i: 2**63 + i,
    "beyond float": lambda i: 10**400 - i,
    "strings": lambda i: f"id {i}",
}


def boxes(generator, count, numbers):
    """Return boxes whose sides may be zero, and that overlap by exact fractions if they are integers."""
    if numbers == "integers":
        return np.column_stack((generator.integers(0, 12, (count, 2)), generator.integers(0, 9, (count, 2)))) * 10.0
    scale = {"floats": 1.0, "huge": 1e12, "tiny": 1e-150}[numbers]
    return generator.uniform(0, 150, (count, 4)) * generator.choice([0, 1, 1, 1, 1], (count, 4)) * scale


def dataset(seed, images=6, categories=4, detections=60, numbers="integers", ids="small"):
    """Return annotations and results: images and categories without any, crowds, areas of any kind, equal scores."""
    generator = np.random.default_rng(seed)
    image_ids, category_ids = ([IDS[ids](i) for i in generator.permutation(n).tolist()] for n in (images, categories))
    annotations = []
    given_boxes = boxes(generator, 4 * images, numbers)
    for i, box in enumerate(given_boxes):
        entry = {"id": i, "image_id": image_ids[generator.integers(0, images)], "bbox": box.tolist()}
        entry["category_id"] = category_ids[generator.integers(0, max(1, categories - 1))]
        if generator.random() < 0.8:
            area = generator.choice([box[2] * box[3] / 2, 0, 32.0**2, 96.0**2, 1e10, 1e11, -1])
            entry["area"] = float(area)
        if generator.random() < 0.5:
            entry["iscrowd"] = int(generator.random() < 0.3)
        if generator.random() < 0.2:
            entry["ignore"] = int(generator.random() < 0.5)  # pycocotools writes over it
        annotations.append(entry)
    annotations[0]["iscrowd"] = 0
    results = [
        {
            "image_id": image_ids[generator.integers(0, max(1, images - 1))],
            "category_id": category_ids[generator.integers(0, categories)],
            "bbox": box.tolist(),
            "score": float(generator.choice([0.0, 0.1, 0.25, 0.5, generator.random()])),
        }
        for box in boxes(generator, detections, numbers)
    ]
    for result in results[::3]:  # others are boxes of annotations, exactly or nearly
        entry = annotations[generator.integers(0, len(annotations))]
        x0, y0, width, height = entry["bbox"]
        result |= {key: entry[key] for key in ("image_id", "category_id")}
        result["bbox"] = [x0, y0, width, height * generator.choice([1, 1, 0.5, 0.75, 0.999])]
    truth = {
        "images": [{"id": i} for i in image_ids],
        "categories": [{"id": i, "name": f"class {i}"[-20:]} for i in category_ids],
        "annotations": annotations,
    }
    return truth, results


def pycocotools_alone(truth, results):
    """Return pycocotools' evaluation of annotations and results, with ids that it can handle."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {
        key: {i: n for n, i in enumerate(sorted(entry["id"] for entry in truth[name]), 1)}
        for key, name in (("image_id", "images"), ("category_id", "categories"))
    }

    def to_coco(entries):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": n} for n in numbers["image_id"].values()],
            "categories": [{"id": n} for n in numbers["category_id"].values()],
            "annotations": [
                {
                    "iscrowd": 0,
                    "area": entry["bbox"][2] * entry["bbox"][3],
                    **entry,
                    "id": n,
                    **{key: numbers[key][entry[key]] for key in numbers},
                }
                for n, entry in enumerate(entries, 1)
            ],
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(to_coco(truth["annotations"]), to_coco(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_identical(truth, results):
    """Compare the twelve metrics and those of each class with pycocotools', without a tolerance."""
    actual = evaluate_detections(truth, results)
    expected = pycocotools_alone(truth, results)
    assert actual.metrics == dict(zip(METRICS, expected.stats.tolist(), strict=True))
    precision, recall = expected.eval["precision"][..., 0, 2], expected.eval["recall"][..., 0, 2]
    assert len(actual.per_class) == len(truth["categories"])
    ids = sorted(category["id"] for category in truth["categories"])
    for of_class in actual.per_class.values():
        k = ids.index(of_class["category_id"])
        columns = {"AP": precision[..., k], "AP50": precision[0, :, k], "AP75": precision[5, :, k]}
        for name, values in {**columns, "AR100": recall[:, k]}.items():
            valid = values[values > -1]
            assert of_class[name] == (valid.mean() if valid.size else -1)


@LIMITS
@given(
    seed=st.integers(0, 2**32),
    images=st.integers(1, 12),
    categories=st.integers(1, 6),
    detections=st.integers(0, 150),
    numbers=st.sampled_from(["integers", "floats", "huge", "tiny"]),
    ids=st.sampled_from(sorted(IDS)),
)
@example(seed=0, images=1, categories=1, detections=0, numbers="floats", ids="small")
@example(seed=1, images=2, categories=1, detections=900, numbers="integers", ids="strings")  # over 100 per class
@example(seed=2, images=2, categories=2, detections=900, numbers="floats", ids="beyond 2**63")
def test_random_sets_are_identical_to_pycocotools(**options):
    assert_identical(*dataset(**options))


@LIMITS
@given(st.integers(0, 2**32), st.sampled_from(["integers", "floats"]))
def test_both_engines_return_the_same_arrays(seed, numbers):
    generator = np.random.default_rng(seed)
    images, categories, count = generator.integers(1, 8, 3)

    def rows(count):
        places = [generator.integers(0, n, count) for n in (images, categories)]
        return np.column_stack((*places, boxes(generator, count, numbers)))

    annotations, detections = rows(4 * count), rows(20 * count)
    annotations = np.column_stack((annotations, 1000 * generator.random(4 * count), generator.random(4 * count) < 0.1))
    detections = np.column_stack((detections, generator.integers(0, 20, 20 * count) / 20))
    arguments = (int(images), int(categories), annotations, detections)
    for ours, theirs in zip(engines._with_hotcoco(*arguments), engines._with_pycocotools(*arguments), strict=True):
        assert ours.dtype == theirs.dtype == np.float64
        assert np.array_equal(ours, theirs)


def test_other_numbers_when_the_order_of_equal_scores_changes():
    """The comparisons above can fail: the first of two equal scores is taken first."""
    truth, results = dataset(0, images=1, categories=1, detections=30)
    results = [{**result, "score": 0.5} for result in results]
    assert evaluate_detections(truth, results) != evaluate_detections(truth, results[::-1])
    assert_identical(truth, results)
    assert_identical(truth, results[::-1])


# ---- without hotcoco, and after a fork


@pytest.fixture
def search_again():
    """Look for hotcoco again, before and after a test."""
    engines._has_hotcoco.cache_clear()
    yield
    engines._has_hotcoco.cache_clear()


def test_pycocotools_computes_the_metrics_where_hotcoco_is_missing(search_again, monkeypatch):
    truth, results = dataset(3)
    expected = evaluate_detections(truth, results)
    engines._has_hotcoco.cache_clear()
    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(engines, "_with_hotcoco", None)
    with pytest.warns(
        UserWarning, match=r"^hotcoco cannot be imported \(.*\); .* slowly: pip install hotcoco$"
    ) as caught:
        assert evaluate_detections(truth, results) == expected
    assert [warning.filename for warning in caught] == [__file__]
    assert evaluate_detections(truth, results) == expected  # and no second warning, which would be an error


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_evaluates():
    """A child of a process that used hotcoco lacks its threads."""
    truth, results = dataset(4, images=40, detections=2000, numbers="floats")
    expected = evaluate_detections(truth, results)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(evaluate_detections, (truth, results)).get(timeout=60) == expected
