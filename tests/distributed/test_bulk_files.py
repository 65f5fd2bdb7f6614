"""Inputs and results of bulk detection, without Ray: units of work, file systems, plan and manifest."""

import io
import json
import sys
import tarfile

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from conditional_detr import Detections, Detector
from conditional_detr import distributed as distributed_module
from conditional_detr.cli import app
from conditional_detr.data.synthetic import draw_image
from conditional_detr.distributed import detect_dataset, results
from conditional_detr.distributed import units as units_module
from conditional_detr.distributed.detect import _locked, _share
from conditional_detr.distributed.pool import BulkResult
from conditional_detr.distributed.results import create, finished, planned, write_results
from conditional_detr.distributed.units import Source, Unit, absolute_input, list_units, read_unit
from conditional_detr.distributed.worker import Job, Worker
from conditional_detr.system import storage

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def jpeg(shade=0):
    content = io.BytesIO()
    Image.new("L", (8, 8), shade).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Images below folders, with files that are none."""
    for name in ("a.jpg", "b.PNG", "below/c.webp", "below/deeper/d.jpg", "notes.txt", "below/._c.webp", "out/e.jpg"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())
    return tmp_path / "in"


def names_of(units):
    return [name for unit in units for name in unit.names]


IMAGES = ["a.jpg", "b.PNG", "below/c.webp", "below/deeper/d.jpg"]


@pytest.mark.parametrize("scheme", ["", "file://", "fsspec+local://"])
def test_folders_by_path_and_by_uri(folder, scheme):
    """The last goes the way of object stores, through fsspec. The output folder is left out."""
    units = [*list_units([storage.absolute(f"{scheme}{folder}")], output=str(folder / "out"), size=3)]
    expected = sorted(str(folder / name) for name in IMAGES)
    if scheme == "fsspec+local://":
        expected = sorted(f"fsspec+local://{name}" for name in [*expected, str(folder / "out/e.jpg")])
    assert sorted(names_of(units)) == expected
    assert max(len(unit.names) for unit in units) == 3
    assert all(storage.read(name) == jpeg() for name in names_of(units))


def test_globs_files_and_repeated_names(folder):
    given = [f"{folder}/*.jpg", str(folder / "below"), str(folder / "a.jpg"), "https://example.org/x.jpg"]
    names = names_of(list_units(given, output="out", size=100))
    assert sorted(names) == sorted(
        [str(folder / name) for name in ("a.jpg", "below/c.webp", "below/deeper/d.jpg")]
        + ["https://example.org/x.jpg"]
    )
    matches = names_of(list_units([f"fsspec+local://{folder}/below/*.jpg"], output="out", size=100))
    assert matches == [f"fsspec+local://{folder}/below/deeper/d.jpg"]


@pytest.mark.parametrize("scheme", ["", "fsspec+local://"])
def test_files_of_bulk_detections_are_no_inputs(tmp_path, scheme):
    """Their output folders may be the input folder or below it; shards of other writers in such folders stay."""
    ours = ["_plan.parquet", ".0123456789abcdef.unfinished/_plan.parquet", f"part=0a/0a{'1' * 30}.parquet"]
    ours += [f"part=0a/.0123456789abcdef.unfinished/0a{'1' * 30}.parquet", f"below/part=0a/0a{'1' * 30}.parquet"]
    ours += ["below/_plan.parquet", "below/.hidden.tar"]
    inputs = ["_a.jpg", "below/b.tar", "part=0a/c.tar.gz"]
    for name in (*ours, *inputs):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = names_of(list_units([f"{scheme}{tmp_path}"], output=str(tmp_path), size=9))
    assert sorted(everything) == sorted(f"{scheme}{tmp_path}/{name}" for name in inputs)
    with pytest.raises(ValueError, match="expected images or shards, found none"):
        [*list_units([f"{scheme}{tmp_path}/*.parquet"], output="out", size=9)]


def test_relative_globs_in_folders_with_brackets(tmp_path, monkeypatch):
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.jpg").touch()
    (tmp_path / "run1").mkdir()
    (tmp_path / "run1" / "b.jpg").touch()
    monkeypatch.chdir(tmp_path / "run[1]")
    for pattern, expected in (("*.jpg", "run[1]/a.jpg"), ("../run1/*.jpg", "run1/b.jpg"), ("a.jpg", "run[1]/a.jpg")):
        assert names_of(list_units([absolute_input(pattern)], output="out", size=9)) == [str(tmp_path / expected)]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in UTF-8 only")
def test_odd_names_do_not_stop_the_job(tmp_path):
    """Names that no file can have fail when they are opened; shards whose names pyarrow has not are errors."""
    for name in ("b\udcff.jpg", "b\udcff.parquet", "b\udcff.tar", "a" * 300 + ".jpg", "a\0b.jpg"):
        assert names_of(list_units([str(tmp_path / name)], output="out", size=9)) == [str(tmp_path / name)]
    for name in ("q\udcff.jpg", "q\udcff.parquet", "z.jpg"):
        (tmp_path / name).touch()
    units = [*list_units([str(tmp_path)], output="out", size=9)]
    assert sorted(names_of(units)) == [str(tmp_path / name) for name in ("q\udcff.jpg", "q\udcff.parquet", "z.jpg")]
    (shard,) = next(map(read_unit, [unit for unit in units if unit.names[0].endswith("parquet")]))
    assert "q\udcff.parquet: the shard cannot be read" in str(shard.image)
    assert finished(str(tmp_path)) == set()


@pytest.mark.parametrize("options", ["?region=us-east-1", "?endpoint_override=localhost:9000&scheme=http"])
def test_uris_with_options(monkeypatch, options):
    """Images and shards are recognised, and globs matched, by the name without options; the files found have them."""
    found = ["in/a.jpg", "in/b.gif", "in/c.parquet", "in/d.tar", "in/e.txt"]
    monkeypatch.setattr(units_module, "is_folder", lambda name: name == f"s3://b/in{options}")
    monkeypatch.setattr(units_module, "is_file", lambda name: name.startswith("s3://b/in/a.jpg"))
    walked = []
    monkeypatch.setattr(
        units_module, "walk", lambda name: walked.append(name) or (f"s3://b/{path}{options}" for path in found)
    )
    monkeypatch.setattr(units_module, "open_parquet", fail_to_open)

    def listed(argument):
        return sorted(names_of(list_units([absolute_input(argument)], output="out", size=9)))

    assert listed(f"s3://b/in{options}") == [f"s3://b/{path}{options}" for path in found[:4]]
    assert listed(f"s3://b/i?/*.gif{options}") == [f"s3://b/in/b.gif{options}"]
    assert listed(f"s3://b/in/missing.jpg{options}") == [f"s3://b/in/missing.jpg{options}"]
    assert walked == [f"s3://b/in{options}", f"s3://b{options}"]
    assert storage.path_of("/here/a?b=c.jpg") == "/here/a?b=c.jpg"


def fail_to_open(name):
    raise OSError("the connection has timed out")


@pytest.mark.parametrize("name", ["*.gif", "fsspec+local://{}/*.gif", "notes"])
def test_inputs_without_images(folder, name):
    (folder / "notes").mkdir()
    given = name.format(folder) if name.startswith("fsspec") else str(folder / name)
    with pytest.raises(ValueError, match=r"expected images|no file matches"):
        [*list_units([given], output="out", size=1)]


def test_an_unknown_file_system():
    with pytest.raises(ValueError, match=r"nothing://there: expected a file system of pyarrow, or fsspec"):
        storage.locate("nothing://there/image.jpg")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("s3://bucket/a folder/b#c.jpg?region=us-east-1", "bucket/a folder/b#c.jpg"),
        ("S3://bucket/x?.jpg?endpoint_override=localhost:1&scheme=http&region=x", "bucket/x?.jpg"),
        ("gs://anonymous@bucket/x.jpg", "bucket/x.jpg"),
        ("hf://datasets/owner/name/x.jpg", "datasets/owner/name/x.jpg"),
    ],
)
def test_uris_of_object_stores(name, path):
    """Names with characters that a URI would quote are those of the store; children keep the options."""
    filesystem, found = storage.locate(name)
    assert found == path
    kind = {"s3": "s3", "gs": "gcs", "hf": "py::fsspec+hf"}[name.partition(":")[0].lower()]
    assert filesystem.type_name == kind
    assert storage.locate(storage.child(name, "y.jpg"))[1] == f"{path}/y.jpg"


def write_parquet(path, values, kind):
    pq.write_table(pa.table({"id": range(len(values)), "photo": pa.array(values, kind)}), path, row_group_size=2)


@pytest.mark.parametrize("struct", [False, True])
def test_rows_of_a_parquet_file(tmp_path, struct):
    values = [jpeg(shade) for shade in (0, 99, 250)]
    kind = pa.struct([("bytes", pa.binary())]) if struct else pa.large_binary()
    path = tmp_path / "x.parquet"
    write_parquet(path, [{"bytes": value} for value in values] if struct else values, kind)
    units = [*list_units([str(path)], output="out", size=100)]
    assert [unit.row_group for unit in units] == [0, 1]
    sources = [source for unit in units for source in read_unit(unit)]
    assert sources == [Source(f"{path}#{row}", value) for row, value in enumerate(values)]


def test_a_parquet_file_without_images(tmp_path):
    pq.write_table(pa.table({"id": [1], "x": [b"1"], "y": [b"2"]}), tmp_path / "x.parquet")
    with pytest.raises(
        ValueError, match=r"x.parquet: expected a column 'image' or 'bytes' .*, got id \(int64\), x \(binary\), y"
    ):
        [*list_units([str(tmp_path / "x.parquet")], output="out", size=1)]


def test_a_parquet_file_whose_footer_cannot_be_read_at_first(tmp_path, monkeypatch):
    """Its row groups are not known then; all are read."""
    values = [b"a", b"b", b"c", b"d", b"e"]
    write_parquet(tmp_path / "x.parquet", values, pa.binary())
    with monkeypatch.context() as once:
        once.setattr(units_module, "open_parquet", fail_to_open)
        (unit,) = list_units([str(tmp_path / "x.parquet")], output="out", size=1)
    assert [*read_unit(unit)] == [Source(f"{tmp_path}/x.parquet#{row}", value) for row, value in enumerate(values)]


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".parquet"])
def test_a_shard_without_images_is_an_error(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        write_parquet(path, [], pa.binary())
    else:
        write_tar(path, ["0.txt"])
    (unit,) = list_units([str(path)], output="out", size=1)
    ((key, error),) = read_unit(unit)
    assert (key, str(error)) == (str(path), f"{path}: expected images in the shard, found none")


def write_tar(path, names):
    with tarfile.open(path, "w:" if path.suffix == ".tar" else "w:gz") as shard:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 4
            shard.addfile(info, io.BytesIO(b"abcd"))


@pytest.mark.parametrize(
    ("damage", "byte"),
    [
        ("checksum", 1024),
        ("within a header", 1024),
        ("after a member", 1024),
        ("before the mark of the end", 3072),
    ],
)
def test_damage_that_tarfile_takes_for_the_end(tmp_path, damage, byte):
    """Each member has a header and a block of 512 bytes; two blocks of zeros end the file."""
    path = tmp_path / "x.tar"
    write_tar(path, ["0.jpg", "1.jpg", "2.jpg"])
    content = bytearray(path.read_bytes())
    if damage == "checksum":
        content[1024 + 150] ^= 1
    length = {"within a header": byte + 300, "checksum": None}.get(damage, byte)
    path.write_bytes(content[:length])
    *good, last = read_unit(Unit((str(path),)))
    assert good == [Source(f"{path}#{index}.jpg", b"abcd") for index in range(byte // 1024)]
    assert isinstance(last.image, OSError)
    assert f"the shard cannot be read: expected a header or the mark of the end at byte {byte}: " in str(last.image)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".parquet"])
def test_a_damaged_shard_is_one_error(tmp_path, suffix):
    """What can be read of it is read."""
    path = tmp_path / f"x{suffix}"
    if suffix == ".parquet":
        path.write_bytes(b"PAR1 no parquet")
    else:
        with tarfile.open(path, "w:gz" if suffix.endswith("gz") else "w") as shard:
            for index in range(3):
                info = tarfile.TarInfo(f"{index}.jpg")
                info.size = len(jpeg())
                shard.addfile(info, io.BytesIO(jpeg()))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if suffix.endswith("gz") else content[:1800])
    (unit,) = list_units([str(path)], output="out", size=1)
    *good, last = read_unit(unit)
    assert last.key == str(path)
    assert isinstance(last.image, OSError)
    assert "the shard cannot be read" in str(last.image)
    if suffix == ".tar":
        assert good == [Source(f"{path}#0.jpg", jpeg())]


def detections(count):
    boxes = torch.arange(4.0 * count).reshape(count, 4)
    return Detections(
        boxes=boxes,
        scores=torch.linspace(0.9, 0.5, count),
        labels=torch.arange(count),
        names=tuple(f"name {i}\udcff" for i in range(count)),
        category_ids=tuple(range(count)),
        queries=torch.arange(count),
        size=(48, 64),
        source=None,
    )


@pytest.mark.parametrize("scheme", ["", "fsspec+local://"])
def test_results_are_read_by_others(tmp_path, scheme):
    """pyarrow reads the whole folder, and leaves out plan and manifest; bytes that are no UTF-8 are escaped."""
    out = f"{scheme}{tmp_path}/out"
    units = [Unit(("a.jpg", "b\udcff.jpg")), Unit(("c.jpg",)), Unit(("x.parquet",), 3)]
    assert create(out, units, {"settings": {}}, resume=False, overwrite=False) == 3
    assert [*planned(out)] == units
    assert finished(out) == set()
    counts = write_results(out, units[0], units[0].names, [detections(2), ValueError("b: no image")])
    assert counts == {"images": 2, "objects": 2, "failed": 1, "errors": ["b: no image"]}
    assert finished(out) == {units[0].digest}
    first, second = pq.read_table(tmp_path / "out").to_pylist()
    assert first.pop("part") == second.pop("part") == units[0].digest[:2]
    assert first == {
        "image": "a.jpg",
        "height": 48,
        "width": 64,
        "boxes": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "scores": [pytest.approx(0.9), 0.5],
        "labels": [0, 1],
        "names": ["name 0\\udcff", "name 1\\udcff"],
        "error": None,
    }
    assert second == {**dict.fromkeys(first), "image": "b\\udcff.jpg", "error": "b: no image"}


@pytest.mark.parametrize("scheme", ["", "fsspec+local://"])
def test_files_are_complete_or_not_there(tmp_path, scheme):
    """Also in file systems that write in place."""
    name = f"{scheme}{tmp_path}/out/part=00/{'0' * 32}.parquet"

    def fail(file):
        file.write(b"half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        storage.write(name, fail)
    assert [*(tmp_path / "out/part=00").iterdir()] == []
    for content in (b"first", b"second"):
        storage.write(name, lambda file, content=content: file.write(content))
        assert storage.read(name) == content
    with pytest.raises(OSError, match="the disk is full"):
        storage.write(name, fail)
    assert [path.read_bytes() for path in (tmp_path / "out/part=00").iterdir()] == [b"second"]


@pytest.mark.parametrize("scheme", ["", "fsspec+local://"])
def test_results_of_jobs_below_a_folder_are_not_its_own(tmp_path, scheme):
    for name in ("part=00", "below/part=00", "part=01"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"{'0' * 32}.parquet").touch()
    assert finished(f"{scheme}{tmp_path}") == finished(f"{scheme}{tmp_path}/") == {"0" * 32}
    assert finished(f"{scheme}{tmp_path}/below") == {"0" * 32}
    (tmp_path / f"part=00/{'0' * 32}.parquet").unlink()
    assert create(f"{scheme}{tmp_path}", [Unit(("a.jpg",))], {}, resume=False, overwrite=True) == 1
    assert (tmp_path / f"below/part=00/{'0' * 32}.parquet").exists()


def test_messages_shorten_lists_of_inputs(tmp_path):
    create(str(tmp_path), [Unit(("a",))], {"inputs": [*map(str, range(9999))]}, resume=False, overwrite=False)
    with pytest.raises(
        ValueError, match=r"got inputs \['0', '1', .*\.\.\. \(78882 characters\), not \['b'\]; "
    ) as error:
        create(str(tmp_path), [], {"inputs": ["b"]}, resume=True, overwrite=False)
    assert len(str(error.value)) < 1000


def test_jobs_are_resumed_with_their_plan_and_replaced_on_request(tmp_path):
    """A resumed job does what was listed at its start; what others wrote stays."""
    out = str(tmp_path / "out")
    header = {"settings": {"model": "x", "top_k": 3}, "inputs": ["in"]}
    create(out, [Unit(("a.jpg",))], header, resume=True, overwrite=False)
    write_results(out, Unit(("a.jpg",)), ["a.jpg"], [detections(1)])
    mine = tmp_path / "out" / "part=00" / "mine.parquet"
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"mine")
    assert create(out, iter(()), header, resume=True, overwrite=False) == 1
    with pytest.raises(ValueError, match="already exists; --resume adds to these results, --overwrite replaces them"):
        create(out, [], header, resume=False, overwrite=False)
    with pytest.raises(ValueError, match=r"got settings \{'model': 'x', 'top_k': 3\}, not \{'model': 'y'\}"):
        create(out, [], {**header, "settings": {"model": "y"}}, resume=True, overwrite=False)
    with pytest.raises(ValueError, match=r"got inputs \['in'\], not \['other'\]"):
        create(out, [], {**header, "inputs": ["other"]}, resume=True, overwrite=False)
    (tmp_path / "out" / results.MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"expected no results without _manifest\.json, got some"):
        create(out, [], header, resume=True, overwrite=False)
    assert create(out, [Unit(("b.jpg",)), Unit(("c.jpg",))], header, resume=False, overwrite=True) == 2
    assert finished(out) == set()
    assert mine.read_bytes() == b"mine"
    (tmp_path / "out" / results.MANIFEST).write_text(json.dumps({"mine": 1}))
    with pytest.raises(ValueError, match=r"_manifest.json: expected the manifest of a bulk detection, got KeyError"):
        create(out, [], header, resume=True, overwrite=False)


def test_plans_of_more_than_a_row_group_keep_their_order(tmp_path):
    units = [Unit((f"{index}.jpg", f"{index}.png"), -1) for index in range(200)]
    create(str(tmp_path), iter(units), {}, resume=False, overwrite=False)
    assert [*planned(str(tmp_path))] == units


def fail_to_load(device):
    raise AssertionError("loaded")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "csv"], "--format: expected it with --engine torch only"),
        (["--no-draw"], "--draw: expected it with --engine torch only"),
        (["--demo"], "--demo: expected it with --engine torch only"),
        (["--tile", "800"], "--tile: expected it with --engine torch only"),
        (["--resume", "--overwrite"], "expected --resume or --overwrite, got both"),
        (["--device", "cuda:1"], "--device: expected cpu, cuda or auto with --engine ray, got cuda:1"),
    ],
)
def test_options_of_the_other_engine(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["detect", str(tmp_path), "--engine", "ray", *arguments])
    assert result.exit_code == 2
    assert result.stderr.strip() == f"error: {message}"


@pytest.mark.parametrize(
    "output", ["file:///data/x", "fsspec+local:///data/x", "hdfs:///a/b", "s3://bucket/a?region=x", "results"]
)
def test_output_by_uri_keeps_its_slashes(folder, monkeypatch, output):
    given = []

    def keep(names, output, load, **options):
        given.append((names, output))
        return BulkResult(output, 0)

    monkeypatch.setattr(distributed_module, "detect_dataset", keep)
    arguments = ["detect", str(folder), "--engine", "ray", "--weights", "shapes", "--output", output]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert given == [([str(folder)], output)]


def test_paths_are_taken_as_text(folder, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed")

    def fail(*arguments, **options):
        raise RuntimeError("not started")

    monkeypatch.setattr(ray, "init", fail)
    for dataset in (folder, [folder / "a.jpg", str(folder / "b.PNG")]):
        with pytest.raises(OSError, match="Ray: cannot be connected to or started: not started"):
            detect_dataset(dataset, tmp_path / "out", load_shapes, overwrite=True)
    assert names_of(planned(str(tmp_path / "out"))) == [str(folder / "a.jpg"), str(folder / "b.PNG")]


def test_options_of_ray_need_ray(tmp_path):
    result = CliRunner().invoke(app, ["detect", str(tmp_path), "--workers", "2"])
    assert result.exit_code == 2
    assert result.stderr.strip() == "error: --workers: expected it with --engine ray only"


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, r"dataset: expected files, folders, shards or URIs, got \[\]"),
        (["a.jpg", ""], {}, "dataset: expected files"),
        ("a.jpg", {"workers": 0}, "workers: expected an int of at least 1, got 0"),
        ("a.jpg", {"unit_size": 0.5}, "unit_size: expected an int of at least 1, got 0.5"),
        ("a.jpg", {"batch_size": True}, "batch_size: expected an int of at least 1, got True"),
        ("a.jpg", {"resume": True, "overwrite": True}, "expected resume or overwrite, got both"),
        ("a.jpg", {"device": "cuda:1"}, "device: expected cpu or cuda, got cuda:1"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_loaded(tmp_path, dataset, options, message):
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(ValueError, match=message):
        detect_dataset(dataset, str(tmp_path / "out"), fail_to_load, **options)
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs ray, .*pip install 'conditional-detr\[ray\]'"):
        detect_dataset("a.jpg", str(tmp_path / "out"), fail_to_load)


@pytest.mark.parametrize(
    ("cluster", "device", "workers", "expected"),
    [
        ({"CPU": 8.0}, None, None, ("cpu", 8, 1.0, None)),
        ({"CPU": 8.0}, "cpu", 3, ("cpu", 3, 1.0, None)),
        ({"CPU": 2.0}, None, 3, ("cpu", 3, 0.66, None)),
        ({"CPU": 8.0, "GPU": 2.0}, None, None, ("cuda", 2, 1.0, 1.0)),
        ({"CPU": 8.0, "GPU": 2.0}, "cuda", 3, ("cuda", 3, 1.0, 0.5)),
        ({"CPU": 8.0, "GPU": 4.0}, None, 1, ("cuda", 1, 1.0, 1.0)),
        ({"CPU": 4.0, "GPU": 8.0}, None, None, ("cuda", 8, 0.5, 1.0)),
        ({"CPU": 8.0, "GPU": 2.0}, "cpu", None, ("cpu", 8, 1.0, None)),
    ],
)
def test_shares_of_a_cluster(cluster, device, workers, expected):
    found, count, options = _share(cluster, device, workers)
    assert (found, count, options["num_cpus"], options.get("num_gpus")) == expected


def test_devices_that_a_cluster_does_not_have():
    with pytest.raises(ValueError, match="device: expected cpu on a cluster without GPUs, got cuda"):
        _share({"CPU": 8.0}, "cuda", None)


def test_results_in_the_way_are_refused_before_ray_is_started(folder, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setattr(ray, "init", fail_to_load)
    out = tmp_path / "out"
    create(str(out), [Unit(("a.jpg",))], {}, resume=False, overwrite=False)
    before = (out / results.MANIFEST).read_bytes()
    command = ["detect", str(folder), "--engine", "ray", "--weights", "shapes", "--output", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    manifest = out / results.MANIFEST
    assert result.stderr.strip() == (
        f"error: {manifest}: already exists; --resume adds to these results, --overwrite replaces them"
    )
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 2
    assert f"error: {manifest}: expected a job with the settings and inputs of this one" in result.stderr
    assert manifest.read_bytes() == before


def load_shapes(device):
    return Detector.from_pretrained("shapes", device=device)


def test_an_actor_reads_and_writes_by_uri(tmp_path, monkeypatch):
    """As in an object store: an image, one that is missing, and one that is none."""
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process
    draw_image(0, 3, size=(96, 128))[0].save(tmp_path / "a #?.png")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    detector = load_shapes("cpu")
    settings = detector.settings(detector.postprocessing(threshold=0.3))
    job = Job(f"fsspec+local://{tmp_path}/out", load_shapes, "cpu", settings, {"threshold": 0.3}, None, 1)
    names = tuple(f"fsspec+local://{tmp_path}/{name}" for name in ("a #?.png", "missing.jpg", "b.jpg"))
    counts = Worker(job).run(Unit(names))
    expected = detector(tmp_path / "a #?.png", threshold=0.3)
    assert len(expected) > 0
    assert (counts["images"], counts["objects"], counts["failed"]) == (3, len(expected), 2)
    good, missing, none = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["image"] for row in (good, missing, none)] == list(names)
    assert good["boxes"] == expected.boxes.tolist()
    assert good["scores"] == expected.scores.tolist()
    assert good["names"] == list(expected.names)
    assert f"{names[1]}: cannot be read" in missing["error"]
    assert none["error"] == f"{names[2]}: expected an image, got a text file"


def test_an_actor_with_other_weights_or_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    settings = {"model": "x", "threshold": 0.3, "top_k": 100, "classes": None}
    worker = Worker(Job(str(tmp_path), load_shapes, "cpu", settings, {"threshold": 0.3}, None, 1))
    with pytest.raises(ValueError, match=r"expected the same weights on all machines, of settings .*'model': 'x'"):
        worker.ready()


def test_two_jobs_do_not_write_to_one_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with (
        _locked(str(tmp_path / "out")),
        pytest.raises(OSError, match="out: another run is writing results to this folder"),
        _locked(str(tmp_path / "out")),
    ):
        pass
    with (
        pytest.raises(NotADirectoryError, match="expected a folder for results, got a file"),
        _locked(str(tmp_path / "file")),
    ):
        pass


def test_what_a_killed_actor_left_unfinished_is_removed(tmp_path):
    left = [tmp_path / "out" / name / ".0123456789abcdef.unfinished" for name in (".", "part=ab")]
    for path in left:
        path.mkdir(parents=True)
        (path / "ab.parquet").write_bytes(b"half")
    with _locked(str(tmp_path / "out")):
        assert not any(path.exists() for path in left)
