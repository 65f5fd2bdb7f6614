"""Files are the old ones or the new ones, all of them, whenever a process is killed."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from conditional_detr.system.atomic_files import recover, remove_unfinished, unfinished_folder, write_atomically

NAMES = ("config.json", "model.safetensors", "preprocessor_config.json")

KILLED = """
import os, shutil, sys
from pathlib import Path
from conditional_detr.system.atomic_files import write_atomically

folder, at = Path(sys.argv[1]), int(sys.argv[2])
calls = 0
changes = [(Path, name) for name in ("mkdir", "touch", "replace", "unlink", "chmod", "write_text")]
for holder, name in (*changes, (shutil, "rmtree")):
    def counted(*args, plain=getattr(holder, name), **kwargs):
        global calls
        calls += 1
        if calls == at:
            os._exit(9)
        return plain(*args, **kwargs)
    setattr(holder, name, counted)
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
    command = [sys.executable, "-S", "-c", KILLED, tmp_path, "8", "a", "b"]  # after the first of two renames
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")
    assert subprocess.run(command, env=ENV, check=False).returncode == 9
    assert {(tmp_path / name).read_bytes() for name in "ab"} == {b"old", b"new"}
    write_atomically({tmp_path / "c": lambda path: path.write_bytes(b"c")})
    assert {(tmp_path / name).read_bytes() for name in "ab"} == {b"new"}


TEMPORARY = ".0123456789abcdef.unfinished"


@pytest.mark.parametrize(
    "journal",
    [
        {"folder": TEMPORARY, "files": {"x": "../outside"}},
        {"folder": TEMPORARY, "files": {"../x": "a"}},
        {"folder": f"../{TEMPORARY}", "files": {"x": "a"}},
        {"folder": "folder", "files": {"x": "a"}},
        {"folder": TEMPORARY, "files": {"x": 1}},
        {"folder": TEMPORARY, "files": ["x"]},
        {"folder": TEMPORARY},
        [],
        None,
    ],
)
def test_a_journal_of_strangers_moves_nothing_out_of_its_folder(tmp_path, journal):
    folder = tmp_path / "folder"
    (folder / TEMPORARY).mkdir(parents=True)
    (folder / TEMPORARY / "x").write_bytes(b"x")
    (folder / "a").write_bytes(b"a")
    (folder / ".conditional_detr.journal").write_text("{" if journal is None else json.dumps(journal))
    with pytest.raises(OSError, match=r"journal: (expected a temporary folder|cannot be read)"):
        recover(folder)
    assert (folder / "a").read_bytes() == b"a"
    assert (folder / TEMPORARY / "x").read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_temporary_names_cannot_be_foreseen_and_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    seen = []

    def write(path):
        seen.append(path.parent.name)
        assert path.parent.stat().st_mode & 0o077 == 0  # nobody else can put a link into it
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
        path.write_bytes(b"new")
        path.chmod(0o600)

    write_atomically({tmp_path / "a": write})
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_error_names_the_file_and_leaves_nothing(tmp_path):
    def fail(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="b: cannot be written: No space left on device") as caught:
        write_atomically({tmp_path / "a": lambda path: path.write_bytes(b"new"), tmp_path / "b": fail})
    assert caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locks of folders")
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_reader_waits_for_a_writer_between_its_renames(tmp_path, monkeypatch, at):
    replaced, seen, plain = [], [], Path.replace

    def read():
        recover(tmp_path)
        seen.append({(tmp_path / name).read_bytes() for name in NAMES})

    reader = threading.Thread(target=read)

    def replace(self, target):
        result = plain(self, target)
        replaced.append(target)
        if len(replaced) == at:
            reader.start()
            reader.join(0.2)
            assert seen == []
        return result

    monkeypatch.setattr(Path, "replace", replace)
    write_atomically({tmp_path / name: lambda path: path.write_bytes(b"new") for name in NAMES})
    reader.join()
    assert seen == [{b"new"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert replaced[0].name == ".conditional_detr.journal"


def test_two_writers_of_the_same_files_do_not_mix(tmp_path):
    """Each round, two threads write three files at once; all three are those of one of them."""
    for _ in range(20):
        writers = [
            threading.Thread(
                target=write_atomically,
                args=({tmp_path / name: lambda path, text=text: path.write_bytes(text) for name in NAMES},),
            )
            for text in (b"first", b"second")
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert len({(tmp_path / name).read_bytes() for name in NAMES}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


def test_only_temporary_folders_of_ended_processes_are_removed(tmp_path):
    """Files that a library leaves in one, as safetensors does, are removed with it."""
    abandoned = tmp_path / TEMPORARY
    abandoned.mkdir()
    (abandoned / ".tmpAbC").write_bytes(b"half")
    others = [tmp_path / name for name in (".unfinished", "0123456789abcdef.unfinished", ".x.unfinished", "a")]
    for other in others:
        other.write_bytes(b"mine")
    with unfinished_folder(tmp_path) as mine:
        remove_unfinished(tmp_path)
        assert mine.is_dir() or sys.platform == "win32"
        assert not abandoned.exists() or sys.platform == "win32"
    assert sorted(tmp_path.iterdir()) == sorted(others)
