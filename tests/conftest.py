"""Settings of every test: CPU unless asked otherwise, exact float32 products, compiled programs kept between runs."""

import gc
import os
import signal
import zlib
from pathlib import Path

# LCM_JAX_TEST_PLATFORMS: what JAX_PLATFORMS is in tests; empty lets jax choose (make test-gpu).
_platforms = os.environ.get("LCM_JAX_TEST_PLATFORMS", os.environ.get("JAX_PLATFORMS") or "cpu")
if _platforms:
    os.environ["JAX_PLATFORMS"] = _platforms
else:
    os.environ.pop("JAX_PLATFORMS", None)
if _platforms == "cpu":  # the suite's time goes into compiling; programs that tests start do as well
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # of `make test &`: programs that tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import parity  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from needs_torch import needs_torch  # noqa: E402

_cache = Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))  # programs that tests start share it
# Also what compiles in milliseconds: hundreds of such programs are in every process, and reading one takes a fifth.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
    "jax_persistent_cache_min_compile_time_secs", float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
)
jax.config.update("jax_default_matmul_precision", "highest")  # parity with torch: no TF32, no bfloat16 passes
flags.FLAGS.mark_as_parsed()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity", type=int, default=0, metavar="N", help="list the N comparisons nearest their bounds")
    parser.addoption("--part", metavar="I/N", help="only the I-th of N parts of the tests, chosen by their names")
    parser.addoption("--without-torch", action="store_true", help="leave out the files that cannot be imported then")


def pytest_configure(config: pytest.Config) -> None:
    config.left_out = needs_torch(Path(__file__).parent) if config.getoption("without_torch") else set()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return collection_path in config.left_out or None


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.left_out:
        return None
    files = set(Path(__file__).parent.rglob("test_*.py"))
    return f"without torch: {len(files - config.left_out)} of {len(files)} test files, the others import it"


def pytest_collection_finish() -> None:
    """What has been imported stays; if the garbage collector need not look at it, tracing takes a quarter less time."""
    gc.collect()
    gc.freeze()


_loaded: dict[str, object] = {}


@pytest.fixture
def load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`sample` and `evaluate` load a model of the same flags once in a process: for tests of what comes after."""
    from lcm_jax.sampling import flags

    def load(*args, load=flags.load, **options):
        if (key := repr((args, options))) not in _loaded:
            _loaded[key] = load(*args, **options)
        return _loaded[key]

    monkeypatch.setattr(flags, "load", load)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    item.user_properties += [("parity", made) for made in parity.taken()]
    return (yield)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Error over bound of the worst comparison at each place, of all processes."""
    worst = {}
    for report in [r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "user_properties")]:
        for ratio, place in [value for name, value in report.user_properties if name == "parity"]:
            worst[place] = max(worst.get(place, (0.0, "")), (ratio, report.nodeid))
    count = config.getoption("parity")
    if count and worst:
        terminalreporter.section(f"error over bound: the worst {count} of {len(worst)} comparisons")
        for place, (ratio, test) in sorted(worst.items(), key=lambda item: -item[1][0])[:count]:
            terminalreporter.write_line(f"{ratio:8.3f}  {place}  {test}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # First what shares folders and runs that take long to make, so that all processes are busy to the end.
    items.sort(key=lambda item: "tmp_path_factory" not in item.fixturenames)
    if part := config.getoption("part"):
        index, count = map(int, part.split("/"))
        others = [item for item in items if zlib.crc32(item.nodeid.encode()) % count != index % count]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and jax.default_backend() == "cpu":
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no accelerator"))
