"""setup.py and constraints.txt agree on every Python that the package names."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture
def package(monkeypatch) -> SimpleNamespace:
    """Classifiers, and all requirements by extra ("": the core)."""
    given = {}
    stand_in = SimpleNamespace(setup=given.update, find_packages=lambda include: [])
    monkeypatch.setitem(sys.modules, "setuptools", stand_in)
    runpy.run_path(str(ROOT / "setup.py"))
    wanted = {"": given["install_requires"], **given["extras_require"]}
    return SimpleNamespace(
        classifiers=given["classifiers"],
        about=given,
        wanted={extra: [Requirement(line) for line in lines] for extra, lines in wanted.items()},
    )


def pins(python: str) -> list[Requirement]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    parsed = [Requirement(line) for line in lines]
    return [pin for pin in parsed if pin.marker is None or pin.marker.evaluate({"python_version": python})]


def plain(name: str) -> str:
    return name.lower().replace("_", "-")


@pytest.mark.parametrize(("python", "jax"), [("3.11", "0.10.2"), ("3.12", "0.12.0.1"), ("3.13", "0.12.0.1")])
def test_pins(package, python, jax):
    assert f"Programming Language :: Python :: {python}" in package.classifiers
    pinned = {plain(pin.name): str(pin.specifier).removeprefix("==") for pin in pins(python)}
    assert len(pinned) == len(pins(python)) == len(pins("3.11")), "one pin of each package"
    assert pinned["jax"] == pinned["jaxlib"] == jax
    for one in package.wanted["test"] + package.wanted["docs"] + package.wanted[""]:
        assert one.specifier.contains(pinned[plain(one.name)]), one


def test_bounds_of_jax(package):
    bounds = {str(one.specifier) for wanted in package.wanted.values() for one in wanted if one.name == "jax"}
    assert len(bounds) == 1
    admits = Requirement("jax" + bounds.pop()).specifier.contains
    assert [admits(version) for version in ("0.10.1", "0.10.2", "0.12.9", "0.13.0")] == [False, True, True, False]


def test_core_tests_install_no_torch(package):
    names = {one.name for one in package.wanted["test-core"]}
    assert "pytest" in names and not names & {"torch", "diffusers", "accelerate", "peft"}


def test_citation_is_of_this_version(package):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == package.about["version"] and citation["license"] == package.about["license"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
