"""The service on a local Ray cluster of two nodes, in a process of its own: Ray changes signals and threads."""

import json
import socket
import subprocess
import sys

import pytest

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image

DRIVER = """
import collections, json, os, signal, sys, threading, time, urllib.request
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from conditional_detr.distributed.serve import deployment

def create():
    from conditional_detr import Detector
    from conditional_detr.serving import create_app
    return create_app({"shapes": Detector.from_pretrained("shapes")})

def detect():
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/detect", image, {"content-type": "image/png"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)

def replicas():
    found = list_actors(filters=[("state", "=", "ALIVE")])
    return {actor.pid: actor.node_id for actor in found if "conditional_detr" in actor.class_name}

def load():
    while not stopped.is_set():
        try:
            outcomes[json.dumps(detect()) == json.dumps(first)] += 1
        except OSError as error:
            outcomes[repr(error)] += 1

image, port = open(sys.argv[1], "rb").read(), int(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
ray.init(cluster.address, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(deployment(create, replicas=2))
first, before, outcomes, stopped = detect(), replicas(), collections.Counter(), threading.Event()
clients = [threading.Thread(target=load) for _ in range(4)]
for client in clients:
    client.start()
time.sleep(2)
os.kill(min(before), signal.SIGKILL)
deadline = time.monotonic() + 60
while len(replicas()) < 2 or min(before) in replicas():
    assert time.monotonic() < deadline, replicas()
    time.sleep(0.2)
time.sleep(2)
stopped.set()
for client in clients:
    client.join()
counts = {str(outcome): count for outcome, count in outcomes.items()}
with open(sys.argv[3], "w") as file:
    json.dump({"first": first, "nodes": len(set(before.values())), "outcomes": counts}, file)
serve.shutdown()
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    pytest.importorskip("ray.serve", reason="Ray is not installed")
    folder = tmp_path_factory.mktemp("ray")
    draw_image(0, 0)[0].save(folder / "image.png")
    arguments = [sys.executable, "-c", DRIVER, folder / "image.png", str(_free_port()), folder / "found.json"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text()), folder / "image.png"


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_nodes_detect_what_the_detector_does(outcome):
    found, path = outcome
    assert found["nodes"] == 2
    expected = Detector.from_pretrained("shapes")(path)
    assert [one["label"] for one in found["first"]] == list(expected.names)
    for one, (box, score, _) in zip(found["first"], expected, strict=True):
        assert one["score"] == pytest.approx(score, abs=1e-5)
        assert list(one["box"].values()) == pytest.approx(box, abs=1e-2)


def test_only_requests_in_flight_are_lost_when_a_replica_is_killed(outcome):
    outcomes = outcome[0]["outcomes"]
    answered = outcomes.pop("True")
    assert answered > 10
    # each of the four clients has one request in flight; Ray answers 500, which OpenAI's clients repeat
    assert set(outcomes) <= {"<HTTPError 500: 'Internal Server Error'>"}
    assert sum(outcomes.values()) <= 4


@pytest.mark.parametrize("replicas", [0, (2, 1), (0, 3)])
def test_wrong_numbers_of_replicas(replicas):
    pytest.importorskip("ray.serve", reason="Ray is not installed")
    from conditional_detr.distributed.serve import deployment

    with pytest.raises(ValueError, match="replicas: expected"):
        deployment(dict, replicas=replicas)
