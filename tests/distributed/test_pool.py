"""The driver's loop of a bulk detection, with actors in this process in place of Ray's."""

from types import SimpleNamespace

import pytest

from conditional_detr.distributed import pool
from conditional_detr.distributed.pool import Pool
from conditional_detr.distributed.results import create, finished, planned, write_results
from conditional_detr.distributed.units import Unit
from conditional_detr.distributed.worker import Job

ray = pytest.importorskip("ray", reason="Ray is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


class Actor:
    """An actor that writes results: one of ``Model``, whose methods tests replace."""

    def __init__(self, job, index):
        self.job, self.index = job, index

    def ready(self):
        pass

    def run(self, unit):
        return write_results(self.job.folder, unit, unit.names, [ValueError("none")] * len(unit.names))

    def detect(self, sources):
        return [ValueError("none") for _ in sources]


class Cluster:
    """Ray's functions. Each actor is made from ``types[its index]``, or the last; None: it is never placed."""

    def __init__(self, *types):
        self.types, self.started, self.timeouts = types, 0, 0

    def remote(self, **options):
        return lambda worker: SimpleNamespace(remote=self.start)

    def start(self, job):
        kind = self.types[min(self.started, len(self.types) - 1)]
        self.started += 1
        actor = Actor(job, self.started) if kind is None else kind(job, self.started)

        def method(name):
            return SimpleNamespace(remote=lambda *given: (kind is not None, getattr(actor, name), given))

        return SimpleNamespace(ready=method("ready"), run=method("run"), detect=method("detect"))

    def wait(self, calls, num_returns, timeout=None):
        ready = [call for call in calls if call[0]][:1]
        self.timeouts += not ready
        assert self.timeouts < 3, "waits for ever"
        return ready, []

    def get(self, call):
        _, method, given = call
        try:
            return method(*given)
        except Exception as error:
            failure = ray.exceptions.RayTaskError.__new__(ray.exceptions.RayTaskError)
            failure.cause = error
            raise failure from error


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that prepares a job of units, and returns its pool on a cluster of types of actors."""

    def start(units, size, *types):
        cluster = Cluster(*types)
        for name in ("remote", "wait", "get"):
            monkeypatch.setattr(ray, name, getattr(cluster, name))
        monkeypatch.setattr(ray, "kill", lambda actor: None)
        count = create(str(tmp_path), units, {}, resume=True, overwrite=False)
        job = Job(str(tmp_path), None, "cpu", {}, {}, None, 1)
        return Pool(job, count, size, {}, lambda done, total: None), cluster

    return start


def units_of(count, images=1):
    return [Unit(tuple(f"{unit}_{image}.jpg" for image in range(images))) for unit in range(count)]


def test_actors_without_a_place_are_not_waited_for(start):
    loop, cluster = start(units_of(8), 3, Actor, None)
    assert loop.run().images == 8
    assert (cluster.started, cluster.timeouts) == (3, 0)


def test_the_last_unit_of_an_actor_that_cannot_be_replaced_is_done_by_another(start):
    class Second(Actor):
        def run(self, unit):
            if self.index == 2 and unit.names == ("7_0.jpg",):
                raise RuntimeError("broken")
            return super().run(unit)

    loop, cluster = start(units_of(8), 2, Second, Second, None)
    assert loop.run().images == 8
    assert (cluster.started, cluster.timeouts, loop.failures.total()) == (3, 0, 1)


def test_a_job_without_any_actor_is_warned_of(start, monkeypatch):
    monkeypatch.setattr(pool, "_PATIENCE", 0.5)
    loop, _ = start(units_of(2), 2, None)
    with (
        pytest.warns(UserWarning, match=r"Ray: no actor has loaded the model after 0.5 s; does the cluster have free"),
        pytest.raises(AssertionError, match="waits for ever"),
    ):
        loop.run()


def test_units_of_other_plans_do_not_count(start, tmp_path):
    (tmp_path / "part=00").mkdir()
    loop, _ = start(units_of(3), 1, Actor)
    for digit in "123":
        (tmp_path / "part=00" / f"00{digit * 30}.parquet").touch()
    write_results(str(tmp_path), units_of(3)[1], ["1_0.jpg"], [ValueError("none")])
    loop, _ = start([], 1, Actor)
    result = loop.run()
    assert (result.units, result.skipped, result.images) == (3, 1, 2)
    assert {unit.digest for unit in planned(str(tmp_path))} < finished(str(tmp_path))


class Broken(Actor):
    def run(self, unit):
        raise RuntimeError("no kernel image is available")

    def detect(self, sources):
        raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(("units", "size", "limit"), [(30, 2, 10), (30, 6, 12), (4, 2, 10)])
def test_a_fault_of_the_machines_makes_no_rows(start, tmp_path, units, size, limit):
    """Of four units, six images are tried, too."""
    loop, cluster = start(units_of(units, 16), size, Broken)
    message = rf"expected actors to detect, got {limit} units and images in a row .* RuntimeError\('no kernel image"
    with pytest.raises(OSError, match=message):
        loop.run()
    assert cluster.started <= size + 2 * limit + size
    assert finished(str(tmp_path)) == set()


def test_many_bad_images_among_good_ones_are_rows(start, tmp_path):
    """Each second of 40 units has an image that ends any actor, and one that does not."""

    class Half(Actor):
        def run(self, unit):
            if int(unit.names[0].partition("_")[0]) % 2:
                raise RuntimeError("broken")
            return super().run(unit)

        def detect(self, sources):
            if sources[0].key.endswith("_0.jpg"):
                raise RuntimeError("broken")
            return super().detect(sources)

    loop, _ = start(units_of(40, 2), 1, Half)
    assert loop.run().images == 80
    errors = pq.read_table(tmp_path)["error"].to_pylist()
    assert len(errors) == 80
    assert sum("in each of 2 tries the model failed: RuntimeError('broken')" in error for error in errors) == 20


def test_an_actor_with_other_weights_ends_the_job(start):
    """Also while others do their units."""

    class Other(Actor):
        def ready(self):
            raise ValueError("expected the same weights on all machines")

    loop, cluster = start(units_of(8), 2, Actor, Other)
    with pytest.raises(ValueError, match="expected the same weights on all machines"):
        loop.run()
    assert cluster.started == 2
