"""The files in docs/serving/ to run the service with name options and paths that exist."""

import json
import re
from pathlib import Path

import typer
import yaml

from conditional_detr.cli import app
from conditional_detr.serving.gate import ROUTES

FOLDER = Path(__file__).parents[2] / "docs" / "serving"
OPTIONS = {option for one in typer.main.get_command(app).commands["serve"].params for option in one.opts}
OTHER = {"--from-file", "--build-arg", "--gpus", "--no-cache-dir", "--index-url", "--create-home", "--start-period"}
OTHER |= {"--system"}  # of kubectl, docker, pip and useradd


def test_options_exist():
    for path in FOLDER.iterdir():
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text()))
        assert mentioned - OTHER <= OPTIONS, path.name
        assert mentioned & OPTIONS, path.name


def test_the_container_and_kubernetes_agree():
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probes = {container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert probes == {"/health/live", "/health/ready"} <= ROUTES
    dockerfile = (FOLDER / "Dockerfile").read_text()
    keys = json.loads(re.search(r"^ENTRYPOINT (.*)", dockerfile, re.MULTILINE)[1])[-1]
    assert Path(keys).parent == Path(container["volumeMounts"][0]["mountPath"])
    port = container["ports"][0]["containerPort"]
    assert f"EXPOSE {port}\n" in dockerfile
    assert service["spec"]["ports"][0]["targetPort"] == port
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_what_ends_the_service_waits_for_its_requests():
    deployment, _ = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = int(container["args"][container["args"].index("--drain-seconds") + 1])
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > drain + sleep
    unit = (FOLDER / "conditional-detr.service").read_text()
    drain, stop = (int(re.search(rf"{name}[ =](\d+)", unit)[1]) for name in ("--drain-seconds", "TimeoutStopSec"))
    assert stop > drain
