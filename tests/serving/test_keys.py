"""API keys: what a file of them may have, which requests they open, and where they must not appear."""

import hashlib
import hmac
import logging

import pytest

from conditional_detr import Detector
from conditional_detr.serving.gate import ROUTES
from conditional_detr.serving.keys import ApiKeys
from helpers.browser import png
from helpers.serving import drawn, request, served

KEY, HASHED = "first-key-0123456789", "second#key-0123456789"


def keys_of(path, text):
    path.write_text(text, encoding="utf-8")
    return ApiKeys(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.txt"


def test_keys_are_plain_or_hashed_with_comments(file):
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    keys = keys_of(file, f"# of the tests\n\n  {KEY}  # the first\nSHA256:{digest.upper()}\t# the second\n")
    names = {keys.identify(f"Bearer {key}") for key in (KEY, HASHED)}
    assert names == {hashlib.sha256(key.encode()).hexdigest()[:8] for key in (KEY, HASHED)}
    assert keys.identify(f"bearer {KEY}") is not None
    for header in (
        "",
        KEY,
        f"Basic {KEY}",
        "Bearer",
        "Bearer ",
        f"Bearer {KEY}x",
        f"Bearer {digest}",
        "Bearer \udcff",
    ):
        assert keys.identify(header) is None


def test_a_hash_sign_within_a_key_belongs_to_it(file):
    """Otherwise what stands before it would be a key, and a shorter one."""
    keys = keys_of(file, f"{HASHED}\n0123456789abcdef#ghi\n")
    assert keys.identify(f"Bearer {HASHED}") is not None
    assert keys.identify("Bearer 0123456789abcdef") is None


def test_a_file_of_another_system_is_read(file):
    file.write_bytes(b"\xef\xbb\xbf" + f"{KEY}\r\n".encode())
    assert ApiKeys(file).identify(f"Bearer {KEY}") is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "keys.txt: expected at least one key, got none"),
        (b"# none\n\n", "keys.txt: expected at least one key, got none"),
        (b"# a\nshort-key\n", "keys.txt:2: expected a key of at least 16 ASCII characters without spaces, got 9"),
        (b"two words of a key\n", "keys.txt:1: expected a key of at least 16 ASCII characters without spaces"),
        ("Schlüssel-0123456789\n".encode(), "keys.txt:1: expected a key of at least 16 ASCII characters"),
        (b"sha256:0123\n", "keys.txt:1: expected 64 hexadecimal digits after sha256:"),
        (b"sha256:" + b"g" * 64, "keys.txt:1: expected 64 hexadecimal digits after sha256:"),
        (b"\xff\xfe\x00\n", "keys.txt: expected text in UTF-8"),
    ],
)
def test_a_wrong_file_is_an_error_without_its_content(file, content, message):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        ApiKeys(file)
    assert "short-key" not in str(caught.value)
    assert "0123456789" not in str(caught.value)


def test_after_a_broken_file_the_old_keys_stay(file):
    keys = keys_of(file, KEY)
    file.write_text("short\n")
    with pytest.raises(ValueError, match=r"keys\.txt:1"):
        keys.reload()
    assert keys.identify(f"Bearer {KEY}") is not None
    file.unlink()
    with pytest.raises(FileNotFoundError):
        keys.reload()
    assert keys.identify(f"Bearer {KEY}") is not None
    file.write_text(f"{HASHED}\n")
    keys.reload()
    assert keys.identify(f"Bearer {KEY}") is None
    assert keys.identify(f"Bearer {HASHED}") is not None


def test_every_key_is_compared_in_constant_time_whichever_matches(file, monkeypatch):
    keys = keys_of(file, "".join(f"key-number-{i:08}\n" for i in range(5)))
    compared = []
    monkeypatch.setattr(
        "conditional_detr.serving.keys.hmac.compare_digest",
        lambda a, b, compare=hmac.compare_digest: compared.append((a, b)) or compare(a, b),
    )
    for key, known in (("key-number-00000000", True), ("key-number-00000004", True), ("another", False)):
        compared.clear()
        assert (keys.identify(f"Bearer {key}") is not None) == known
        assert len(compared) == 5
        assert {len(digest) for pair in compared for digest in pair} == {32}


@pytest.fixture(scope="module")
def locked(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    with served({"small": Detector.from_pretrained(small)}, keys=keys_of(path, KEY)) as running:
        yield running


def test_only_health_and_the_page_are_open(locked):
    routes = {
        *ROUTES,
        "/v1/models/small",
        "/nothing",
        "/v1/models/",
        "//v1/models",
        "/docs-assets/swagger-ui.css",
        "/health/live/",
    }
    opened = {"/", "/health/live", "/health/ready", "/page/page.js", "/page/page.css"}
    for path in opened:
        assert request(locked, "GET", path).status == 200, path
    for path in routes - opened:
        for method in ("GET", "POST", "PUT", "HEAD", "OPTIONS"):
            answer = request(locked, method, path, b"" if method == "GET" else png(drawn(1)))
            assert answer.status == 401, (method, path)
            assert not answer.body or answer.error["code"] == "invalid_api_key"
    for path in ("/page/../metrics", "/page/..%2fmetrics", "/page/..%2f..%2fapp.py"):
        assert request(locked, "GET", path).status == 404, path


def test_a_key_opens_every_route(locked):
    key = {"authorization": f"Bearer {KEY}"}
    for path in ROUTES | {"/v1/models/small"}:
        assert request(locked, "GET", path, **key).status in (200, 405), path
    assert request(locked, "POST", "/v1/detect", png(drawn(1)), **key).status == 200


def test_keys_are_in_no_log_and_no_answer(locked, caplog):
    wrong = "a-wrong-key-9876543210"
    answers = []
    with caplog.at_level(logging.DEBUG):
        for key in (KEY, wrong):
            headers = {"authorization": f"Bearer {key}"}
            answers += [request(locked, "GET", path, **headers) for path in ("/v1/models", "/metrics", "/nothing")]
            answers.append(request(locked, "POST", "/v1/detect", png(drawn(1)), **headers))
            answers.append(request(locked, "POST", "/v1/chat/completions", b"{", "application/json", **headers))
    assert {answer.status for answer in answers} == {200, 400, 401, 404}
    shown = "\n".join([*map(str, answers), caplog.text])
    assert hashlib.sha256(KEY.encode()).hexdigest()[:8] in caplog.text  # its name
    for secret in (KEY, wrong, hashlib.sha256(KEY.encode()).hexdigest()):
        assert secret not in shown
