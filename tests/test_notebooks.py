"""The committed notebooks: executed in order without error or warning, small, without traces of a machine."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes
# "/home/x/y", "C:\x": not of a word, an address, or a fraction.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/<])/(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Z]:\\\\?\w")


def texts(output):
    """The text of an output, without images."""
    parts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    return ["".join(part) for part in parts]


@pytest.mark.parametrize("name", NAMES)
def test_notebook(name):
    """Executed from a clean kernel; neither source nor output names a path of one machine."""
    path = FOLDER / f"{name}.ipynb"
    assert path.stat().st_size < LARGEST
    assert f"({name}.ipynb)" in (FOLDER / "README.md").read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"]
    said = ["".join(cell["source"]) for cell in cells] + [text for output in outputs for text in texts(output)]
    assert [match for text in said for match in ABSOLUTE_PATH.findall(text)] == []


def test_there_are_seven_and_their_readme_names_no_other():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(NAMES) == 7 and sorted(set(re.findall(r"\((\w+)\.ipynb\)", readme))) == NAMES


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
def test_absolute_path(text, found):
    assert bool(ABSOLUTE_PATH.search(text)) == found
