"""Uploads by huggingface_hub's own code to a server that stands in for the hub; and the command."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from typer.testing import CliRunner

from conditional_detr import from_pretrained
from conditional_detr.checkpoints.hub import push_to_hub
from conditional_detr.checkpoints.model_card import CardDetails
from conditional_detr.cli import app
from conditional_detr.training import TrainConfig, train
from helpers.models import assert_same
from helpers.training_runs import Rectangles, small_model

TOKEN = "hf_writer"
ROOT = Path(__file__).parent.parent.parent
SHORT = TrainConfig(epochs=1, batch_size=2, workers=0)
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")  # of httpx, about huggingface_hub


@pytest.fixture
def model(tiny):
    return from_pretrained(tiny.folder)


@pytest.fixture
def account(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # a protocol of another server
    hub.token = TOKEN
    hub.readers = {"hf_reader"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def test_what_is_uploaded_loads_again(account, model, tmp_path):
    """In transformers, too, which reads the same files."""
    from transformers import AutoModelForObjectDetection

    address = model.push_to_hub("someone/detector", card=CardDetails(licence="apache-2.0"), private=True)
    assert address == f"{account.url}/someone/detector"
    assert account.created["someone/detector"]["visibility"] == "private"
    files = account.uploaded["someone/detector", "main"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert loaded.metadata == model.metadata
    theirs = AutoModelForObjectDetection.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs.class_labels_classifier.weight, model.class_head.weight)
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "object-detection")
    assert "Detector.from_pretrained('someone/detector')" in card.text


def test_a_branch_and_a_precision(account, model):
    push_to_hub(model, "someone/detector", revision="half", dtype=torch.float16, token=TOKEN)
    whole, half = len(account.files["model.safetensors"]), account.uploaded["someone/detector", "half"]
    assert 0.4 < len(half["model.safetensors"]) / whole < 0.6
    assert ("someone/detector", "main") not in account.uploaded


@pytest.mark.parametrize("repository", ["detector", "a/b/c", "https://huggingface.co/a/b", "some one/x", ""])
def test_not_a_hub_id(account, model, repository):
    with pytest.raises(ValueError, match="repository: expected a hub id 'owner/name', got"):
        push_to_hub(model, repository)
    assert not account.created


def test_no_token(account, model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PermissionError, match=r"someone/detector: expected a token .* got none; set HF_TOKEN"):
        push_to_hub(model, "someone/detector")


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_reader", "the token may not write to this repository"), ("hf_wrong", "the hub does not accept the token")],
)
def test_a_token_that_may_not_write(account, model, token, message):
    with pytest.raises(PermissionError, match=f"^someone/detector: {message}") as caught:
        push_to_hub(model, "someone/detector", token=token)
    assert "\n" not in str(caught.value)
    assert token not in str(caught.value)
    assert not account.uploaded


def test_no_network(account, model):
    account.close()
    with pytest.raises(OSError, match=r"^someone/detector: the upload failed: ") as caught:
        push_to_hub(model, "someone/detector")
    assert "\n" not in str(caught.value)


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_the_command_generates_a_card_or_takes_the_written_one(account, small, tmp_path):
    metrics = tmp_path / "metrics.json"
    metrics.write_text('{"AP": 0.512, "AP50": 0.75, "per_class": {"LABEL_1": {"annotations": 7, "AP": 0.25}}}')
    thresholds = tmp_path / "thresholds.json"
    thresholds.write_text('{"LABEL_1": 0.35}')
    options = ("--licence", "mit", "--data", "Cats | dogs", "--metrics", metrics, "--thresholds", thresholds)
    result = push(small, "someone/detector", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"uploaded to {account.url}/someone/detector\n"
    files = account.uploaded["someone/detector", "main"]
    text = files["README.md"].decode()
    for line in ("| AP | 0.512 |", "| LABEL_1 | 7 | 0.250 | - | - | - | 0.350 |", "Data: Cats \\| dogs"):
        assert line in text.splitlines()
    folder = tmp_path / "written"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert push(folder, "someone/again", "--licence", "mit").exit_code == 0
    (folder / "README.md").write_text("My own words.")
    assert push(folder, "someone/own").exit_code == 0
    assert account.uploaded["someone/own", "main"]["README.md"] == b"My own words."
    refused = push(folder, "someone/own", "--licence", "mit")
    assert refused.exit_code == 2
    assert "README.md: expected no card beside the weights with --licence, --data, --metrics" in refused.stderr


def test_the_card_of_an_evaluated_run_and_that_of_shipped_weights(account, tmp_path, monkeypatch):
    """A short name is that of the shipped weights, also in the folder of a run."""
    result = train(small_model(), Rectangles(2), Rectangles(2), SHORT, folder=tmp_path, progress=False)
    assert push(result.best, "someone/trained").exit_code == 0
    text = account.uploaded["someone/trained", "main"]["README.md"].decode()
    per_class = result.history[0]["per_class"]
    for name, ap in per_class.items():
        assert f"| {name} | - | {'-' if ap < 0 else f'{ap:.3f}'} | - | - | - |" in text
    assert push(tmp_path, "someone/run").exit_code == 0  # the folder of the run: its best checkpoint
    files = account.uploaded["someone/run", "main"]
    assert files["README.md"].decode() == text.replace("someone/trained", "someone/run")
    sent, best = load(files["model.safetensors"]), load_file(result.best / "model.safetensors")
    assert sent.keys() == best.keys()
    assert all(torch.equal(sent[name], best[name]) for name in best)
    (tmp_path / "README.md").write_text("My own words.")
    assert push(result.last, "someone/own").exit_code == 0
    assert account.uploaded["someone/own", "main"]["README.md"] == b"My own words."
    monkeypatch.chdir(result.best)
    assert push("shapes", "someone/shapes").exit_code == 0
    shipped = ROOT / "weights" / "shapes" / "README.md"
    assert account.uploaded["someone/shapes", "main"]["README.md"] == shipped.read_bytes()


def test_a_card_is_a_file_or_details(model, tmp_path):
    (tmp_path / "mine.md").write_text("Mine.")
    model.save_pretrained(tmp_path / "a", card=str(tmp_path / "mine.md"))
    assert (tmp_path / "a" / "README.md").read_text() == "Mine."
    with pytest.raises(TypeError, match="card: expected a bool, CardDetails or the file of a card, got 1"):
        model.save_pretrained(tmp_path / "b", card=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no hub id",), "repository: expected a hub id 'owner/name', got 'no hub id'"),
        (("a/b", "--card", "none.md"), "none.md: no such file"),
        (("a/b", "--card", "none.md", "--licence", "mit"), "--card: expected no --licence, --data, --metrics or"),
        (("a/b", "--metrics", "none.json"), "none.json: no such file"),
        (("a/b", "--metrics", "config.json"), "config.json: expected the JSON of 'conditional-detr evaluate --json'"),
    ],
)
def test_wrong_arguments_of_the_command(account, small, monkeypatch, arguments, message):
    monkeypatch.chdir(small)
    result = push(".", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not account.uploaded


def test_the_command_without_permission(account, small, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    result = push(Path(small), "someone/detector")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: someone/detector: the token may not write to this repository")
