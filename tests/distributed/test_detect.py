"""Bulk detection on a local Ray cluster: processes are killed, and each image has one row."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image
from helpers.object_store import KEYS, object_store

pytest.importorskip("ray", reason="Ray is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

DEADLINE = 300  # seconds: many times what it takes
TESTS = Path(__file__).parent.parent
CLUSTER = """
import sys
import ray
ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
DRIVER = """
import json, sys
from functools import partial
from conditional_detr.distributed import detect_dataset
from helpers.bulk import load
options, seconds, output, *inputs = sys.argv[1:]
progress = []
result = detect_dataset(
    inputs, output, partial(load, output + ".mark", float(seconds)), **json.loads(options),
    on_progress=lambda done, total: progress.append((done, total)),
)
print(json.dumps({"images": result.images, "failed": result.failed, "progress": progress}))
"""


@pytest.fixture(scope="module")
def environment():
    """Environment of processes that use the cluster."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    options |= {"RAY_raylet_start_wait_time_s": str(DEADLINE), "RAY_worker_register_timeout_seconds": str(DEADLINE)}
    options["RAY_AUTH_MODE"] = "disabled"  # the address is given, not found
    environment = {**os.environ, **options, **KEYS, "PYTHONPATH": path}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, text=True, **pipes)
    watch = threading.Timer(DEADLINE, cluster.kill)
    watch.start()
    try:
        address = cluster.stdout.readline().strip()
        watch.cancel()
        assert address, "the cluster does not start"
        yield {**environment, "RAY_ADDRESS": address}
        cluster.communicate(timeout=DEADLINE)  # its standard input is closed
    finally:
        watch.cancel()
        cluster.kill()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of the shapes, two that are none, one that kills its process, and one that breaks it."""
    folder = tmp_path_factory.mktemp("bulk") / "images"
    (folder / "below").mkdir(parents=True)
    for index in range(12):
        name = f"below/{index}.png" if index % 3 == 0 else f"{index}.jpg"
        draw_image(0, index, size=(96, 128) if index % 2 else (128, 96))[0].save(folder / name)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "below/0.png").read_bytes()[:500])
    for name in ("kills.jpg", "below/fails.jpg"):
        (folder / name).write_bytes((folder / "1.jpg").read_bytes())
    return folder


def rows_of(folder):
    """Return the rows of all files of results, as pyarrow reads a folder of Parquet files."""
    return pq.read_table(folder).to_pylist()


def assert_found(row, expected):
    assert row["names"] == list(expected.names)
    assert row["labels"] == expected.labels.tolist()
    assert row["scores"] == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert (row["height"], row["width"]) == expected.size
    assert [value for box in row["boxes"] for value in box] == pytest.approx(
        expected.boxes.flatten().tolist(), abs=1e-2
    )


def driver(options, seconds, *arguments):
    """Return the command of a driver."""
    return [sys.executable, "-c", DRIVER, json.dumps(options), str(seconds), *map(str, arguments)]


def run(command, environment):
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False)


def write_shards(folder, images):
    """Write a Parquet file as Hugging Face's, and a WebDataset shard by its own writer."""
    import pyarrow as pa
    import webdataset

    values = [{"bytes": path.read_bytes(), "path": path.name} for path in images[:5]]
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    table = pa.table({"image": [*values, None], "label": range(6)}, schema)
    pq.write_table(table, folder / "shard.parquet", row_group_size=4)
    with webdataset.TarWriter(str(folder / "shard.tar")) as writer:
        for index, path in enumerate(images[5:9]):
            writer.write({"__key__": f"{index:04}", "jpg": path.read_bytes(), "json": {"index": index}})
    return [*images[:5], None, *images[5:9]]


def test_images_and_results_in_an_object_store(environment, images):
    """By S3's protocol: folders of images, results, and resuming, which finds nothing left."""
    with object_store() as store:
        folder, out = store.put(images / "below", "photos"), store.uri("results")
        options = ("--weights", "shapes", "--threshold", 0.3, "--engine", "ray", "--workers", 1, "--output", out)
        command = [sys.executable, "-m", "conditional_detr", "detect", folder, *map(str, options)]
        done = run(command, environment)
        assert (done.returncode, "5 images, " in done.stdout) == (0, True), done.stderr[-3000:]
        rows = pq.read_table("bucket/results", filesystem=store.files).to_pylist()
        expected = {store.uri(f"photos/{path.name}"): path for path in (images / "below").iterdir()}
        assert sorted(row["image"] for row in rows) == sorted(expected)
        detector = Detector.from_pretrained("shapes")
        for row in rows:
            assert_found(row, detector(expected[row["image"]], threshold=0.3))
        again = run([*command, "--resume"], environment)
        assert again.returncode == 0, again.stderr[-3000:]
        assert pq.read_table("bucket/results", filesystem=store.files).num_rows == 5


def test_every_image_has_one_row_whatever_is_killed(environment, images, tmp_path):
    """An actor is killed in its first batch; one image kills every actor, another breaks their device."""
    shards = write_shards(tmp_path, sorted(images.rglob("?.???")) + sorted(images.rglob("1?.???")))
    inputs = (images, tmp_path / "shard.parquet", tmp_path / "shard.tar")
    out = tmp_path / "out"
    done = run(driver({"threshold": 0.3, "workers": 2, "unit_size": 8}, 0.0, out, *inputs), environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(f"{out}.mark").exists()  # an actor was killed
    rows = rows_of(out)
    expected = {str(path): path for path in images.rglob("*.*")}
    names = [*(f"shard.parquet#{i}" for i in range(6)), *(f"shard.tar#{i:04}.jpg" for i in range(4))]
    expected |= {str(tmp_path / name): path for name, path in zip(names, shards, strict=True)}
    assert sorted(row["image"] for row in rows) == sorted(expected)
    errors = {Path(row["image"]).name: row["error"] for row in rows if row["error"] is not None}
    assert errors.keys() == {"empty.jpg", "cut.png", "kills.jpg", "fails.jpg", "shard.parquet#5"}
    assert "an empty file (0 bytes)" in errors["empty.jpg"]
    assert "kills.jpg: in each of 2 tries the process of the model ended: ActorDiedError" in errors["kills.jpg"]
    assert "in each of 2 tries the model failed: RuntimeError('the device has failed')" in errors["fails.jpg"]
    assert (found["images"], found["failed"]) == (len(expected), 5)
    total = found["progress"][-1][1]
    assert found["progress"] == [[done, total] for done in range(total + 1)]
    detector = Detector.from_pretrained("shapes")
    good = [row for row in rows if row["error"] is None]
    for row, detections in zip(good, detector([expected[row["image"]] for row in good], threshold=0.3), strict=True):
        assert_found(row, detections)


def test_a_killed_driver_goes_on(environment, tmp_path):
    """Killed while some of the units are done; the command then does the others, and names an image that is none."""
    folder, out = tmp_path / "many", tmp_path / "out"
    folder.mkdir()
    (folder / "empty.jpg").write_bytes(b"")
    content = io.BytesIO()
    draw_image(0, 0, size=(96, 128))[0].save(content, "JPEG")
    for shard in range(8):
        with tarfile.open(folder / f"{shard}.tar", "w") as file:
            for index in range(4):
                member = tarfile.TarInfo(f"{index}.jpg")
                member.size = len(content.getvalue())
                file.addfile(member, io.BytesIO(content.getvalue()))
    Path(f"{out}.mark").touch()  # no actor is killed
    with subprocess.Popen(driver({"workers": 1}, 1.0, out, folder), env=environment) as first:
        deadline = time.monotonic() + DEADLINE
        while first.poll() is None and time.monotonic() < deadline and not [*out.glob("part=*/*.parquet")]:
            time.sleep(0.05)
        first.kill()
    time.sleep(1)  # Ray ends the actors of the driver
    before = {path: path.stat().st_mtime_ns for path in out.glob("part=*/*.parquet")}
    assert 1 <= len(before) < 9
    command = [
        sys.executable,
        "-m",
        "conditional_detr",
        "detect",
        str(folder),
        "--engine",
        "ray",
        "--output",
        str(out),
    ]
    command += ["--output", str(out), "--resume", "--weights", "shapes", "--workers", "1", "--device", "cpu"]
    again = run(command, {**environment, "FORCE_COLOR": "1"})  # the progress bar is shown on terminals only
    printed = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", again.stderr)
    assert again.returncode == 1, printed[-3000:]
    skipped = int(re.search(r"skipped units that already have results: (\d+) of 9", printed)[1])
    assert len(before) <= skipped < 9  # an actor may finish one more before it notices that its driver is gone
    assert re.search(r"detecting .* 9/9 ", printed)
    assert re.search(r"1 of \d+ images failed:\n.*empty.jpg.*an empty file \(0 bytes\)", printed)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = [(row["image"], row["error"] is None) for row in rows_of(out)]
    members = [(f"{folder}/{i}.tar#{j}.jpg", True) for i in range(8) for j in range(4)]
    assert sorted(rows) == sorted([*members, (str(folder / "empty.jpg"), False)])
