"""Track ids and counts on the drawn film, measured by motmetrics, and against crossings that are worked by hand."""

import json
import warnings

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou
from typer.testing import CliRunner

from conditional_detr.cli import app
from conditional_detr.inference.detections import Detections
from conditional_detr.video.tracking import Crossings, Tracker
from helpers.films import SHAPES, SIZE, box_of, draw_frame, labels_of, write_film

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import motmetrics


def detections_of(boxes, labels, scores=None) -> Detections:
    return Detections(
        boxes=torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor([0.9] * len(boxes) if scores is None else scores),
        labels=torch.tensor(labels, dtype=torch.int64),
        names=tuple(f"class {label}" for label in labels),
        category_ids=tuple(labels),
        queries=torch.zeros(len(boxes), dtype=torch.int64),
        size=SIZE,
        source=None,
    )


def metrics_of(tracks):
    """Return motmetrics' numbers of tracks: ids and boxes of each frame, against the shapes of the film."""
    counted = motmetrics.MOTAccumulator(auto_id=True)

    for index, (ids, boxes) in enumerate(tracks):
        truth = torch.tensor([box_of(shape, index) for shape in SHAPES])
        distances = 1 - box_iou(truth, torch.tensor(np.array(boxes)).reshape(-1, 4).float()).double().numpy()
        counted.update(range(len(SHAPES)), ids, np.where(distances <= 0.5, distances, np.nan))
    names = ["idf1", "num_switches", "num_unique_objects", "num_misses"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return motmetrics.metrics.create().compute(counted, metrics=names).iloc[0]


def test_shapes_keep_their_ids_through_noise_and_gaps():
    """Boxes of the film, moved by about a pixel, in another order in each frame, and each missed now and then."""
    random = np.random.default_rng(0)
    tracker, tracks = Tracker(30.0), []
    for index in range(60):
        rows = [row for row in random.permutation(len(SHAPES)) if index < 2 or random.random() > 0.03]
        boxes = [np.array(box_of(SHAPES[row], index)) + random.normal(0, 1, 4) for row in rows]
        found = detections_of(
            boxes, [labels_of()[row] for row in rows], random.uniform(0.55, 0.95, len(rows)).tolist()
        )
        tracked = tracker.update(found, index / 30)
        kept = [row for row, track in enumerate(tracked.ids) if track is not None]
        tracks.append(([tracked.ids[row] for row in kept], [boxes[row] for row in kept]))
    metrics = metrics_of(tracks)
    assert metrics["num_switches"] == 0
    assert metrics["idf1"] >= 0.95
    assert {track for ids, _ in tracks for track in ids} == set(tracks[-1][0]) | set(tracks[30][0])
    assert len({track for ids, _ in tracks for track in ids}) == 3


@pytest.mark.slow
def test_the_film_by_the_shipped_weights(tmp_path):
    """From the encoded film to the MOT challenge's text."""
    film = write_film(tmp_path / "film.mp4", 60)
    options = ["--weights", "shapes", "--output", str(tmp_path / "out"), "--track", "--mot", "--no-video"]
    result = CliRunner().invoke(app, ["video", str(film), *options, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    rows = np.loadtxt(tmp_path / "out" / "tracks.txt", delimiter=",")
    tracks = []
    for index in range(60):
        x, y, width, height = rows[rows[:, 0] == index + 1][:, 2:6].T
        boxes = np.stack([x - 1, y - 1, x - 1 + width, y - 1 + height], 1)
        tracks.append((rows[rows[:, 0] == index + 1][:, 1].astype(int).tolist(), boxes))
    metrics = metrics_of(tracks)
    assert metrics["num_switches"] == 0
    assert metrics["idf1"] >= 0.95


def walk(tracker, centres):
    """Return what the tracker says of one object whose centre is at these points."""
    boxes = [[[x - 10, y - 10, x + 10, y + 10]] for x, y in centres]
    return [tracker.update(detections_of(box, [0]), index / 30) for index, box in enumerate(boxes)]


@pytest.mark.parametrize(
    ("step", "expected"), [(4, Crossings(left=0, right=1)), (-4, Crossings(left=1, right=0)), (0, Crossings(0, 0))]
)
def test_crossings_of_a_line_that_leads_to_the_right(step, expected):
    """On an image left of that direction is up: who goes down comes from the left and arrives at the right."""
    tracker = Tracker(30.0, lines=[(0, 100, 200, 100)])
    tracked = walk(tracker, [(100, 100 + step * (index - 9.5)) for index in range(20)])
    assert tracked[0].lines == [Crossings(0, 0)]
    assert tracked[-1].lines == [expected]


def test_zones_count_who_is_inside_now():
    tracker = Tracker(30.0, zones=[[(50, 50), (150, 50), (150, 150), (50, 150)]])
    tracked = walk(tracker, [(20 + 8 * index, 100) for index in range(20)])
    inside = [50 <= 20 + 8 * index <= 150 for index in range(20)]
    assert [one.zones for one in tracked] == [[int(is_inside)] for is_inside in inside]
    assert set(inside) == {True, False}


def test_corners_of_zones_are_rounded():
    """By hand: 99.6 is pixel 100, so that a centre at 99 is outside of the zone, and inside of one from 99.4 on."""
    zones = [[(x, 50), (150, 50), (150, 150), (x, 150)] for x in (99.6, 99.4)]
    tracked = walk(Tracker(30.0, zones=zones), [(99, 100)])
    assert tracked[0].zones == [0, 1]


FAR = "expected points of at most 16384 pixels"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lines": [(5, 5, 5, 5)]}, "line: expected at least 2 different points, got 5,5, 5,5"),
        ({"lines": [(0, 0, 1e30, 0)]}, f"line: {FAR}, got 1e\\+30"),
        ({"lines": [(0, 0, 5, float("nan"))]}, f"line: {FAR}, got nan"),
        ({"zones": [[(0, 0), (0, 0), (0, 0)]]}, "zone: expected at least 3 different points, got 0,0, 0,0, 0,0"),
        ({"zones": [[(0, 0), (9, 9), (9.2, 9.1)]]}, "zone: expected at least 3 different points"),
        ({"zones": [[(0, 0), (9, 9)]]}, "zone: expected at least 3 different points"),
        ({"zones": [[(-9, 0), (-5, 9), (-5, 0)]]}, "zone: expected one that reaches into the image"),
        ({"zones": [[(0, 0), (9, 9), (1_000_000, 0)]]}, f"zone: {FAR}, got 1e\\+06"),
        ({"zones": [[(0, 0), (9, 9), (0, -1e30)]]}, f"zone: {FAR}, got -1e\\+30"),
    ],
)
def test_lines_and_zones_that_nothing_can_be_counted_at(options, message):
    with pytest.raises(ValueError, match=message):
        Tracker(30.0, **options)


def test_the_largest_zone_and_points_outside_of_the_image():
    zone = [(-16384, -16384), (16384, -16384), (16384, 16384), (-16384, 16384)]
    tracked = walk(Tracker(30.0, lines=[(-16384, 0, 16384, 0)], zones=[zone]), [(100, 100)])
    assert tracked[0].zones == [1]


def test_trails_are_the_last_centres_and_end_with_the_track():
    tracker = Tracker(30.0)
    tracked = walk(tracker, [(20 + index, 100) for index in range(50)])
    assert tracked[0].trails == [[]]
    assert tracked[-1].trails[0] == [(20 + index, 100) for index in range(20, 50)]
    tracker.update(detections_of([], []), 5.0)
    assert tracker._trails == {}


def test_tracks_are_drawn(tmp_path):
    """Trail, line and zone change the pixels that they lie on."""
    from PIL import Image

    tracker = Tracker(30.0, lines=[(0, 180, 255, 180)], zones=[[(200, 20), (240, 20), (240, 60), (200, 60)]])
    tracked = walk(tracker, [(40 + 3 * index, 100) for index in range(20)])[-1]
    image = Image.fromarray(draw_frame(0, shapes=()))
    box = [87.0, 90.0, 107.0, 110.0]
    drawn = np.asarray(tracker.draw(image, detections_of([box], [0]), tracked)).astype(int)
    changed = np.abs(drawn - np.asarray(image)).sum(-1) > 60
    assert changed[180, 100:].all()
    assert changed[20, 205:235].all()
    assert changed[100, 50:80].all()
    assert not changed[140, :].any()


def test_lines_of_json_have_tracks_and_counts(tmp_path, weights):
    film = write_film(tmp_path / "film.mp4", 5)
    options = ["--weights", str(weights), "--output", str(tmp_path / "out"), "--threshold", "0", "--top-k", "1"]
    tracking = ["--track", "--line", "0,96,256,96", "--zone", "0,0,255,0,255,191,0,191"]
    result = CliRunner().invoke(app, ["video", str(film), *options, *tracking, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    for line in map(json.loads, (tmp_path / "out" / "detections.jsonl").read_text().splitlines()):
        assert set(line["detections"][0]) == {"box", "score", "label", "name", "track"}
        assert line["lines"] == [{"left": 0, "right": 0}]
        assert line["zones"] == [1]
    assert "line 1: 0 to its left, 0 to its right" in result.stdout
