"""Samples and targets of a dataset in COCO format, batches and collating."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from conditional_detr import Detector, Preprocessing, SetLoss
from conditional_detr.checkpoints.labels import COCO_NAMES
from conditional_detr.data.batching import batches
from conditional_detr.data.coco import read_annotations
from conditional_detr.data.dataset import Augmentation, CocoData, collate
from conditional_detr.inference.images import open_image
from conditional_detr.inference.preprocessing import to_pixels
from conditional_detr.modeling.detection_transformer import Output
from conditional_detr.set_prediction.targets import validate_targets
from helpers import coco

SIZES = Preprocessing(48, 64)
AUGMENTED = Augmentation.small(vertical_flip=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return coco.write(tmp_path_factory.mktemp("coco"))


def assert_same_samples(some, others):
    for (pixels, target), (other_pixels, other_target) in zip(some, others, strict=True):
        assert torch.equal(pixels, other_pixels)
        assert target.keys() == other_target.keys()
        assert torch.equal(target["boxes"], other_target["boxes"])
        assert torch.equal(target["labels"], other_target["labels"])


# ---- samples


def test_samples_by_hand(made):
    data = CocoData(*made, preprocessing=SIZES)
    assert len(data) == 3
    pixels, target = data[0]
    path = made[1] / "10.png"
    assert torch.equal(pixels, to_pixels(open_image(path, ""), SIZES))
    assert target["image_id"] == 10
    assert target["labels"].tolist() == [0, 1]  # cat has the smaller id
    expected = [[14 / 64, 11 / 48, 20 / 64, 10 / 48], [30 / 64, 32 / 48, 20 / 64, 24 / 48]]
    torch.testing.assert_close(target["boxes"], torch.tensor(expected), rtol=0, atol=1e-7)
    assert target["boxes"].dtype == torch.float32
    validate_targets([data[i][1] for i in range(3)], 3, 2)


def test_pixels_equal_those_of_a_detector(made, tiny):
    from conditional_detr import ConditionalDETR, Metadata

    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.metadata = Metadata(model.metadata.class_names, preprocessing=Preprocessing(40, 50))
    data = CocoData(*made, preprocessing=model.metadata.preprocessing)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    Detector(model)(made[1] / "11.png")
    assert torch.equal(seen[0][0], data[1][0])


def test_crowds_are_for_evaluation_only(made):
    data = CocoData(*made, preprocessing=SIZES)
    assert data[2][1]["labels"].shape == (0,)
    assert data[2][1]["boxes"].shape == (0, 4)
    crowds = [entry for entry in data.annotations.annotations if entry["iscrowd"]]
    assert [(crowd["image_id"], crowd["area"]) for crowd in crowds] == [(12, 900.0)]


def test_area_and_iscrowd_may_be_missing(made):
    annotations = read_annotations(made[0]).annotations
    assert [(entry["area"], entry["iscrowd"]) for entry in annotations[:2]] == [(200, 0), (480, 0)]


def test_boxes_are_clipped_to_the_image(tmp_path):
    content = coco.content()
    content["annotations"][0]["bbox"] = [-10, -2, 30, 20]
    content["annotations"][1]["bbox"] = [20, 20, 44.5, 28.4]  # half a pixel: rounding, without a warning
    with pytest.warns(UserWarning, match="1 of 5 annotations extend more than 1 pixel outside"):
        data = CocoData(*coco.write(tmp_path, content), preprocessing=SIZES)
    expected = [[10 / 64, 9 / 48, 20 / 64, 18 / 48], [42 / 64, 34 / 48, 44 / 64, 28 / 48]]
    torch.testing.assert_close(data[0][1]["boxes"], torch.tensor(expected), rtol=0, atol=1e-7)


def test_boxes_under_a_pixel_are_kept(tmp_path):
    content = coco.content()
    content["annotations"][0]["bbox"] = [3, 4, 0.5, 0.2]
    data = CocoData(*coco.write(tmp_path, content), preprocessing=SIZES)
    torch.testing.assert_close(data[0][1]["boxes"][0, 2:], torch.tensor([0.5 / 64, 0.2 / 48]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [(427, 640), (333, 500), (601, 777), (51, 961), (45, 1001)])
def test_boxes_as_large_as_the_image_are_valid_at_any_size(tmp_path, size):
    """Resizing rounds; a box as large as its image must not come out larger."""
    content = coco.content()
    images = coco.write(tmp_path)[1]
    Image.new("RGB", size[::-1]).save(images / "10.png")
    content["images"][0].update(height=size[0], width=size[1])
    content["annotations"][0]["bbox"] = [0, 0, size[1], size[0]]
    for sizes in (Preprocessing(), Preprocessing(333, 499), Preprocessing(97, 1333)):
        data = CocoData(content, images, preprocessing=sizes)
        target = data[0][1]
        assert target["boxes"][0].tolist() == pytest.approx([0.5, 0.5, 1, 1], abs=1e-7)
        validate_targets([target], 1, 2)


@pytest.mark.parametrize("stated", ["neither", "null", "height"])
def test_sizes_that_the_json_lacks_are_read_from_the_files(tmp_path, stated):
    content = coco.content()
    images = coco.write(tmp_path)[1]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(images / "10.png").save(images / "10.png", exif=exif)  # upright it is 48 wide and 64 high
    for entry in content["images"]:
        entry.pop("width")
        entry.pop("height")
        if stated == "null":
            entry.update(width=None, height=None)
        if stated == "height":
            entry["height"] = 64 if entry["id"] == 10 else 48
    data = CocoData(content, images, preprocessing=Preprocessing(24, 64))
    assert data.shapes == [(32, 24), (24, 32), (24, 32)]
    assert [tuple(pixels.shape[1:]) for pixels, _ in data] == data.shapes
    assert data[0][1]["boxes"][0, 2:].tolist() == pytest.approx([20 / 48, 10 / 64])


def test_real_annotations_lose_nothing(shared):
    for name, images in (
        ("coco/instances_val2017.json", "coco/val2017"),
        ("coco/instances_train2017.json", "coco/train2017"),
        ("bccd/instances_val.json", "bccd/images"),
    ):
        path = shared / "data" / name
        content = json.loads(path.read_text())
        sizes = Preprocessing(96, 160)
        data = CocoData(path, shared / "data" / images, preprocessing=sizes)
        targets = [data[i][1] for i in range(0, len(data), 4)]
        validate_targets(targets, len(targets), len(data.class_names))
        counts = Counter(entry["image_id"] for entry in content["annotations"] if not entry["iscrowd"])
        assert [len(target["labels"]) for target in targets] == [counts[target["image_id"]] for target in targets]
        names = {category["id"]: category["name"] for category in content["categories"]}
        for target in targets[:10]:
            entries = [e for e in content["annotations"] if e["image_id"] == target["image_id"] and not e["iscrowd"]]
            size = next(image for image in content["images"] if image["id"] == target["image_id"])
            for entry, label, box in zip(entries, target["labels"], target["boxes"].tolist(), strict=True):
                assert data.class_names[label] == names[entry["category_id"]]
                assert data.category_ids[label] == entry["category_id"]
                x, y, w, h = entry["bbox"]
                width, height = size["width"], size["height"]
                expected = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
                assert box == pytest.approx(expected, abs=1e-6)


# ---- classes


def test_classes_in_the_order_of_ids(made):
    data = CocoData(*made)
    assert data.class_names == ("cat", "dog")
    assert data.category_ids == (3, 9)
    assert data.metadata.class_names == ("cat", "dog")
    assert data.metadata.category_ids == (3, 9)
    assert data.metadata.preprocessing == Preprocessing()


def test_classes_of_a_model(made):
    """COCO's 91 rows, some of which are unused; the dataset has other ids."""
    data = CocoData(*made, class_names=COCO_NAMES)
    assert data.class_names == COCO_NAMES
    assert data[0][1]["labels"].tolist() == [17, 18]
    assert (data.category_ids[17], data.category_ids[18]) == (3, 9)
    assert len(set(data.category_ids)) == 91
    assert len(data.metadata.class_names) == 91


def test_string_ids(tmp_path):
    content = coco.content()
    for entry in content["categories"]:
        entry["id"] = f"id of {entry['name']}"
    for entry in content["images"]:
        entry["id"] = f"{entry['id']:012d}"
    for entry in content["annotations"]:
        entry["image_id"] = f"{entry['image_id']:012d}"
        entry["category_id"] = "id of cat" if entry["category_id"] == 3 else "id of dog"
    data = CocoData(*coco.write(tmp_path, content))
    assert data.class_names == ("cat", "dog")
    assert data.category_ids == (0, 1)
    assert data[0][1]["image_id"] == "000000000010"
    assert data[0][1]["labels"].tolist() == [0, 1]


def test_invalid_class_names(made):
    with pytest.raises(ValueError, match=r"expected all categories of .*data.json, got dog, cow without cat$"):
        CocoData(*made, class_names=["dog", "cow"])
    with pytest.raises(ValueError, match=r"class_names: expected distinct names, got dog, cat, dog$"):
        CocoData(*made, class_names=["dog", "cat", "dog"])
    with pytest.raises(TypeError, match="class_names: expected a sequence of strings, got 'cat'"):
        CocoData(*made, class_names="cat")


def test_negative_seed_and_epoch(made):
    with pytest.raises(ValueError, match="seed: expected at least 0, got -1"):
        CocoData(*made, seed=-1)
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        CocoData(*made).set_epoch(-1)


# ---- random numbers


def samples_of(data, workers=0, order=(0, 1, 2)):
    loader = DataLoader(data, sampler=list(order), batch_size=None, num_workers=workers)
    return list(loader)


def test_samples_do_not_depend_on_workers_or_order(made):
    data = CocoData(*made, augmentation=AUGMENTED, preprocessing=SIZES, seed=3)
    data.set_epoch(7)
    alone = [data[i] for i in range(3)]
    torch.manual_seed(5)
    assert_same_samples(samples_of(data), alone)
    assert_same_samples(samples_of(data, workers=2), alone)
    backwards = samples_of(data, workers=2, order=(2, 1, 0))
    assert_same_samples(backwards[::-1], alone)
    again = CocoData(*made, augmentation=AUGMENTED, preprocessing=SIZES, seed=3)
    again.set_epoch(7)
    assert_same_samples([again[1]], alone[1:2])


@pytest.mark.parametrize("change", ["seed", "epoch", "index"])
def test_samples_depend_on_seed_epoch_and_index(made, change):
    content = coco.content()
    content["images"] = [{**content["images"][0], "id": i} for i in (10, 11, 12)]  # the same image three times
    with pytest.warns(UserWarning, match="1 images are listed more than once: 10.png"):
        data = CocoData(content, made[1], augmentation=AUGMENTED, preprocessing=SIZES, seed=1)
    before = data[0][0]
    if change == "seed":
        data.seed = 2
    if change == "epoch":
        data.set_epoch(1)
    assert not torch.equal(data[1 if change == "index" else 0][0], before)


def test_persistent_workers_use_the_new_epoch(made):
    data = CocoData(*made, augmentation=AUGMENTED, preprocessing=SIZES)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    first = list(loader)
    data.set_epoch(1)
    second = list(loader)
    assert_same_samples(second, [data[i] for i in range(3)])
    assert not torch.equal(first[0][0], second[0][0])


# ---- collating


def sample(height, width, boxes=((0.5, 0.5, 1.0, 1.0),)):
    pixels = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height))
    return pixels, {"labels": torch.zeros(len(boxes), dtype=torch.int64), "boxes": torch.tensor(boxes)}


def test_collate_by_hand():
    pixels, padding, targets = collate([sample(4, 6), sample(5, 3)])
    assert pixels.shape == (2, 3, 5, 6)
    assert padding.tolist() == [[[False] * 6] * 4 + [[True] * 6], [[False] * 3 + [True] * 3] * 5]
    assert torch.equal(pixels[0, :, :4], sample(4, 6)[0])
    assert torch.equal(pixels[1, :, :, :3], sample(5, 3)[0])
    assert pixels.masked_select(padding[:, None]).abs().max() == 0
    assert targets[0]["boxes"].tolist() == [[0.5, 0.5, 1, 1]]
    pixels, padding, _ = collate([sample(4, 6), sample(4, 6)])
    assert padding is None
    assert pixels.shape == (2, 3, 4, 6)


def test_targets_do_not_depend_on_the_batch(tmp_path):
    """A box as large as its image stays so in a batch with a wider one; a perfect prediction has loss zero."""
    content = coco.content()
    images = coco.write(tmp_path)[1]
    Image.new("RGB", (96, 24)).save(images / "11.png")
    content["images"][1].update(height=24, width=96)
    content["annotations"][0]["bbox"] = [0, 0, 64, 48]
    content["annotations"][3]["bbox"] = [34, 10, 12, 12]
    content["annotations"][2]["bbox"] = [10, 2, 8, 20]
    data = CocoData(content, images, preprocessing=SIZES)
    alone, beside = collate([data[0]]), collate([data[1], data[0]])
    assert beside[1] is not None
    assert torch.equal(alone[2][0]["boxes"], beside[2][1]["boxes"])
    assert alone[2][0]["boxes"][0].tolist() == [0.5, 0.5, 1, 1]
    boxes = torch.rand(1, 2, 5, 4) * 0.1 + 0.4
    for i in range(2):
        boxes[0, i, :2] = beside[2][i]["boxes"]
    losses = SetLoss()(Output(torch.zeros(1, 2, 5, 2), boxes), beside[2])
    assert losses["l1"].item() == pytest.approx(0, abs=1e-6)
    assert losses["giou"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], ValueError, "samples: expected at least one, got none"),
        ([sample(4, 4), 3], TypeError, r"samples\[1\]: expected \(pixels, target\), got int"),
        ([(np.zeros((3, 4, 4)), {})], TypeError, r"samples\[0\]: expected \(pixels, target\), got tuple of ndarray"),
        ([(torch.zeros(1, 4, 4), {})], ValueError, r"samples\[0\]: expected pixels \(3, H, W\), got \(1, 4, 4\)"),
        (
            [(torch.zeros(3, 4, 4, dtype=torch.uint8), {})],
            TypeError,
            r"samples\[0\]: expected pixels in float32, normalised, got torch.uint8",
        ),
    ],
)
def test_invalid_samples(samples, error, message):
    with pytest.raises(error, match=message):
        collate(samples)


# ---- batches


class Shapes(Dataset):
    """A user's dataset with shapes."""

    def __init__(self, counts):
        self.shapes = [shape for shape, count in counts.items() for _ in range(count)]

    def __len__(self):
        return len(self.shapes)


class Plain(Dataset):
    """A user's dataset without shapes."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 16, 17, 31, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_all_samples_are_used_and_processes_have_equal_steps(count, batch_size, processes, shuffle):
    data = Shapes({(4, 4): count - count // 3, (4, 5): count // 3})
    options = {"seed": 0, "epoch": 3, "shuffle": shuffle}
    if count < processes:
        with pytest.raises(
            ValueError, match=f"data: expected at least one sample per process, {processes}, got {count}"
        ):
            batches(data, batch_size, **options, processes=processes)
        return
    parts = [batches(data, batch_size, **options, rank=rank, processes=processes) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == -(-count // (batch_size * processes))
    counts = Counter(i for part in parts for batch in part for i in batch)
    assert sorted(counts) == list(range(count))
    assert all(1 <= len(batch) <= batch_size for part in parts for batch in part)
    twice = sum(counts.values()) - count
    assert twice == 0 or (batch_size == 1 and twice < processes)


def test_two_processes_equal_one_with_twice_the_batch_size():
    data = Shapes({(4, 4): 30, (4, 5): 21})
    one = batches(data, 8, seed=1, epoch=2)
    parts = [batches(data, 4, seed=1, epoch=2, rank=rank, processes=2) for rank in range(2)]
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*parts, strict=True)]


def test_batches_have_one_shape():
    data = Shapes({(4, 4): 40, (4, 6): 25, (6, 4): 10, (5, 6): 1})
    plan = batches(data, 8, seed=0, epoch=0)
    mixed = [batch for batch in plan if len({data.shapes[i] for i in batch}) > 1]
    assert len(mixed) <= 2
    for batch in mixed:  # similar aspect ratios: no tall image with a wide one
        ratios = {data.shapes[i][0] / data.shapes[i][1] for i in batch}
        assert not {4 / 6, 6 / 4} <= ratios or len(ratios) < 4
    assert plan == batches(data, 8, seed=0, epoch=0)
    assert plan != batches(data, 8, seed=0, epoch=1)
    assert plan != batches(data, 8, seed=1, epoch=0)
    first = {plan[0][0] for plan in (batches(data, 8, seed=0, epoch=epoch) for epoch in range(20))}
    assert len(first) > 10


def test_dataset_without_shapes_is_only_shuffled():
    plan = batches(Plain(10), 4, seed=0, epoch=0)
    assert sorted(i for batch in plan for i in batch) == list(range(10))
    assert batches(Plain(10), 4, seed=0, epoch=0, shuffle=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rank": 2, "processes": 2}, {"rank": -1}, {"processes": 0}])
def test_invalid_batch_options(options):
    options = {"batch_size": 2, "rank": 0, "processes": 1, **options}
    values = "{batch_size}, {rank} and {processes}".format(**options)
    with pytest.raises(ValueError, match=f"expected batch_size >= 1 and 0 <= rank < processes, got {values}"):
        batches(Plain(9), seed=0, epoch=0, **options)


@pytest.mark.parametrize("augmentation", [None, Augmentation.paper(), Augmentation.small(quarter_turn=True)])
def test_the_fast_backend_has_the_same_boxes_and_nearly_the_same_pixels(shared, augmentation):
    """Also where a window extends beyond the image and is filled with the mean colour, in 8 bits."""
    folder = shared / "data/coco"
    samples = []
    for backend in ("pil", "torchvision"):
        preprocessing = Preprocessing(200, 333, backend=backend)
        options = {"augmentation": augmentation, "preprocessing": preprocessing}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = CocoData(folder / "instances_val2017.json", folder / "val2017", **options)
        samples.append([data[index] for index in range(0, 24, 3)])
    for (exact, target), (fast, fast_target) in zip(*samples, strict=True):
        assert torch.equal(fast_target["boxes"], target["boxes"])
        assert torch.equal(fast_target["labels"], target["labels"])
        assert fast.shape == exact.shape
        difference = (fast - exact).abs() * 0.225 * 255  # levels of 255
        assert difference.mean() < 0.5  # of several steps, each of which rounds
        assert difference.max() < 8
