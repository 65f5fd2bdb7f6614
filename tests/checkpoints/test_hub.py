"""Checkpoints from a hub: the real download code against a local test server."""

import pytest

from conditional_detr.checkpoints.loading import from_pretrained


def test_only_the_needed_files_are_downloaded_and_only_once(hub, tiny, tmp_path):
    cache = tmp_path / "cache"
    model = from_pretrained("microsoft/tiny", cache_dir=cache)
    assert sorted(hub.served) == ["config.json", "model.safetensors"]
    assert model.config == from_pretrained(tiny.folder).config
    from_pretrained("microsoft/tiny", cache_dir=cache)
    assert len(hub.served) == 2
    assert not (tmp_path / "default").exists()


def test_a_repository_with_the_older_file(hub, tiny, tmp_path):
    import io

    import torch
    from safetensors.torch import load

    buffer = io.BytesIO()
    torch.save(load(hub.files.pop("model.safetensors")), buffer)
    hub.files |= {
        "pytorch_model.bin": buffer.getvalue(),
        "preprocessor_config.json": b'{"size": 480, "max_size": 640}',
    }
    model = from_pretrained("microsoft/tiny", cache_dir=tmp_path, revision="v1")
    assert sorted(hub.served) == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]
    assert model.metadata.preprocessing.shortest_edge == 480


def test_the_cache_serves_without_network(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from_pretrained("microsoft/tiny", cache_dir=tmp_path)
    asked = from_pretrained("microsoft/tiny", cache_dir=tmp_path, local_files_only=True)
    hub.close()
    unreachable = from_pretrained("microsoft/tiny", cache_dir=tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = from_pretrained("microsoft/tiny", cache_dir=tmp_path)
    assert asked.config == unreachable.config == offline.config
    with pytest.raises(OSError, match="neither in the cache nor downloadable"):
        from_pretrained("microsoft/other", cache_dir=tmp_path)


def test_without_network_the_error_is_one_line_with_a_hint(hub, tmp_path):
    hub.close()
    with pytest.raises(
        OSError,
        match=r"weights 'microsoft/tiny': no such file or folder; as a hub id: neither in the cache.* pass a folder",
    ) as caught:
        from_pretrained("microsoft/tiny", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_token_is_sent(hub, tmp_path):
    hub.token = "hf_secret"
    with pytest.raises(OSError, match=r"weights 'microsoft/tiny': .* as a hub id: download failed"):
        from_pretrained("microsoft/tiny", cache_dir=tmp_path, token=False)
    assert from_pretrained("microsoft/tiny", cache_dir=tmp_path, token="hf_secret").config.num_queries == 11


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        (
            "microsoft/other",
            None,
            "weights 'microsoft/other': no such file or folder; as a hub id: download failed: .*404",
        ),
        ("microsoft/tiny", "v2", "weights 'microsoft/tiny': .* as a hub id at revision 'v2': download failed: .*404"),
        ("microsoft/tiny!", None, "^weights 'microsoft/tiny!': no such file or folder; expected a file, a folder"),
    ],
)
def test_repositories_and_revisions_that_do_not_exist(hub, tmp_path, name, revision, message):
    with pytest.raises(OSError, match=message):
        from_pretrained(name, revision=revision, cache_dir=tmp_path)


def test_a_repository_without_weights(hub, tmp_path):
    del hub.files["model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or pytorch_model\.bin"):
        from_pretrained("microsoft/tiny", cache_dir=tmp_path)
