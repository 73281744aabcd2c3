"""`pytest --without-torch` leaves out the files that need torch."""

from pathlib import Path

import pytest
from needs_torch import needs_torch


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        ("import torch", True),
        ("import os, diffusers.models.embeddings as reference", True),
        ("from peft import LoraConfig", True),
        ("if True:\n    from accelerate.utils import tqdm", True),
        ("class Test:\n    import torch", True),
        ("import kit", True),
        ("from test_other import *", True),
        ("def test():\n    import torch", False),
        ("import transformers, torchless, numpy\n'import torch'", False),
        ("from lcm_jax import kit", False),
    ],
)
def test_files(tmp_path, source, needs):
    (tmp_path / "kit.py").write_text("import torch.nn\n")
    (tmp_path / "test_other.py").write_text("from kit import x\n")
    (tmp_path / "test_this.py").write_text(source)
    expected = {"kit.py", "test_other.py"} | ({"test_this.py"} if needs else set())
    assert {file.name for file in needs_torch(tmp_path)} == expected


def test_both_kinds_are_here():
    ours, needing = set(Path(__file__).parent.rglob("test_*.py")), needs_torch(Path(__file__).parent)
    assert Path(__file__) in ours - needing
    assert len(ours & needing) > 20 and len(ours - needing) > 20
