import pytest
import torch

from conditional_detr import ConditionalDETR, Detector, Metadata, Preprocessing
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
