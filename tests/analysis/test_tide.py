"""Kinds of errors and their costs: by hand, and against the authors' tidecv."""

import json
import warnings

import numpy as np
import pytest

from conditional_detr.analysis.analysis import analyse_detections
from conditional_detr.analysis.matching import match
from conditional_detr.analysis.tide import KINDS, find_errors
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.results import read_results
from conditional_detr.evaluation.average_precision import average_precision
from conditional_detr.evaluation.coco import group_by_image, to_arrays
from helpers.analysis import arrays, known_case, random_arrays

THEIRS = dict(zip(KINDS, ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), strict=True))


def tidecv_of(given):
    """Return the run of tidecv, its main errors and its special errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its plotting packages
        tidecv = pytest.importorskip("tidecv")
    truth, found = tidecv.Data("truth", max_dets=10**6), tidecv.Data("found", max_dets=10**6)
    for i in range(given.images):
        truth.add_image(i, str(i))
        found.add_image(i, str(i))
    for row in given.annotations:
        add = truth.add_ignore_region if row[7] else truth.add_ground_truth
        add(int(row[0]), int(row[1]), row[2:6].tolist())
    for row in given.detections:
        found.add_detection(int(row[0]), int(row[1]), row[6], row[2:6].tolist())
    tide = tidecv.TIDE()
    run = tide.evaluate(truth, found, mode=tidecv.TIDE.BOX)
    errors = tide.get_all_errors()
    return run, errors["main"]["found"], errors["special"]["found"]


def assert_as_tidecv(given):
    errors = find_errors(match(given))
    run, main, special = tidecv_of(given)
    for kind, name in THEIRS.items():
        assert errors.costs[kind] == pytest.approx(main[name] / 100, abs=1e-9), kind
    assert errors.false_positives == pytest.approx(special["FalsePos"] / 100, abs=1e-9)
    assert errors.false_negatives == pytest.approx(special["FalseNeg"] / 100, abs=1e-9)
    return errors, {kind.short_name: count for kind, count in run.count_errors().items()}


@pytest.mark.parametrize("crowds", [0, 0.2])
@pytest.mark.parametrize("seed", range(4))
def test_costs_as_tidecv(seed, crowds):
    errors, counts = assert_as_tidecv(random_arrays(seed, crowds=crowds))
    assert min(errors.counts.values()) > 0
    assert min(errors.costs.values()) > 0
    if not crowds:
        assert errors.counts == {kind: counts[name] for kind, name in THEIRS.items()}


def test_costs_as_tidecv_on_coco(shared):
    """Real annotations, with crowds; without classes that have none: tidecv counts their AP as 0, COCO does not."""
    folder = shared / "data" / "coco_eval"
    data = read_annotations(folder / "instances_val2014_100.json")
    results = read_results(folder / "instances_val2014_fakebbox100_results.json", data)
    given = to_arrays(data, group_by_image(results, data))
    with_annotations = np.unique(given.annotations[given.annotations[:, 7] == 0, 1])
    given = given._replace(detections=given.detections[np.isin(given.detections[:, 1], with_annotations)])
    given = given._replace(annotations=given.annotations[np.isin(given.annotations[:, 1], with_annotations)])
    given.detections[:, 6] -= 1e-9 * np.arange(len(given.detections))  # tidecv reorders equal scores
    errors, _ = assert_as_tidecv(given)
    assert errors.counts["missed"] > 0


def test_one_error_of_each_kind():
    """Cats: 4, of which 2 are found; the dog is not."""
    content, results = known_case()
    analysis = analyse_detections(content, results)
    assert analysis.errors.counts == dict.fromkeys(KINDS, 1)
    kinds = {score: KINDS[kind] for score, kind in zip(analysis.matches.scores, analysis.errors.kinds, strict=True)}
    kinds = {score: kind for score, kind in kinds.items() if score not in (0.95, 0.8)}
    expected = ("classification", "localisation", "duplicate", "background", "both")
    assert kinds == dict(zip((0.9, 0.85, 0.75, 0.7, 0.65), expected, strict=True))
    assert (analysis.errors.kinds[analysis.matches.correct] == -1).all()
    assert analysis.errors.missed.tolist() == [False, False, False, False, True]


def test_costs_by_hand():
    """Precision of cats: 1 up to a recall of 1/4, 2/3 up to 1/2; of the dog: 0. 26 of 101 recalls are up to 1/4."""
    content, results = known_case()
    costs = analyse_detections(content, results).errors.costs
    now = (26 + 25 * 2 / 3) / 101 / 2
    cats = {
        # the dog of 0.9 becomes a cat: correct at 0.95, 0.9 and 0.8, wrong at 0.85
        "classification": (51 + 25 * 3 / 4) / 101,
        # the small box of 0.85 becomes right: 3 of 4 found without error
        "localisation": 76 / 101,
        "both": (26 + 25 * 2 / 3) / 101,
        "duplicate": (26 + 25 * 2 / 3) / 101,
        "background": (26 + 25 * 2 / 3) / 101,
    }
    for kind, ap in cats.items():
        assert costs[kind] == pytest.approx(ap / 2 - now), kind
    # without the dog, its class has a detection and nothing to find: 0, as before
    assert costs["missed"] == 0


def test_a_class_whose_objects_are_all_missed():
    """Once the objects do not count, and nothing is detected, the other class alone decides."""
    box = (0, 0, 10, 10)
    errors = find_errors(match(arrays([(0, 0, *box), (0, 1, 50, 50, 10, 10)], [(0, 0, *box, 0.9)])))
    assert errors.costs["missed"] == pytest.approx(0.5)
    assert errors.false_negatives == pytest.approx(0.5)
    alone = find_errors(match(arrays([(0, 0, *box)], [])))
    assert alone.costs["missed"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_all_corrections_begin_at_the_evaluators_ap(seed):
    """False positives: without them, AP is the recall at 101 points; so AP50 of the evaluator is what was there."""
    given = random_arrays(seed, categories=2)
    errors = find_errors(match(given))
    recall = average_precision(*given).recall[0, :, 0, 2]
    perfect = np.mean([(np.arange(101) / 100 <= one).mean() for one in recall])
    assert perfect - errors.false_positives == pytest.approx(average_precision(*given).summary[1], abs=2e-3)


def test_nothing_to_measure():
    box = (0, 0, 10, 10)
    for given in (arrays([], []), arrays([], [(0, 0, *box, 0.5)])):
        errors = find_errors(match(given))
        assert set(errors.costs.values()) == {0}
    assert errors.counts == {**dict.fromkeys(KINDS, 0), "background": 1}
    assert json.dumps(errors.costs)
