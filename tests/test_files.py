"""What every room does with files: the limit of open ones."""

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
