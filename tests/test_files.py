"""Files: the limit of open ones, and new ones that appear whole or not at all."""

import os
import resource

import pytest

from lcm_jax import files
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
