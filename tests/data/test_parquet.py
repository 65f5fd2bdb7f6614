"""Datasets in Parquet files: the samples are those of image files, each once an epoch, few row groups at a time."""

import io
import json
import os
import sys
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conditional_detr import Preprocessing
from conditional_detr.data.augmentation import Augmentation
from conditional_detr.data.batching import batches
from conditional_detr.data.dataset import CocoData
from conditional_detr.data.formats.conversion import convert_data
from conditional_detr.data.formats.parquet import find_shards, is_parquet, open_shards
from conditional_detr.data.formats.parquet_writing import _row_groups, plan_shards
from conditional_detr.data.formats.reading import open_data
from conditional_detr.data.parquet import ParquetData
from conditional_detr.data.row_groups import RowGroup
from helpers import coco

SMALL = Preprocessing(32, 48)
NAMES = ["cat", "dog"]
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
            "category": datasets.List(datasets.ClassLabel(names=NAMES)),
        },
    }
)


def rows(count, *, seed=0):
    """Images of noise in two sizes, each with its number in the first pixel, and a box."""
    generator = np.random.default_rng(seed)
    found = {"image": [], "width": [], "height": [], "objects": []}
    for i in range(count):
        height, width = (24, 40) if i % 3 else (40, 24)
        values = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        values[0, 0] = i // 256, i % 256, 0
        found["image"].append(Image.fromarray(values))
        found["width"].append(width)
        found["height"].append(height)
        found["objects"].append({"bbox": [[2.0, 3.0, 4.0 + i % 5, 6.0]], "category": [i % 2]})
    return found


def write_by_datasets(folder, count, *, files=2, group=7, seed=0, features=FEATURES):
    """Write shards by Hugging Face's library, with row groups of some images."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = datasets.Dataset.from_dict(rows(count, seed=seed), features=features)
    for i in range(files):
        part = whole.shard(files, i, contiguous=True)
        part.to_parquet(str(folder / f"train-{i:05}-of-{files:05}.parquet"), batch_size=group)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_by_datasets(tmp_path_factory.mktemp("shards"), 50)


@pytest.fixture
def count_reads(monkeypatch):
    """Count how often each row group is read."""
    reads, read = Counter(), RowGroup.read

    def counting(group):
        reads[group.file, group.position] += 1
        return read(group)

    monkeypatch.setattr(RowGroup, "read", counting)
    return reads


def equal(a, b):
    pixels, target = a
    assert torch.equal(pixels, b[0])
    assert torch.equal(target["labels"], b[1]["labels"])
    torch.testing.assert_close(target["boxes"], b[1]["boxes"], rtol=0, atol=1e-7)  # float32 in Parquet


def test_samples_of_what_datasets_writes_are_those_of_image_files(shards, tmp_path):
    """The same image files and boxes in COCO's form give the same pixels and targets, with augmentation."""
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    }
    read = datasets.load_dataset("parquet", data_dir=str(shards), split="train", cache_dir=str(tmp_path / "cache"))
    for i, row in enumerate(read.cast_column("image", datasets.Image(decode=False))):
        (tmp_path / f"{i}.png").write_bytes(row["image"]["bytes"])
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": row["width"], "height": row["height"]})
        pairs = zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
        content["annotations"] += [{"image_id": i, "bbox": box, "category_id": label} for box, label in pairs]
    options = {"augmentation": Augmentation.paper(32), "preprocessing": SMALL, "seed": 3}
    expected, got = CocoData(content, tmp_path, **options), ParquetData(shards, **options)
    assert (got.class_names, len(got), got.shapes) == (tuple(NAMES), 50, expected.shapes)
    for data in (expected, got):
        data.set_epoch(4)
    for i in range(50):
        equal(got[i], expected[i])
    assert got.describe(26) == f"{shards}/train-00001-of-00002.parquet#1"


def test_datasets_reads_what_convert_data_writes(tmp_path):
    """Bytes, sizes, boxes, areas, crowds and class names, as Hugging Face's library reads them; and our own reader."""
    path, images = coco.write(tmp_path / "source")
    (written,) = convert_data(path, tmp_path / "shards", images, to="parquet")
    assert [file.name for file in written.files] == ["all-00000-of-00001.parquet"]
    data = open_data(path, images).annotations
    read = datasets.load_dataset("parquet", data_files=str(written.files[0]), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    assert isinstance(read.features["image"], datasets.Image)
    assert read.features["objects"]["category"].feature.names == ["cat", "dog"]
    raw = read.cast_column("image", datasets.Image(decode=False))
    assert [row["image"]["bytes"] for row in raw] == [(images / f"{i}.png").read_bytes() for i in (10, 11, 12)]
    for (image_id, info), row in zip(data.images.items(), read, strict=True):
        of_image = [annotation for annotation in data.annotations if annotation["image_id"] == image_id]
        assert (row["image_id"], row["height"], row["width"]) == (image_id, info["height"], info["width"])
        assert row["image"].size == (info["width"], info["height"])
        for name in ("bbox", "area", "iscrowd"):
            assert row["objects"][name] == [annotation[name] for annotation in of_image]
        names = [NAMES[label] for label in row["objects"]["category"]]
        assert names == [data.categories[annotation["category_id"]] for annotation in of_image]
    expected, got = CocoData(path, images, preprocessing=SMALL), ParquetData(tmp_path / "shards", preprocessing=SMALL)
    assert [a["iscrowd"] for a in got.annotations.annotations] == [0, 0, 0, 0, 1]
    assert [a["area"] for a in got.annotations.annotations] == [a["area"] for a in data.annotations]
    for i in range(3):
        assert torch.equal(got[i][0], expected[i][0])
        assert torch.equal(got[i][1]["boxes"], expected[i][1]["boxes"])
        names = [[d.class_names[label] for label in d[i][1]["labels"]] for d in (got, expected)]
        assert names[0] == names[1]


def test_files_are_filled_in_the_order_of_the_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr("conditional_detr.data.formats.parquet_writing.SHARD_BYTES", 1)
    monkeypatch.setattr("conditional_detr.data.formats.parquet_writing.ROW_GROUP", 2)
    path, images = coco.write(tmp_path / "source")
    data, _ = open_data(path, images)
    paths = {image_id: images / info["file_name"] for image_id, info in data.images.items()}
    done = []
    plan = plan_shards("val", data, paths, written=done.append)
    assert [*plan] == ["val-00000-of-00002.parquet", "val-00001-of-00002.parquet"]
    for name, write in plan.items():
        write(tmp_path / name)
    read = [pq.read_table(tmp_path / name)["image_id"].to_pylist() for name in plan]
    assert (read, done) == ([[10, 11], [12]], [2, 1])


def test_conversion_leaves_no_files_of_an_earlier_one_beside_its_own(tmp_path):
    path, images = coco.write(tmp_path / "source")
    out = tmp_path / "out"
    convert_data(path, out, images, to="parquet")
    before = (out / "all-00000-of-00001.parquet").read_bytes()
    with pytest.raises(FileExistsError, match=r"all-00000-of-00001\.parquet: already exists"):
        convert_data(path, out, images, to="parquet")
    convert_data(path, out, images, to="parquet", overwrite=True)
    assert (out / "all-00000-of-00001.parquet").read_bytes() == before
    (out / "all-00001-of-00002.parquet").write_bytes(before)
    with pytest.raises(FileExistsError, match=r"expected no other Parquet files, .*, got all-00001-of-00002"):
        convert_data(path, out, images, to="parquet", overwrite=True)
    Image.new("RGB", (3, 3)).save(images / "11.png")
    with pytest.raises(ValueError, match=r"11\.png: expected 64 x 48 pixels"):
        convert_data(path, tmp_path / "other", images, to="parquet")
    assert not [*(tmp_path / "other").glob("*.parquet")]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_each_image_is_in_an_epoch_once_and_each_process_has_row_groups_of_its_own(shards, batch_size, processes):
    data = ParquetData(shards, preprocessing=SMALL, shuffle_buffer=8)
    plans = [batches(data, batch_size, seed=1, epoch=2, rank=rank, processes=processes) for rank in range(processes)]
    assert len({len(plan) for plan in plans}) == 1
    assert max(len(batch) for plan in plans for batch in plan) <= batch_size
    counts = Counter(index for plan in plans for batch in plan for index in batch)
    assert counts.keys() == set(range(50))
    assert sum(counts.values()) - 50 < processes  # as many for each
    groups = [
        {g for g, samples in enumerate(data.row_groups) for batch in plan for i in batch if i in samples}
        for plan in plans
    ]
    assert len(data.row_groups) == 8
    assert sum(map(len, groups)) <= 8 + processes - 1  # at most one is shared with the next
    other = batches(data, batch_size, seed=1, epoch=3, processes=processes)
    assert other != plans[0] or batch_size == 64
    assert plans[0] == batches(data, batch_size, seed=1, epoch=2, processes=processes)


def test_images_of_one_shape_form_a_batch(shards):
    data = ParquetData(shards, preprocessing=SMALL, shuffle_buffer=48)
    plan = batches(data, 4, seed=0, epoch=0)
    mixed = [batch for batch in plan if len({data.shapes[index] for index in batch}) > 1]
    assert len(plan) == 13
    assert len(mixed) <= 2  # one of each part of 48 images


def test_an_image_moves_by_no_more_than_the_buffer():
    """Of 10,000 images in row groups of 100, few groups are needed at a time, and the order is mixed."""

    class Data(list):
        row_groups = tuple(range(i, i + 100) for i in range(0, 10_000, 100))
        shuffle_buffer = 500
        shapes = ((1, 1),) * 10_000

    order = np.concatenate(batches(Data(range(10_000)), 10, seed=0, epoch=0))
    first = {}
    for position, index in enumerate(order):
        first.setdefault(index // 100, []).append(position)
    spread = [max(positions) - min(positions) for positions in first.values()]
    assert max(spread) < 100 + 3 * 500
    assert min(spread) > 100  # none is read from its beginning to its end
    together = [len({index // 100 for index in order[i : i + 500]}) for i in range(0, 10_000, 500)]
    assert np.mean(together) > 5


@pytest.mark.parametrize("buffer", [1, 20, 2000])
def test_row_groups_are_read_once_and_images_are_kept_no_longer_than_needed(shards, count_reads, buffer):
    data = ParquetData(shards, preprocessing=SMALL, shuffle_buffer=buffer)
    plan = batches(data, 4, seed=0, epoch=0)
    numbers = []
    for batch, contents in zip(plan, data.read_ahead(plan), strict=True):
        assert contents.keys() == set(batch)
        for index, content in contents.items():
            pixel = Image.open(io.BytesIO(content)).getpixel((0, 0))
            assert pixel[0] * 256 + pixel[1] == index
            numbers.append(index)
    assert sorted(numbers) == list(range(50))
    assert set(count_reads.values()) == {1}
    assert len(count_reads) == 8


def test_a_resumed_epoch_reads_only_what_is_left(shards, count_reads):
    data = ParquetData(shards, preprocessing=SMALL, shuffle_buffer=1)
    plan = batches(data, 4, seed=0, epoch=0)[-1:]
    assert sorted(next(data.read_ahead(plan))) == sorted(plan[0])
    assert sum(count_reads.values()) <= 2


def test_memory_holds_the_buffer_and_some_row_groups(tmp_path):
    """Of 400 images, as many encoded ones are referred to at a time as the buffer says."""
    folder = write_by_datasets(tmp_path, 400, files=4, group=10)
    data = ParquetData(folder, preprocessing=SMALL, shuffle_buffer=40)
    plan = batches(data, 4, seed=0, epoch=0)
    reading = data.read_ahead(plan)
    most = 0
    for _ in plan:
        next(reading)
        most = max(most, len(reading.gi_frame.f_locals["kept"]))
    assert 40 <= most <= 2 * 40 + 3 * 10


@pytest.mark.parametrize("scheme", ["file://{}", "fsspec+file://{}"])
def test_files_by_uri_give_the_same(shards, scheme):
    expected, got = (ParquetData(source, preprocessing=SMALL) for source in (shards, scheme.format(shards)))
    assert got.annotations.images == expected.annotations.images
    assert torch.equal(got[30][0], expected[30][0])
    plan = batches(got, 4, seed=0, epoch=0)
    for batch, contents in zip(plan, got.read_ahead(plan), strict=True):
        got.put(contents)
        for index in batch:
            assert torch.equal(got[index][0], expected[index][0])


def test_splits_are_words_in_the_names_of_files(tmp_path):
    for name in ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "_other.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": [b""]}), tmp_path / name)
    (tmp_path / "README.md").write_text("data")
    assert [*find_shards(tmp_path)] == ["train", "val"]
    assert is_parquet(tmp_path)
    with pytest.raises(ValueError, match="expected the split test, got train, val"):
        open_shards(tmp_path, split="test")
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "more.parquet")
    with pytest.raises(ValueError, match=r"more\.parquet: expected a split in the file's name, as others have it"):
        find_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a Parquet file, or a folder with them, got none"):
        find_shards(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"README\.md.*; Parquet files are read by train, compare and evaluate"):
        open_data(tmp_path)
    coco.write(tmp_path / "coco")
    (tmp_path / "coco" / "extra.parquet").write_bytes((tmp_path / "more.parquet").read_bytes())
    assert not is_parquet(tmp_path / "coco")  # it is recognised as COCO


def png(size=(40, 24)):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def columns(**changes):
    """Two rows, with some columns changed; None: without the column."""
    objects = [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["cat"]}] * 2
    found = {"image": [png()] * 2, "width": [40] * 2, "height": [24] * 2, "objects": objects, **changes}
    return {name: values for name, values in found.items() if values is not None}


def one(**changes):
    """The objects of two rows, with changes."""
    return {"objects": [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["cat"], **changes}] * 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": None}, r"expected the columns width, height, objects, got image, height, objects without width"),
        ({"objects": None}, r"without objects"),
        ({"image": None}, r"expected a column 'image' or 'bytes' with the bytes of image files"),
        ({"width": [40, None]}, r"expected width and height of each image, got null 1 times"),
        ({"width": [40, 0]}, r"expected height and width as positive integers, got 24 and 0"),
        (one(bbox=[[1.0, 2.0, 3.0]]), r"x\.parquet#0: objects\[0\]: expected a bbox"),
        (one(category=[]), r"#0: objects: expected lists of one length, got bbox of 1, category of 0"),
        (one(bbox=[[1.0, 2.0, -3.0, 4.0]]), r"with w and h of at least 0"),
        (one(bbox=[[0.1, 0.2, 0.3, 0.4]]), r"looks like fractions of the image"),
        (one(iscrowd=[7]), r"expected 0 or 1 as iscrowd"),
    ],
)
def test_what_is_wrong_with_annotations_is_said_in_the_beginning(tmp_path, changes, message):
    pq.write_table(pa.table(columns(**changes)), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        ParquetData(tmp_path, preprocessing=SMALL)


def test_class_names_must_be_the_same_in_all_files(tmp_path):
    write_by_datasets(tmp_path, 4, files=1)
    other = {**FEATURES["objects"], "category": datasets.List(datasets.ClassLabel(names=["a", "b"]))}
    features = datasets.Features({**FEATURES, "objects": other})
    (file,) = write_by_datasets(tmp_path / "more", 4, files=1, features=features).iterdir()
    file.rename(tmp_path / "train-more.parquet")
    with pytest.raises(ValueError, match=r"expected the same class names in all files, got .*cat, dog in"):
        ParquetData(tmp_path)


def test_bad_images_are_named_by_file_and_row(tmp_path):
    """A row without bytes, one that is no image, one of another size, and a damaged row group."""
    images = [png(), None, b"text", png((24, 40)), png()]
    objects = [{"bbox": [[1.0, 2.0, 3.0, 4.0]], "category": ["cat"]}] * 5
    path = tmp_path / "x.parquet"
    table = pa.table({"image": images, "width": [40] * 5, "height": [24] * 5, "objects": objects})
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False)
    data = ParquetData(path, preprocessing=SMALL)
    found = next(data.read_ahead([[0, 1, 2, 3, 4]]))
    data.put(found)
    assert data[0][0].shape == (3, 29, 48)
    messages = {1: "expected the bytes of an image, got null", 2: ".*image", 3: "expected 40 x 24 pixels"}
    for index, message in messages.items():
        with pytest.raises(ValueError, match=rf"x\.parquet#{index}: {message}"):
            data[index]
    raw = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    raw[start : start + 20] = bytes(20)
    path.write_bytes(raw)
    contents = next(data.read_ahead([[0, 4]]))
    assert contents[0] == png()
    data.put(contents)
    with pytest.raises(OSError, match=r"x\.parquet: row group 1 cannot be read"):
        data[4]


def test_the_buffer_holds_500_megabytes_or_5000_images(tmp_path):
    """Four images of 50 MB, so ten in the buffer; and the small ones of the other tests."""
    large = png() + bytes(50_000_000)
    with pq.ParquetWriter(tmp_path / "x.parquet", pa.table(columns()).schema, compression="none") as file:
        for i in range(2):
            file.write_table(pa.table(columns(image=[large + bytes([i]), large + bytes([i, i])])))
    assert ParquetData(tmp_path, preprocessing=SMALL).shuffle_buffer == 10
    pq.write_table(pa.table(columns()), tmp_path / "x.parquet")
    assert ParquetData(tmp_path, preprocessing=SMALL).shuffle_buffer == 5000


def test_without_pyarrow_the_error_says_what_to_install(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda: ParquetData(shards), lambda: convert_data(tmp_path, tmp_path / "out", to="parquet")):
        with pytest.raises(ModuleNotFoundError, match=r"Parquet files need pyarrow, .* 'conditional-detr\[parquet\]'"):
            call()
    with pytest.raises(ValueError, match="to: expected coco or parquet, got 'yolo'"):
        convert_data(tmp_path, tmp_path / "out", to="yolo")


def test_no_buffer_and_no_probabilities(shards):
    with pytest.raises(ValueError, match="shuffle_buffer: expected at least 1, got 0"):
        ParquetData(shards, shuffle_buffer=0)
    data = ParquetData(shards, preprocessing=SMALL)
    with pytest.raises(ValueError, match="balanced: expected image files, got images in row groups"):
        batches(data, 4, seed=0, epoch=0, probabilities=np.full(50, 1 / 50))


def test_webdataset_shards_become_parquet_files_by_datasets(tmp_path):
    """As the guide says: what ``datasets`` reads of a shard, with the columns renamed."""
    import webdataset

    given = rows(6)
    with webdataset.TarWriter(str(tmp_path / "shard.tar")) as writer:
        for i, image in enumerate(given["image"]):
            file = io.BytesIO()
            image.save(file, "PNG")
            sizes = {"width": image.width, "height": image.height}
            writer.write(
                {"__key__": f"{i}", "png": file.getvalue(), "json": {**sizes, "objects": given["objects"][i]}}
            )
    options = {"data_files": str(tmp_path / "shard.tar"), "split": "train", "cache_dir": str(tmp_path / "cache")}
    read = datasets.load_dataset("webdataset", **options)
    read.map(lambda row: row["json"]).rename_column("png", "image").to_parquet(str(tmp_path / "shard.parquet"))
    data = ParquetData(tmp_path / "shard.parquet", preprocessing=Preprocessing(24, 40))
    assert data.class_names == ("0", "1")
    for i, objects in enumerate(given["objects"]):
        pixels = data.preprocessing.mean[0] + data[i][0][0, 0, :2] * data.preprocessing.std[0]
        expected = np.asarray(given["image"][i])[0, :2, 0] / 255
        np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-6)
        assert data[i][1]["labels"].tolist() == objects["category"]


def test_files_of_a_conversion_that_was_killed_are_no_data(shards, tmp_path):
    """Drafts are left out, and removed by the next conversion; a part of numbered files is refused."""
    path, images = coco.write(tmp_path / "source")
    out = tmp_path / "out"
    draft = out / ".0123456789abcdef.unfinished"
    draft.mkdir(parents=True)
    (draft / "train-00000-of-00002.parquet").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="expected a Parquet file, or a folder with them, got none"):
        find_shards(out)
    convert_data(path, out, images, to="parquet")
    assert not draft.exists()
    assert len(ParquetData(out, preprocessing=SMALL)) == 3
    part = tmp_path / "part"
    part.mkdir()
    for file in [*shards.iterdir()][:1]:
        (part / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=r"train: expected 2 files, got 1, without 0000\d-of-00002\.parquet"):
        ParquetData(part)


def test_class_names_are_those_of_the_category(tmp_path):
    """Other features may be ClassLabels, too; a file without rows says nothing; names may be in another split only."""
    truncated = datasets.List(datasets.ClassLabel(names=["no", "yes"]))
    objects = {"truncated": truncated, **FEATURES["objects"]}
    given = rows(4)
    given["objects"] = [{**one, "truncated": [0]} for one in given["objects"]]
    whole = datasets.Dataset.from_dict(given, features=datasets.Features({**FEATURES, "objects": objects}))
    whole.to_parquet(str(tmp_path / "x.parquet"))
    pq.write_table(pa.table(columns()).slice(0, 0), tmp_path / "empty.parquet")
    data = ParquetData(tmp_path, preprocessing=SMALL)
    assert (data.class_names, len(data)) == (("cat", "dog"), 4)
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, name in (("train", "b"), ("val", "a")):
        pq.write_table(pa.table(columns(**one(category=[name]))), folder / f"{split}.parquet")
    assert ParquetData(folder, preprocessing=SMALL).class_names == ("a", "b")


def test_row_groups_have_at_most_100_megabytes(tmp_path):
    """Unless one image has more; names and ids that Parquet cannot store as they are become texts."""
    paths = {}
    for i, megabytes in enumerate((60, 60, 30, 120, 1)):
        paths[2**70 + i] = tmp_path / f"{i}\udcff.bin"
        paths[2**70 + i].write_bytes(b"")
        os.truncate(paths[2**70 + i], megabytes * 1_000_000)
    assert [len(group) for group, _ in _row_groups(paths)] == [1, 2, 1, 1]
    content = coco.content()
    _, images = coco.write(tmp_path / "source")
    for entry in (*content["images"], *content["annotations"]):
        key = "file_name" if "file_name" in entry else "image_id"
        entry["id" if key == "file_name" else key] += 2**70
    (images / "10.png").rename(images / "10\udcff.png")
    content["images"][0]["file_name"] = "10\udcff.png"
    (tmp_path / "source" / "data.json").write_text(json.dumps(content))
    convert_data(tmp_path / "source" / "data.json", tmp_path / "out", images, to="parquet")
    table = pq.read_table(tmp_path / "out" / "all-00000-of-00001.parquet")
    assert table["image_id"].to_pylist() == [str(2**70 + i) for i in (10, 11, 12)]
    assert table["image"][0]["path"].as_py() == "10\ufffd.png"


@pytest.mark.parametrize("names", [["minitrain", "minival"], ["train", "minival"], ["train", "training"]])
def test_splits_that_names_of_files_do_not_tell_apart_are_not_written(tmp_path, names):
    content = coco.content()
    coco.write(tmp_path / "source")
    (tmp_path / "source" / "data.json").unlink()
    for name in names:
        (tmp_path / "source" / f"instances_{name}.json").write_text(json.dumps(content))
    with pytest.raises((OSError, ValueError), match=r"expected splits that are called train|expected one train split"):
        convert_data(tmp_path / "source", tmp_path / "out", tmp_path / "source" / "images", to="parquet")
    assert not (tmp_path / "out").exists()


def test_the_file_or_the_nearest_folder_says_the_split(tmp_path):
    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(columns()), tmp_path / name)

    write("test-kit/train-0.parquet", "test-kit/val-0.parquet", "linked/more.parquet")
    assert [*find_shards(tmp_path / "test-kit")] == ["train", "val"]
    assert [*find_shards(tmp_path / "test-kit" / "val-0.parquet")] == ["all"]
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "link").symlink_to(tmp_path / "linked")
    write("data/train/0000.parquet")
    assert len(open_shards(tmp_path / "data").annotations.images) == 4
    write("both/full/train-0.parquet", "both/small/train-0.parquet")
    with pytest.raises(ValueError, match=r"expected the splits in one folder, got full, small"):
        find_shards(tmp_path / "both")
    write("spark.parquet/part-0.parquet")
    assert is_parquet(tmp_path / "spark.parquet")


@pytest.mark.parametrize("metadata", ['{"info": null}', '{"info": {"features": null}}', "[]"])
def test_metadata_of_other_programs(tmp_path, metadata):
    table = pa.table(columns())
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "x.parquet")
    assert ParquetData(tmp_path, preprocessing=SMALL).class_names == ("cat",)
    pq.write_table(table.replace_schema_metadata({"huggingface": "text"}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: expected JSON in the metadata of huggingface"):
        ParquetData(tmp_path)


def test_a_file_that_changes_is_an_error_of_its_images(tmp_path, shards):
    """Read by the footer of the beginning, so that many row groups are not as many footers."""
    path = tmp_path / "x.parquet"
    table = pa.table(columns(image=[png(), png()]))
    pq.write_table(table, path, row_group_size=1)
    data = ParquetData(path, preprocessing=SMALL)
    assert data.sharding != ParquetData(shards, preprocessing=SMALL).sharding
    pq.write_table(table.slice(0, 1), path)
    found = next(data.read_ahead([[0, 1]]))
    assert all(isinstance(content, bytes) or "or the file has changed" in str(content) for content in found.values())
    assert isinstance(found[1], OSError)


@pytest.mark.parametrize("kind", ["dictionary", "binary_view", "large_binary"])
def test_image_columns_of_other_types(tmp_path, kind):
    images = pa.array([png(), png()])
    images = images.dictionary_encode() if kind == "dictionary" else images.cast(getattr(pa, kind)())
    pq.write_table(pa.table(columns(image=images)), tmp_path / "x.parquet")
    assert ParquetData(tmp_path, preprocessing=SMALL)[1][0].shape == (3, 29, 48)


def test_other_binary_columns_are_no_images(tmp_path):
    pq.write_table(pa.table(columns(image=["a.png", "b.png"]) | {"mask": [png(), png()]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected a column 'image' .*, got image \(string\), .*mask \(binary\)"):
        ParquetData(tmp_path)


def test_processes_that_measure_have_parts_of_their_own(shards):
    data = ParquetData(shards, preprocessing=SMALL)
    plans = [batches(data, 4, seed=0, epoch=0, shuffle=False, rank=rank, processes=3) for rank in range(3)]
    assert [index for plan in plans for batch in plan for index in batch] == list(range(50))
