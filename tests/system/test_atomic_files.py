"""Files are the old ones or the new ones, all of them, whenever a process is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conditional_detr.system.atomic_files import recover, remove_unfinished, write_atomically

NAMES = ("config.json", "model.safetensors", "preprocessor_config.json")

KILLED = """
import os, sys
from pathlib import Path
from conditional_detr.system.atomic_files import write_atomically

folder, at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
for name in ("replace", "unlink", "chmod", "write_text"):
    def counted(self, *args, plain=getattr(Path, name), **kwargs):
        global calls
        calls += 1
        if calls == at:
            os._exit(9)
        return plain(self, *args, **kwargs)
    setattr(Path, name, counted)
write_atomically({folder / name: lambda path: path.write_bytes(b"new") for name in sys.argv[3:]})
print(calls)
"""


def test_a_kill_at_any_moment_leaves_all_old_files_or_all_new_ones(tmp_path):
    """At each call that changes the disk; what is begun is completed by the next reader or writer."""
    outcomes, at, done = [], 0, False
    while not done:
        at += 1
        folder = tmp_path / str(at)
        folder.mkdir()
        for name in NAMES:
            (folder / name).write_bytes(b"old")
        command = [sys.executable, "-S", "-c", KILLED, folder, str(at), *NAMES]
        done = subprocess.run(command, capture_output=True, env=ENV, check=False).returncode == 0
        recover(folder)
        (content,) = {(folder / name).read_bytes() for name in NAMES}
        remove_unfinished(folder)
        assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
        outcomes.append(content)
    assert outcomes == sorted(outcomes, reverse=True)  # from one moment on the new ones
    assert set(outcomes) == {b"old", b"new"}
    assert outcomes.count(b"new") >= len(NAMES)


ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_the_next_writer_completes_what_was_begun(tmp_path):
    command = [sys.executable, "-S", "-c", KILLED, tmp_path, "6", "a", "b"]
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")
    assert subprocess.run(command, env=ENV, check=False).returncode == 9
    assert {(tmp_path / name).read_bytes() for name in "ab"} == {b"old", b"new"}
    write_atomically({tmp_path / "c": lambda path: path.write_bytes(b"c")})
    assert {(tmp_path / name).read_bytes() for name in "ab"} == {b"new"}


@pytest.mark.parametrize(
    "journal",
    ['{"x.unfinished": "../outside"}', '{"../x.unfinished": "a"}', '{"a": "b"}', '{"x.unfinished": 1}', "[]", "{", ""],
)
def test_a_journal_of_strangers_moves_nothing_out_of_its_folder(tmp_path, journal):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.unfinished").write_bytes(b"x")
    (folder / "a").write_bytes(b"a")
    (folder / ".conditional_detr.journal").write_text(journal)
    with pytest.raises(OSError, match=r"journal: (expected temporary names|cannot be read)"):
        recover(folder)
    assert (folder / "a").read_bytes() == b"a"
    assert (folder / "x.unfinished").read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_temporary_names_cannot_be_foreseen_and_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    seen = []

    def write(path):
        seen.append(path.name)
        path.write_bytes(b"new")

    for _ in range(2):
        write_atomically({tmp_path / "a": write})
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(set(seen)) == 2
    assert all(str(os.getpid()) not in name and len(name) > 16 for name in seen)


def test_files_have_the_users_default_mode(tmp_path):
    (tmp_path / "plain").touch()

    def write(path):
        path.chmod(0o600)
        path.write_bytes(b"new")

    write_atomically({tmp_path / "a": write})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_names_the_file_and_leaves_nothing(tmp_path):
    def fail(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="b: cannot be written: No space left on device") as caught:
        write_atomically({tmp_path / "a": lambda path: path.write_bytes(b"new"), tmp_path / "b": fail})
    assert caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_reader_between_the_renames_disturbs_no_writer(tmp_path, monkeypatch, at):
    """The reader completes the renames, since it cannot see that the writer is alive."""
    replaced, plain = [], Path.replace

    def replace(self, target):
        result = plain(self, target)
        replaced.append(target)
        if len(replaced) == at:
            recover(tmp_path)
        return result

    monkeypatch.setattr(Path, "replace", replace)
    write_atomically({tmp_path / name: lambda path: path.write_bytes(b"new") for name in NAMES})
    assert {(tmp_path / name).read_bytes() for name in NAMES} == {b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert replaced[0].name == ".conditional_detr.journal"
