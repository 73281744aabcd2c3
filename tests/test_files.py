"""What every room does with files: the limit of open ones, and new ones that appear whole or not at all."""

import resource

import pytest

from lcm_jax import files
from lcm_jax.errors import LcmError


def test_the_limit_of_open_files_is_raised_or_named():
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


def test_a_new_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(OSError, match="full"):
        with files.new_file(path) as partial:
            partial.write_text("half")
            raise OSError(28, "the disk is full")
    assert not any(path.parent.iterdir())
    with files.new_file(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]
