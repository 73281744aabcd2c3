"""The committed notebooks: valid, executed in order without error or warning, small, without traces of a machine."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = (
    "01_lcm_on_one_page",
    "02_table_1_and_ablations",
    "03_lcm_lora_and_style",
    "04_fine_tune_with_lcf",
    "05_to_diffusers_and_back",
)
LARGEST = 400_000  # bytes
# "/home/x/y", "C:\x": not of a word, an address, or a fraction.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Z]:\\\\?\w")


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(name):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def outputs(name):
    return [output for cell in code_cells(name) for output in cell["outputs"]]


def texts(output):
    """What an output says in letters, pictures apart."""
    parts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    return ["".join(part) for part in parts]


def test_the_folder_holds_these_and_its_readme_names_each():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in readme for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_valid(name):
    nbformat = pytest.importorskip("nbformat")
    notebook = read(name)
    assert notebook["nbformat"] == 4
    nbformat.validate(notebook)


@pytest.mark.parametrize("name", NAMES)
def test_executed_in_order_from_a_clean_kernel(name):
    assert [cell["execution_count"] for cell in code_cells(name)] == list(range(1, len(code_cells(name)) + 1))
    assert outputs(name)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_hold_no_error_and_no_stderr(name):
    assert [o for o in outputs(name) if o["output_type"] == "error" or o.get("name") == "stderr"] == []


@pytest.mark.parametrize("name", NAMES)
def test_nothing_names_a_path_of_one_machine(name):
    sources = ["".join(cell["source"]) for cell in read(name)["cells"]]
    said = sources + [text for output in outputs(name) for text in texts(output)]
    assert [match for text in said for match in ABSOLUTE_PATH.findall(text)] == []


@pytest.mark.parametrize("name", NAMES)
def test_small(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("saved to /home/someone/runs/lcm", True),
        ("C:\\Users", True),
        ("runs/notebooks/lcm/export", False),
        ("https://arxiv.org/abs/2310.04378", False),
        ("1/2 and LCM / LoRA", False),
    ],
)
def test_what_counts_as_an_absolute_path(text, found):
    assert bool(ABSOLUTE_PATH.search(text)) == found
