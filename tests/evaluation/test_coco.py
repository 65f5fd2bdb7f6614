"""COCO's metrics against published ones, against pycocotools and by hand; the command; invalid input."""

import contextlib
import io
import json
import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing
from conditional_detr.cli import app
from conditional_detr.evaluation.coco import METRICS, evaluate, evaluate_detections

KNOWN = {
    "AP": 0.5045806987249628,
    "AP50": 0.6969727247299577,
    "AP75": 0.5729816669904824,
    "APs": 0.5856257209410443,
    "APm": 0.5193996948036719,
    "APl": 0.5013978986347466,
    "AR1": 0.38681277964578054,
    "AR10": 0.5936795762842003,
    "AR100": 0.595352982877607,
    "ARs": 0.6398109626113442,
    "ARm": 0.5664205978994309,
    "ARl": 0.5642905982905982,
}
NAMES = ("cat", None, "dog", "bird", "fish", "ant", "cow")
CATEGORIES = [{"id": 40, "name": "dog"}, {"id": 0, "name": "cow"}, {"id": 7, "name": "cat"}]  # of another numbering


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def coco_eval(shared):
    folder = shared / "data" / "coco_eval"
    return folder / "instances_val2014_100.json", folder / "instances_val2014_fakebbox100_results.json"


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Return a detector and a dataset of 7 images of two sizes; the annotations are shifted detections."""
    folder = tmp_path_factory.mktemp("made")
    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.metadata = Metadata(NAMES, preprocessing=Preprocessing(shortest_edge=96, longest_edge=160))
    with torch.no_grad():
        model.box_head.layers[-1].bias[2:] -= 1.0  # boxes smaller than their images
    model.save_pretrained(folder / "weights")
    (folder / "images" / "night").mkdir(parents=True)
    generator = np.random.default_rng(0)
    images, paths = [], []
    for i in range(7):
        height, width = (96, 128) if i % 2 else (120, 96)
        name = f"night/{i}.png" if i == 3 else f"{i}.png"
        coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(folder / "images" / name)
        images.append({"id": 100 - i, "file_name": name, "height": height, "width": width})
        paths.append(folder / "images" / name)
    objects = []
    ids = {category["name"]: category["id"] for category in CATEGORIES}
    for image, detections in zip(images, Detector(model)(paths, threshold=0, classes=list(ids)), strict=True):
        for box, _, name in list(detections)[: 12 : 3 if image["id"] % 3 else 4]:
            x0, y0, x1, y1 = box
            shift = 0.1 * (x1 - x0) * generator.random()
            box = [x0 + shift, y0, x1 - x0 + shift, y1 - y0]
            objects.append({"id": len(objects), "image_id": image["id"], "category_id": ids[name], "bbox": box})
    for i, entry in enumerate(objects):
        entry["area"] = entry["bbox"][2] * entry["bbox"][3]
        entry["iscrowd"] = int(i == 5)
    annotations = {"images": images, "annotations": objects, "categories": CATEGORIES}
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return SimpleNamespace(
        weights=folder / "weights", data=folder / "annotations.json", images=folder / "images", content=annotations
    )


def pycocotools_numbers(annotations, results):
    """Return the metrics that pycocotools alone computes from annotations and results, with ids from 1."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {**annotations, "info": {}}
        truth.dataset["annotations"] = [{**a, "id": i + 1} for i, a in enumerate(annotations["annotations"])]
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, evaluation.stats.tolist(), strict=True))


def assert_equal(actual, expected):
    assert list(actual) == list(METRICS)
    for name in METRICS:
        assert actual[name] == pytest.approx(expected[name], abs=1e-10), name


# ---- given detections


def test_published_metrics(coco_eval, capsys):
    result = evaluate_detections(*coco_eval)
    assert_equal(result.metrics, KNOWN)
    with_annotations = [c["AP"] for c in result.per_class.values() if c["annotations"]]
    assert np.mean(with_annotations) == pytest.approx(KNOWN["AP"], abs=1e-10)
    recalls = [c["AR100"] for c in result.per_class.values() if c["annotations"]]
    assert np.mean(recalls) == pytest.approx(KNOWN["AR100"], abs=1e-10)
    for name in ("AP50", "AP75"):
        values = [c[name] for c in result.per_class.values() if c["annotations"]]
        assert np.mean(values) == pytest.approx(KNOWN[name], abs=1e-10)
    assert {c["AP"] for c in result.per_class.values() if not c["annotations"]} == {-1}
    assert sum(c["annotations"] for c in result.per_class.values()) == 839 - 9  # nine crowds
    assert result.per_class["person"]["category_id"] == 1
    output = capsys.readouterr()
    assert output.out == output.err == ""


def test_the_annotations_themselves_are_perfect(shared):
    """Real images' annotations, crowds among them."""
    path = shared / "data" / "coco" / "instances_val2017.json"
    annotations = json.loads(path.read_text())["annotations"]
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in annotations
        if not a["iscrowd"]
    ]
    result = evaluate_detections(path, results)
    assert any(a["iscrowd"] for a in annotations)
    for name in ("AP", "AP50", "AP75", "APm", "APl", "AR100"):
        assert result.metrics[name] == pytest.approx(1.0, abs=1e-12)


BOX, ELSEWHERE = [10.0, 10.0, 40.0, 40.0], [200.0, 200.0, 50.0, 50.0]


def by_hand(*, first=0, image=1, category=1):
    """Return the annotations of two images with one class and two boxes."""
    images = [{"id": image, "file_name": "a.jpg"}, {"id": image + 1, "file_name": "b.jpg"}]
    annotations = [
        {"id": first + i, "image_id": image, "category_id": category, "bbox": b}
        for i, b in enumerate((BOX, ELSEWHERE))
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": category, "name": "cat"}]}


@pytest.mark.parametrize(
    ("results", "expected", "recall"),
    [
        ([(BOX, 0.9), (ELSEWHERE, 0.8)], 1.0, 1.0),
        ([(BOX, 1e-30), (ELSEWHERE, 1e-31)], 1.0, 1.0),  # scores are only compared
        ([(BOX, 0.9)], 51 / 101, 0.5),  # precision 1 at the recalls 0, 0.01, ..., 0.5
        ([([300.0, 9.0, 5.0, 5.0], 0.9), (BOX, 0.8)], 51 / 101 / 2, 0.5),  # a wrong one first: precision 1/2
        ([], 0.0, 0.0),
    ],
)
def test_average_precision_by_hand(results, expected, recall):
    detections = [{"image_id": 1, "category_id": 1, "bbox": box, "score": score} for box, score in results]
    result = evaluate_detections(by_hand(), detections)
    assert result.metrics["AP"] == pytest.approx(expected, abs=1e-12)
    assert result.metrics["AR100"] == pytest.approx(recall, abs=1e-12)
    assert result.metrics["APs"] == -1  # no small box
    assert result.per_class["cat"]["AP"] == result.metrics["AP"]


@pytest.mark.parametrize("ids", [{"first": 0}, {"image": 0}, {"category": 0}, {"category": 999}])
def test_ids_may_be_any(ids):
    """pycocotools does not match an annotation with id 0; this library does."""
    data = by_hand(**ids)
    keys = {"image_id": data["images"][0]["id"], "category_id": data["categories"][0]["id"]}
    detections = [{**keys, "bbox": box, "score": 0.5} for box in (BOX, ELSEWHERE)]
    assert evaluate_detections(data, detections).metrics["AP"] == pytest.approx(1.0, abs=1e-12)


def test_renumbering_changes_nothing(coco_eval):
    """Category ids count down from 1000, image ids are strings, annotation ids start at 0."""
    data, results = (json.loads(path.read_text()) for path in coco_eval)
    for entry in data["categories"]:
        entry["id"] = 1000 - entry["id"]
    for image in data["images"]:
        image["id"] = f"{image['id']:012d}"
    for i, entry in enumerate([*data["annotations"], *results]):
        entry.update(id=i, category_id=1000 - entry["category_id"], image_id=f"{entry['image_id']:012d}")
    result = evaluate_detections(data, results)
    assert_equal(result.metrics, KNOWN)
    assert result.per_class["person"]["category_id"] == 999


# ---- a detector on images


def results_of(made):
    """Return the detections in COCO's results format, computed image by image."""
    detector = Detector.from_pretrained(made.weights)
    ids = {category["name"]: category["id"] for category in CATEGORIES}
    results = []
    for image in made.content["images"]:
        detections = detector(made.images / image["file_name"], threshold=0, top_k=100, classes=list(ids))
        for (x0, y0, x1, y1), score, name in detections:
            entry = {"image_id": image["id"], "category_id": ids[name], "score": score}
            results.append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    return results


def test_evaluate_equals_pycocotools_on_the_same_detections(made):
    expected = pycocotools_numbers(made.content, results_of(made))
    progress = []
    detector = Detector.from_pretrained(made.weights)
    result = evaluate(detector, made.data, made.images, progress=lambda *numbers: progress.append(numbers))
    assert 0.05 < expected["AP"] < 0.95
    assert_equal(result.metrics, expected)
    assert progress[-1] == (7, 7)
    assert list(result.per_class) == ["cow", "cat", "dog"]
    again = evaluate(detector.model, made.content, str(made.images), batch_size=2)
    assert_equal(again.metrics, result.metrics)


def test_no_score_is_too_low(made):
    """A bias that lowers every score to under 1e-3 does not change their order, so no metric changes."""
    detector = Detector.from_pretrained(made.weights)
    expected = evaluate(detector, made.data, made.images).metrics
    with torch.no_grad():
        detector.model.class_head.bias -= 16
    assert detector(made.images / "0.png", threshold=0).scores.max() < 1e-3
    assert_equal(evaluate(detector, made.data, made.images).metrics, expected)


def test_images_stream_with_those_of_one_size_together(made, monkeypatch):
    """The detector gets an iterator, sorted by image size."""
    sizes = {entry["file_name"]: (entry["height"], entry["width"]) for entry in made.content["images"]}
    drawn = []
    plain = Detector.__call__

    def recorded(self, images, **options):
        assert not isinstance(images, list | tuple)
        assert (options["threshold"], options["top_k"], options["batch_size"]) == (0, 100, 1)
        drawn.extend(images)
        return plain(self, iter(drawn), **options)

    monkeypatch.setattr(Detector, "__call__", recorded)
    evaluate(Detector.from_pretrained(made.weights), made.data, made.images, batch_size=1)
    assert [sizes[str(path.relative_to(made.images))] for path in drawn] == [(120, 96)] * 4 + [(96, 128)] * 3


# ---- processes


def one_of_two(rank, ports, folder, made, coco_eval):
    """Run the command and the functions in one of two processes, for the tests below."""
    from torch import distributed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(ports[0]))
    data, results = coco_eval
    on_results = run("evaluate", "--data", data, "--results", results, "--json", f"{folder}/results-{rank}.json")
    options = ("--weights", made.weights, "--images", made.images, "--json", f"{folder}/images-{rank}.json")
    os.environ["MASTER_PORT"] = str(ports[1])  # the first port may still be in use
    on_images = run("evaluate", "--data", made.data, *options)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    shares = json.loads(results.read_text())
    images = sorted({result["image_id"] for result in shares})
    mine = set(images[rank::2]) | set(images[:5])  # both processes have five of the images
    share = [result for result in shares if result["image_id"] in mine]
    if rank == 1:  # has other detections of these five
        share = [{**r, "bbox": [0, 0, 1, 1]} if r["image_id"] in images[:5] else r for r in share]
    metrics = evaluate_detections(data, share).metrics
    progress = []
    evaluate(Detector.from_pretrained(made.weights), made.data, made.images, progress=lambda *n: progress.append(n))
    broken = [{"image_id": 1}] if rank == 1 else []
    try:
        evaluate_detections(data, broken)
        message = ""
    except ValueError as error:
        message = str(error)
    distributed.destroy_process_group()
    written = {
        "codes": [on_results.exit_code, on_images.exit_code],
        "printed": [on_results.stdout, on_images.stdout],
        "metrics": metrics,
        "progress": progress,
        "message": message,
    }
    with open(f"{folder}/{rank}.json", "w") as file:  # noqa: PTH123
        json.dump(written, file)


@pytest.fixture(scope="module")
def two_processes(made, coco_eval, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("localhost", 0))
        ports = [probe.getsockname()[1] for probe in (one, other)]
    made = SimpleNamespace(weights=made.weights, data=made.data, images=made.images)
    torch.multiprocessing.spawn(one_of_two, (ports, str(folder), made, coco_eval), nprocs=2)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_command_in_two_processes(two_processes, made):
    """The first process prints and writes; the metrics equal the published ones and those of a single process."""
    folder, parts = two_processes
    assert [part["codes"] for part in parts] == [[0, 0]] * 2
    assert [len(text) > 100 for text in parts[0]["printed"]] == [True, True]
    assert parts[1]["printed"] == ["", ""]
    assert sorted(path.name for path in folder.glob("*-*.json")) == ["images-0.json", "results-0.json"]
    known = json.loads((folder / "results-0.json").read_text())
    assert_equal({name: known[name] for name in METRICS}, KNOWN)
    alone = evaluate(Detector.from_pretrained(made.weights), made.data, made.images).to_dict()
    together = json.loads((folder / "images-0.json").read_text())
    assert_equal({n: together[n] for n in METRICS}, {n: alone[n] for n in METRICS})


def test_detections_are_gathered_and_an_image_counts_once(two_processes):
    """Both processes have detections of five images: those of the first are used."""
    for part in two_processes[1]:
        assert_equal(part["metrics"], KNOWN)


def test_each_process_detects_on_its_share(two_processes):
    assert [part["progress"][-1] for part in two_processes[1]] == [[4, 4], [3, 3]]


def test_error_in_one_process_is_raised_in_all(two_processes):
    for part in two_processes[1]:
        assert part["message"].startswith(
            "results: [0]: expected an object with 'category_id', got the keys 'image_id'"
        )


# ---- the command


def test_evaluate_from_images_to_json(made, tmp_path):
    written = tmp_path / "out.json"
    result = run(
        *("evaluate", "--data", made.data, "--images", made.images, "--weights", made.weights, "--json", written)
    )
    assert result.exit_code == 0, result.output
    content = json.loads(written.read_text())
    assert list(content) == [*METRICS, "per_class"]
    expected = evaluate(Detector.from_pretrained(made.weights), made.data, made.images).to_dict()
    assert content == expected
    assert f"{content['AP']:.3f}" in result.stdout
    for name, numbers in content["per_class"].items():
        row = next(line for line in result.stdout.splitlines() if f" {name} " in line)
        assert f"{numbers['AP50']:.3f}" in row
        assert f" {numbers['category_id']} " in row


def test_evaluate_results(coco_eval, tmp_path):
    data, results = coco_eval
    written = tmp_path / "out.json"
    result = run("evaluate", "--data", data, "--results", results, "--json", written)
    assert result.exit_code == 0, result.output
    content = json.loads(written.read_text())
    assert_equal({name: content[name] for name in METRICS}, KNOWN)
    assert "no threshold" in result.stdout
    assert "100 detections per image" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "none.json", "--images", "{images}"), "error: none.json: no such file"),
        (("--data", "{data}", "--images", "{images}", "--results", "{data}"), "error: expected either --images"),
        (
            ("--data", "{data}", "--results", "{data}", "--weights", "{weights}"),
            "error: --weights: expected none with --results, got",
        ),
        (
            ("--data", "{data}", "--results", "{data}"),
            "error: {data}: expected a list of detections, got an object with",
        ),
        (("--data", "{data}", "--images", "{data}"), "error: {data}: expected the folder of the images, got a file"),
        (
            ("--data", "{data}", "--images", "{data}", "--device", "abacus"),  # before a model is loaded
            "error: {data}: expected the folder of the images, got a file",
        ),
        (("--data", "{data}", "--images", "{images}", "--device", "abacus"), "error: device: expected one that"),
        (
            ("--data", "{data}", "--images", "{images}", "--json", "no/o.json"),
            "error: no/o.json: expected a file in a",
        ),
    ],
)
def test_evaluate_fails_in_one_line(made, tmp_path, arguments, message):
    paths = {name: str(getattr(made, name)) for name in ("data", "images", "weights")}
    arguments = [argument.format(**paths) for argument in arguments]
    if "--images" in arguments and "--results" not in arguments:
        arguments += ["--weights", paths["weights"]]
    if "--json" not in arguments:
        arguments += ["--json", str(tmp_path / "out.json")]
    result = run("evaluate", *arguments)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(message.format(**paths))
    assert list(tmp_path.iterdir()) == []


# ---- invalid input


def test_categories_that_the_model_lacks(made):
    data = {**made.content, "categories": [*CATEGORIES, {"id": 8, "name": "Cat"}]}
    message = (
        "annotations: expected categories that are class names of the model, got 1 that are not: Cat;"
        " all categories: dog, cow, cat, Cat; the model's: cat, dog, bird, fish, ant, cow"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        evaluate(Detector.from_pretrained(made.weights), data, made.images)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"file_name": "gone.png"},
            FileNotFoundError,
            r"gone.png: no such file; 1 of the 7 images of annotations are",
        ),
        (
            {"file_name": "text.png"},
            ValueError,
            r"text.png: expected an image, got a text file",
        ),
        ({"file_name": "cut.png"}, OSError, r"cut.png: the image cannot be read"),
        ({"file_name": None}, ValueError, "annotations: image 100: expected a file_name, got None"),
        (
            {"height": 96, "width": 120},
            ValueError,
            r"0.png: expected 120 x 96 pixels, as in annotations, got 96 x 120",
        ),
    ],
)
def test_invalid_images(made, change, error, message):
    (made.images / "text.png").write_text("no image")
    (made.images / "cut.png").write_bytes((made.images / "0.png").read_bytes()[:-500])
    first, *others = made.content["images"]
    with pytest.raises(error, match=message):
        evaluate(
            Detector.from_pretrained(made.weights),
            {**made.content, "images": [{**first, **change}, *others]},
            made.images,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": 3},
            "annotations: expected a list under 'images', got the keys 'images', 'annotations', 'categories'",
        ),
        ({"images": []}, "annotations: images: expected at least one, got none"),
        ({"categories": []}, "annotations: categories: expected at least one, got none"),
        (
            {"images": [{"file_name": "a"}]},
            r"annotations: images\[0\]: expected an object with 'id', got the keys 'file",
        ),
        (
            {"images": [{"id": 1}, {"id": "2"}]},
            r"images\[1\]: expected ids that are all integers or all strings, g",
        ),
        ({"images": [{"id": 1}, {"id": 1}]}, r"images\[1\]: expected distinct ids, got 1 again"),
        ({"categories": [{"id": 1}]}, "annotations: category 1: expected an object with 'name'"),
        (
            {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]},
            "annotations: expected distinct category names, got duplicates: cat",
        ),
    ],
)
def test_invalid_annotation_files(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_detections({**by_hand(), **change}, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, r"annotations\[0\]: expected the id of an image of annotations, got image_id 9"),
        ({"category_id": 9}, r"annotations\[0\]: expected a category of annotations \(1 cat\), got category_id 9"),
        ({"bbox": [1, 2, 3]}, r"annotations\[0\]: expected a bbox \[x0, y0, w, h\], got \[1, 2, 3\]"),
        ({"bbox": [1, 2, -3, 4]}, r"with w and h of at least 0, got \[1, 2, -3, 4\]"),
        ({"bbox": [1, 2, float("nan"), 4]}, r"annotations\[0\]: expected finite numbers as bbox, got nan"),
        ({"area": "3"}, r"annotations\[0\]: expected finite numbers as area, got '3'"),
    ],
)
def test_invalid_annotations(change, message):
    data = by_hand()
    data["annotations"][0].update(change)
    with pytest.raises(ValueError, match=message):
        evaluate_detections(data, [])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"score": None}, r"results: \[1\]: expected finite numbers as score, got None"),
        ({"score": float("inf")}, r"results: \[1\]: expected finite numbers as score, got inf"),
        ({"category_id": 0}, r"results: \[1\]: expected a category of annotations \(1 cat\), got category_id 0"),
        ({"image_id": 3}, r"results: \[1\]: expected the id of an image of annotations, got image_id 3"),
    ],
)
def test_invalid_results(entry, message):
    right = {"image_id": 1, "category_id": 1, "bbox": BOX, "score": 0.5}
    with pytest.raises(ValueError, match=message):
        evaluate_detections(by_hand(), [right, {**right, **entry}])
    with pytest.raises(ValueError, match=r"results: \[1\]: expected an object with 'image_id', got 7"):
        evaluate_detections(by_hand(), [right, 7])


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "file.json: no such file"),
        (b"{", ValueError, "file.json: expected JSON, got something else: Expecting"),
        (b"{\xff", ValueError, "file.json: expected JSON, got something else: 'utf-8'"),
        (b"[]", ValueError, "file.json: expected an object with images, annotations and categories, got a list"),
        (b"3", ValueError, "file.json: expected an object with .*, got 3"),
    ],
)
def test_invalid_files(tmp_path, content, error, message):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        evaluate_detections(path, [])
    with pytest.raises(ValueError, match="expected annotations: COCO JSON"):
        evaluate_detections(tmp_path, [])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("000001.txt", "YOLO format"), ("000001.XML", "Pascal VOC format")],
)
def test_files_of_other_formats(tmp_path, name, hint):
    (tmp_path / name).write_text("train: images/train\nnames: [dog]\n")
    with pytest.raises(ValueError, match=f"{name}: expected JSON, .*{hint}, which is opened by its"):
        evaluate_detections(tmp_path / name, [])


def test_a_folder_that_has_annotations(tmp_path):
    """A downloaded dataset is often given as its folder."""
    (tmp_path / "instances_val.json").write_text("{}")
    with pytest.raises(ValueError, match=r"instances_val\.json: expected a list under 'images'"):
        evaluate_detections(tmp_path, [])
