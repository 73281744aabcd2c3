"""Files: the limit of open ones, and new ones that appear whole or not at all."""

import fcntl
import os
import resource
from pathlib import Path

import pytest

from lcm_jax import export, files, sample
from lcm_jax.errors import LcmError


def test_allow_open_files_raises_the_limit_or_names_it():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, before[1]))
        files.allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 700
        files.allow_open_files(1500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 2000
        with pytest.raises(LcmError, match=r"10000000 files must be open at once.*ulimit -n"):
            files.allow_open_files(10_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    assert [str(files.expanded(path)) for path in ("~/x", "~", "x/~")] == ["/h/x", "/h", "x/~"]
    assert str(files.expanded("~no such user/x")) == "~no such user/x", "no RuntimeError of pathlib"
    for module, rest in ((sample, ["--model=x"]), (export, ["--workdir=~/w"])):
        assert str(module.parser().parse_args([*rest, "--out=~/x"]).out) == "/h/x"


def test_new_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(OSError, match="full"), files.new_file(path) as partial:
        partial.write_text("half")
        raise OSError(28, "the disk is full")
    assert not any(path.parent.iterdir())
    with files.new_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


@pytest.fixture
def untidied(monkeypatch):
    """As if this process had not looked into any folder yet."""
    monkeypatch.setattr(files, "_tidied", set())


def test_what_a_killed_program_left_is_removed_by_the_next(tmp_path, untidied):
    held = tmp_path / ".b.png.0123abcd.partial"
    for name in (".a.png.0123abcd.partial", held.name, ".mine.partial", "c.png.0123abcd.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".model.89abcdef.partial" / "unet").mkdir(parents=True)
    with held.open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # its writer lives
        files.write_atomic(tmp_path / "d.png", "whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {held.name, ".mine.partial", "c.png.0123abcd.partial", "d.png"}


def test_a_writer_holds_what_it_writes(tmp_path, untidied):
    with files.new_file(tmp_path / "a") as partial, files.new_folder(tmp_path / "b") as folder:
        partial.write_text("whole")
        (folder / "c").write_text("whole")
        files.tidy(tmp_path)  # another program's start
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a", "b", "b/c"]


def fail_in_write_text(path: Path) -> None:
    files.write_text(path, b"x" * 5000)


def fail_in_a_new_file(path: Path) -> None:
    with files.new_file(path) as partial, partial.open("wb") as stream:
        stream.write(b"x" * 5000)


def fail_in_a_new_folder(path: Path) -> None:
    with files.new_folder(path) as folder:
        files.write_text(folder / "inside", b"x" * 5000)


@pytest.mark.parametrize(
    "write",
    [
        fail_in_write_text,
        fail_in_a_new_file,
        fail_in_a_new_folder,
        lambda path: files.append(path, b"x" * 5000),
        lambda path: files.write_atomic(path, "x" * 5000),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, write):
    path, before = tmp_path / "new" / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.parent.mkdir()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(files.CannotWrite) as caught:
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(caught.value)
    assert text.startswith(str(path)) and "cannot be written (File too large); make room" in text
    assert ".partial" not in text and isinstance(caught.value, LcmError) and isinstance(caught.value, OSError)
    assert not list(path.parent.glob(".*"))


def test_errors_of_other_files_keep_their_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), files.new_file(tmp_path / "a"):
        (tmp_path / "nowhere" / "b").read_text()
    with pytest.raises(files.CannotWrite, match="a/b cannot be written .File exists.; choose another name"):
        (tmp_path / "a").touch()
        files.write_atomic(tmp_path / "a" / "b", "text")


def test_a_pipe_that_somebody_writes_to_stands_for_a_file(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    assert files.read_regular(Path(f"/dev/fd/{reader}"), 100, pipes=True) == b"piped"
    os.mkfifo(tmp_path / "pipe")
    assert files.read_regular(tmp_path / "pipe", 100, pipes=True) == b"", "nobody will ever write"
    for path, most in ((tmp_path / "pipe", None), (tmp_path, 100), (Path("/dev/zero"), 100)):
        with pytest.raises((LcmError, OSError)):
            files.read_regular(path, most or 100, pipes=most is not None)
