import warnings

import pytest
import torch
from typer.testing import CliRunner

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing
from conditional_detr.cli import app
from helpers.models import LEAST_CONFIG


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint that runs in milliseconds and reports something that depends on the frame."""
    torch.manual_seed(0)
    model = ConditionalDETR(LEAST_CONFIG).eval()
    model.metadata = Metadata(tuple("abcdefg"), preprocessing=Preprocessing(64, 96))
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def detector(weights):
    return Detector.from_pretrained(weights, device="cpu")


@pytest.fixture
def run(weights, tmp_path):
    """Function that runs the command on a film and returns its result, with warnings as a user sees them."""

    def run(film, *options, output=tmp_path / "out"):
        arguments = ["video", str(film), "--weights", str(weights), "--device", "cpu", "--threshold", "0"]
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            return CliRunner().invoke(app, [*arguments, "--top-k", "2", "--output", str(output), *options])

    return run
