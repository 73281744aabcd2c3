"""Textual-inversion files: the formats that circulate, and what is refused."""

import re

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import save_file

from lcm_jax.errors import BadArgument
from lcm_jax.pretrained.embeddings import read_embeddings

ONE = np.arange(64, dtype=np.float32).reshape(2, 32)
TWO = ONE + 100


def pipeline(name: str):
    return tiny.loaded(name)[0]


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("sd1", {"emb_params": ONE}, "File"),
        ("sd1", {"<cat-toy>": ONE}, "<cat-toy>"),
        ("sd1", {"star": ONE[0]}, "star"),
        ("sd1", {"*": ONE}, "File"),
        ("sd2", {"emb_params": ONE.astype(np.float16)}, "File"),
        ("sdxl", {"clip_l": ONE, "clip_g": TWO}, "File"),
        ("sdxl", {"text_encoders_0": ONE, "text_encoders_1": TWO}, "File"),
    ],
)
def test_formats_and_words(name, content, word, tmp_path):
    """The word is the key of diffusers' files, else the file's name; a name that is given goes before both."""
    file = tmp_path / "File.safetensors"
    save_file(content, file)
    found = read_embeddings(pipeline(name), [str(file), f"A b={file}"])
    assert list(found) == [word.lower(), "a b"] and [one.name for one in found.values()] == [word, "A b"]
    for one in found.values():
        assert list(one.vectors) == ["text_encoder", "text_encoder_2"][: len(one.vectors)]
        for value, want in zip(one.vectors.values(), content.values(), strict=True):
            assert value.dtype == np.float32 and (value == np.atleast_2d(want)).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sd1", {"emb_params": np.ones((2, 48), np.float32)}, "width 48, the model's text_encoder has 32; use an"),
        ("sdxl", {"clip_l": ONE, "clip_g": TWO[:, :8]}, "width 8, the model's text_encoder_2 has 32"),
        ("sdxl", {"clip_l": ONE, "clip_g": TWO[:1]}, "has 2 vectors and 1; it is damaged"),
        ("sd1", {"clip_l": ONE, "clip_g": TWO}, "is for SDXL, whose two text encoders the model does not have"),
        ("sdxl", {"emb_params": ONE}, "is for one text encoder, the model has two; use one for SDXL"),
        (
            "sdxl",
            {"clip_l": ONE},
            "is no embedding: it holds clip_l; it should be one tensor, emb_params, or clip_l and",
        ),
        ("sd1", {"a": ONE, "b": TWO}, "is no embedding: it holds a, b; it should be"),
        ("sd1", {"emb_params": ONE[None]}, r"emb_params has the shape \[1, 2, 32\]; it should be \[vectors, width\]"),
        ("sd1", {"emb_params": ONE[:0]}, r"emb_params has the shape \[0, 32\]"),
        ("sd1", {"emb_params": np.ones((76, 32), np.float32)}, "has 76 vectors, and a text has room for 75 tokens"),
        ("sd1", {"emb_params": np.full((1, 32), np.nan, np.float32)}, "has numbers that are not finite"),
        ("sd1", {"emb_params": np.full((1, 32), 1e300)}, "has numbers that are not finite"),
        ("sd1", {"emb_params": np.ones((1, 32), np.complex64)}, "is complex64, and vectors are floating-point numbers"),
        ("sd1", {"emb_params": np.ones((1, 32), np.int64)}, "is int64"),
        ("sd1", {"emb_params": np.ones((1, 32), bool)}, "is bool"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(name, content, message, tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(content, file)
    with pytest.raises(BadArgument, match=f"^embedding=.*x.safetensors: .*{message}"):
        read_embeddings(pipeline(name), [str(file)])


def test_names_and_files_that_cannot_be_are_one_line(tmp_path):
    file, blank, image = (tmp_path / name for name in ("x.safetensors", "blank.safetensors", "x.PNG"))
    save_file({"emb_params": ONE}, file)
    save_file({" ": ONE}, blank)
    image.touch()
    for given, message in (
        ([f"X={file}", str(file)], "'x' is given twice; name one of them NAME=FILE"),
        ([f"={file}"], "has no name before the ="),
        ([str(blank)], "gives its word no name; write NAME=FILE"),
        (["a=/nowhere.safetensors"], "/nowhere.safetensors does not exist; copy"),
        ([str(tmp_path)], "is no regular file"),
        ([str(image)], "is an image; embeddings inside of images are not read"),
    ):
        with pytest.raises(BadArgument, match=message):
            read_embeddings(pipeline("sd1"), given)


XL = {"clip_l": ONE, "clip_g": TWO}


@pytest.mark.parametrize("content", [{"string_to_param": {"*": ONE}, "name": "x", "step": 9}, {"<x>": ONE}, XL])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickled_files_are_refused_with_a_command_that_converts_them(content, suffix, tmp_path):
    file = tmp_path / f"x{suffix}"

    def tensors(tree):
        if isinstance(tree, dict):
            return {key: tensors(value) for key, value in tree.items()}
        return torch.nn.Parameter(torch.tensor(tree)) if isinstance(tree, np.ndarray) else tree

    torch.save(tensors(content), file)
    with pytest.raises(BadArgument, match="is pickled, which can run code, and is not opened") as error:
        read_embeddings(pipeline("sd1"), [str(file)])
    exec(re.search(r'python -c "(.*)"$', str(error.value))[1])
    model = pipeline("sdxl" if content is XL else "sd1")
    found = read_embeddings(model, [str(file.with_suffix(".safetensors"))])["x"].vectors
    assert [*map(np.ndarray.tolist, found.values())] == [ONE.tolist(), TWO.tolist()][: len(found)]
