"""The hub of the tests of downloads and uploads."""

from pathlib import Path

import pytest

from helpers.hub import Hub


@pytest.fixture
def hub(tiny, monkeypatch, tmp_path):
    from huggingface_hub import constants

    hub = Hub({path.name: path.read_bytes() for path in Path(tiny.folder).iterdir()})
    hub.files["README.md"] = hub.files["tf_model.h5"] = b"not needed"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    yield hub
    hub.close()
