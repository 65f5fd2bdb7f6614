"""Checkpoints from a hub: the real download code against a local test server."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from conditional_detr.checkpoints.loading import from_pretrained

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """A hub of one repository: ``microsoft/tiny``, with branch main and, optionally, a token."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.token: str | None = None
        self.served: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def answer(self, body):
                owner, name, _, revision, file = self.path.lstrip("/").split("/", 4)
                error = None
                refused = hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"
                if refused or (owner, name) != ("microsoft", "tiny"):
                    error = "RepoNotFound"
                elif revision not in ("main", "v1", COMMIT):
                    error = "RevisionNotFound"
                elif file not in hub.files:
                    error = "EntryNotFound"
                content = b"" if error else hub.files[file]
                self.send_response(404 if error else 200)
                if error:
                    self.send_header("X-Error-Code", error)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body and not error:
                    hub.served.append(file)
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


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
