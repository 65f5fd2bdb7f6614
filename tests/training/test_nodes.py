"""Training by two torchrun agents, as on two machines with one file system; one is killed and replaced."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conditional_detr import ConditionalDETR
from helpers import training_runs
from helpers.training_runs import five_steps, steps_of

DEADLINE = 600  # seconds: many times what it takes


@pytest.fixture
def agent(tmp_path):
    """Function that starts an agent, as each machine does by the same command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test"]
    command += [training_runs.__file__, str(tmp_path / "two"), "slow"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "1"}
    # otherwise an agent that stays does not tell a new one the address of its store: torch waits for it, and fails
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = []

    def start():
        with (tmp_path / f"agent{len(started)}.log").open("w") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        deadline = time.monotonic() + DEADLINE
        while not listens(port):  # the first agent has the rendezvous, as that on the machine of the endpoint
            assert started[-1].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            kill_machine(process)


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def kill_machine(process):
    """Kill an agent and the processes that it has started, as a machine that is switched off."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in reversed(family):  # the agent first, so that it cannot react
        one.kill()
    process.wait()


def wait_for_step(folder, step, *agents):
    deadline = time.monotonic() + DEADLINE
    while not (folder / "log.jsonl").exists() or steps_of_unfinished(folder) < step:
        assert time.monotonic() < deadline
        assert all(agent.poll() is None for agent in agents)
        time.sleep(0.05)


def steps_of_unfinished(folder):
    """Return the number of the last step in a log whose last line may still be written."""
    lines = (folder / "log.jsonl").read_text().split("\n")[:-1]
    return max((int(line.split('"step": ')[1].split(",")[0]) for line in lines if '"loss"' in line), default=0)


def test_a_machine_that_dies_is_replaced_and_training_equals_that_of_one_process(agent, tmp_path):
    """Killed in the middle of the epoch: the agent that is left waits for the new one; no step is lost or doubled."""
    first, second = agent(), agent()
    folder = tmp_path / "two"
    wait_for_step(folder, 2, first, second)
    before = steps_of_unfinished(folder)
    assert before < 5
    kill_machine(second)
    killed = time.monotonic()
    third = agent()
    wait_for_step(folder, before + 1)
    print(f"went on {time.monotonic() - killed:.1f} s after a machine was killed")
    assert (first.wait(DEADLINE), third.wait(DEADLINE)) == (0, 0)
    model, result = five_steps(tmp_path / "one", batch_size=4)
    assert result.steps == 5
    assert [entry["step"] for entry in steps_of(folder)] == [1, 2, 3, 4, 5]
    for ours, theirs in zip(steps_of(folder), steps_of(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    found = ConditionalDETR.from_pretrained(Path(folder) / "last").state_dict()
    for name, value in model.state_dict().items():
        assert (found[name] - value).abs().max() <= 1e-5, name
