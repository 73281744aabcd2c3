"""Inputs that fuzzing has found, read again: each is read or refused in one line. `make fuzz` looks for others."""

from random import Random

import fuzz
import fuzz_mutations as mutations
import fuzz_targets
import pytest


@pytest.fixture(scope="module", params=fuzz_targets.TARGETS)
def target(request, tmp_path_factory):
    """(name, target, its folder, its good inputs)."""
    found, folder = fuzz_targets.TARGETS[request.param], tmp_path_factory.mktemp("fuzz")
    return request.param, found, folder, found.seeds(folder)


def test_a_target_reads_its_good_inputs(target):
    _, found, folder, seeds = target
    for content in seeds:
        found.read(content, folder)


def test_inputs_that_were_found(target):
    name, found, folder, _ = target
    faults = {kind: fuzz_targets.fault(found, content, folder) for kind, content in fuzz.kept(name).items()}
    assert {kind: what for kind, what in faults.items() if what} == {}


def test_every_kept_input_has_a_target():
    assert {path.stem for path in fuzz.SEEDS.iterdir()} <= fuzz_targets.TARGETS.keys()


def test_found_inputs_are_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SEEDS", tmp_path / "seeds")
    report = fuzz.Report(tmp_path / "report.json", tmp_path / "found" / "pth")
    for content in (b"long " * 100, b"short", b"longer"):
        report.add("TypeError reader.read", "a traceback", content)
    report.add("KeyError reader.read", "a traceback", b"short")
    fuzz.keep(tmp_path / "found")
    assert fuzz.kept("pth") == {"KeyError_reader_read": b"short"}
    assert fuzz.kept("images") == {}


def test_a_few_mutations(target):
    _, found, folder, seeds = target
    for number in range(20):
        chance = Random(number)
        content = found.mutate(chance.choice(seeds), chance)
        assert (what := fuzz_targets.fault(found, content, folder)) is None, f"mutation {number}: {what}"


def test_a_mutation_is_given_by_its_seed(target):
    _, found, _, seeds = target
    for number in range(20):
        assert found.mutate(seeds[0], Random(number)) == found.mutate(seeds[0], Random(number))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"refuse", None),
        (b"lines", "lines FileNotFoundError test_fuzz.read"),
        (b"nameless", "name LcmError test_fuzz.read"),
        (b"wrong", "WrongError it is wrong"),
        (b"fail", "ZeroDivisionError test_fuzz.read"),
        (b"wait", "TooSlowError fuzz_targets.end"),
        (b"system", "OSError test_fuzz.read"),
    ],
)
def test_what_counts_as_a_fault(tmp_path, monkeypatch, content, kind):
    from lcm_jax.errors import LcmError

    def read(content, folder):
        match content:
            case b"refuse":
                raise LcmError(f"{folder}/file is wrong")
            case b"lines":
                raise FileNotFoundError(2, "is\nwrong", f"{folder}/file")
            case b"nameless":
                raise LcmError("it is wrong")
            case b"wrong":
                raise fuzz_targets.WrongError("it is wrong")
            case b"fail":
                raise ZeroDivisionError
            case b"system":
                raise OSError(27, "File too large")
        while True:
            pass

    monkeypatch.setattr(fuzz_targets, "SECONDS", 0.05)
    target = fuzz_targets.Target(lambda folder: [], mutations.in_bytes, read)
    found = fuzz_targets.fault(target, content, tmp_path)
    assert (found and found[0]) == kind
