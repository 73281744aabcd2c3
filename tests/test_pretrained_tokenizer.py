"""The tokenizer: ids, padding, length, and its files."""

import concurrent.futures
import json

import numpy as np
import pytest
import tiny
from transformers import CLIPTokenizer

from lcm_jax.errors import LcmError
from lcm_jax.models.clip import CLIPTextModel
from lcm_jax.pretrained.tokenizer import FILES, load_tokenizer, tokenize, tokenize_counted

VOCAB = tiny.vocabulary()[0]
START, END = VOCAB[tiny.START], VOCAB[tiny.END]
ENCODER = CLIPTextModel(vocab_size=len(VOCAB))


@pytest.mark.parametrize("kind, pad", [("sd1", END), ("sd2", 0), ("sdxl_2", 0)])
def test_ids_and_padding(tmp_path, kind, pad):
    tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path / "t", kind), ENCODER)
    ids = tokenize(tokenizer, ["a RED  circle", ""])
    assert ids.shape == (2, 77) and ids.dtype == np.int32
    words = [VOCAB["a</w>"], VOCAB["red</w>"], VOCAB["circle</w>"]]
    assert ids[0].tolist() == [START, *words, END] + [pad] * 72
    assert ids[1].tolist() == [START, END] + [pad] * 75


def test_the_exclamation_mark_is_the_pad_token_if_it_pads(tmp_path):
    plain = load_tokenizer(tiny.write_tokenizer(tmp_path / "a", "sd1"), ENCODER)
    pads = load_tokenizer(tiny.write_tokenizer(tmp_path / "b", "sdxl_2"), ENCODER)
    assert tokenize(plain, ["hello!"])[0, 2] == VOCAB["!</w>"]
    assert tokenize(pads, ["hello!"])[0, 2] == 0


def test_long_captions_are_cut_and_keep_their_end(tmp_path):
    tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path / "t"), ENCODER)
    ids = tokenize(tokenizer, ["red " * 200])
    assert ids[0].tolist() == [START] + [VOCAB["red</w>"]] * 75 + [END]


def test_no_captions_and_one_string(tmp_path):
    tokenizer = load_tokenizer(tiny.write_tokenizer(tmp_path / "t"), ENCODER)
    assert tokenize(tokenizer, []).shape == (0, 77)
    with pytest.raises(TypeError, match="sequence of captions"):
        tokenize(tokenizer, "a red circle")


def test_a_config_without_length_takes_the_text_encoders(tmp_path):
    folder = tiny.write_tokenizer(tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    tiny.write_json(folder / "tokenizer_config.json", config)
    assert tokenize(load_tokenizer(folder, ENCODER), ["a"]).shape == (1, 77)


def test_added_tokens_in_the_vocabulary_change_nothing(tmp_path):
    folder = tiny.write_tokenizer(tmp_path / "t")
    before = tokenize(load_tokenizer(folder, ENCODER), ["a red square"])
    tiny.write_json(folder / "added_tokens.json", {tiny.START: START, tiny.END: END})
    assert np.array_equal(tokenize(load_tokenizer(folder, ENCODER), ["a red square"]), before)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("a \ud83d cat", r"the text 'a \\ud83d cat' is not valid Unicode: character 3 is half a character"),
        (
            "caf\udce9",
            r"the text 'caf\\udce9' is not valid Unicode: character 4 is half a character",
        ),  # Latin 1 on a command line
        ("x" * (2**20 + 1), "a text of 1048577 characters"),
        (None, "None is a NoneType, not a text"),
    ],
)
def test_texts_that_no_tokenizer_can_take_are_one_error(text, problem):
    tokenizer = load_tokenizer(tiny.folder("sd1") / "tokenizer", ENCODER)
    with pytest.raises(LcmError, match=problem):
        tokenize_counted(tokenizer, ["a red circle", text])


def test_odd_texts_are_tokenized():
    tokenizer = load_tokenizer(tiny.folder("sd1") / "tokenizer", ENCODER)
    odd = ["nul \0 character", "a mark \ufeff inside", "\U0010ffff", "an emoji \U0001f600"]
    assert (tokenize(tokenizer, odd)[:, 2] != END).all()


@pytest.mark.parametrize(
    "entry",
    [
        {"vocab_file": "/other/vocab.json"},
        {"merges_file": "../merges.txt"},
        {"tokenizer_file": "/other/tokenizer.json"},
        {"fast_tokenizer_files": ["../other/tokenizer.4.0.0.json"]},
        {"vocab": "/other/vocab.json"},
        {"init_inputs": ["x"]},
    ],
)
def test_a_config_that_names_other_files_is_refused(tmp_path, entry):
    folder = tiny.write_tokenizer(tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tiny.write_json(folder / "tokenizer_config.json", config | entry)
    with pytest.raises(LcmError, match=f"tokenizer_config.json names other files as '{next(iter(entry))}'"):
        load_tokenizer(folder, ENCODER)
    unused = {"name_or_path": "/a/folder", "special_tokens_map_file": "./special_tokens_map.json", "vocab_file": None}
    tiny.write_json(folder / "tokenizer_config.json", config | unused)  # in published ones; transformers ignores them
    assert tokenize(load_tokenizer(folder, ENCODER), ["a"]).shape == (1, 77)


@pytest.mark.parametrize("name", FILES[:3])
def test_missing_files_are_named(tmp_path, name):
    folder = tiny.write_tokenizer(tmp_path / "t")
    (folder / name).unlink()
    with pytest.raises(LcmError, match=name):
        load_tokenizer(folder, ENCODER)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer_config.json"])
def test_broken_files_are_named(tmp_path, name):
    folder = tiny.write_tokenizer(tmp_path / "t")
    (folder / name).write_text("{")
    with pytest.raises(LcmError, match=str(folder)):
        load_tokenizer(folder, ENCODER)


def change(folder, name, **entries):
    tiny.change_json(folder / name, **entries)


def change_vocabulary(**entries):
    return lambda folder: change(folder, "vocab.json", **entries)


def without(token):
    def damage(folder):
        tiny.write_json(folder / "vocab.json", {key: id for key, id in VOCAB.items() if key != token})

    return damage


def config(**entries):
    return lambda folder: change(folder, "tokenizer_config.json", **entries)


def special(**entries):
    return lambda folder: change(folder, "special_tokens_map.json", **entries)


def cut_merges(folder):
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[: len(lines) // 2]))


def another_tokenizer_json(folder):
    """Of the same tokens, two of them exchanged."""
    other = tiny.write_tokenizer(folder / "other")
    change(other, "vocab.json", **{"a</w>": VOCAB["b</w>"], "b</w>": VOCAB["a</w>"]})
    CLIPTokenizer.from_pretrained(str(other)).save_pretrained(str(folder / "saved"))
    (folder / "saved" / "tokenizer.json").rename(folder / "tokenizer.json")


def vocabulary_of_another_type(folder):
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))  # adds tokenizer.json
    (folder / "vocab.json").write_text("[1]")


DAMAGED = [
    *(
        (config(model_max_length=bad), "model_max_length of .*tokenizer_config.json=")
        for bad in ("x", -3, 900_000, True)
    ),
    (special(pad_token=None), "it has no pad_token"),
    (special(pad_token=3), "pad_token of .*special_tokens_map.json=3"),
    (special(eos_token={"content": ""}), "eos_token of .*special_tokens_map.json="),
    (special(bos_token="a"), "begin with 'a'|made by no line"),
    (special(pad_token="<pad>"), f"has {len(VOCAB) + 1} tokens, its text encoder's vocab_size is {len(VOCAB)}"),
    (change_vocabulary(a="5"), "cannot be read as a CLIP tokenizer: .*out of vocabulary"),
    (change_vocabulary(a=7), "ids are not 0, 1, ... without gaps"),
    (change_vocabulary(a=10**6), "ids are not 0, 1, ... without gaps"),
    (without(tiny.END), r"vocab.json lacks <\|endoftext\|>"),
    (without("z"), "without gaps"),
    (cut_merges, "tokens of vocab.json, such as .*, are made by no line of merges.txt"),
    (
        lambda folder: (folder / "merges.txt").write_text("<html> not found </html>"),
        "cannot be read as a CLIP tokenizer",
    ),
    (lambda folder: (folder / "tokenizer.json").write_text("[" * 10**5), "CLIP tokenizer"),
    (lambda folder: (folder / "special_tokens_map.json").write_text("[1]"), "special_tokens_map.json holds a list"),
    (vocabulary_of_another_type, "cannot be read as a CLIP tokenizer"),
    (another_tokenizer_json, "its files give 'a</w>' the ids 320 and 321"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
def test_damaged_files_are_one_line_and_never_other_tokens(tmp_path, damage, message):
    folder = tiny.write_tokenizer(tmp_path / "t")
    damage(folder)
    with pytest.raises(LcmError, match=message) as caught:
        load_tokenizer(folder, ENCODER)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_fits_its_text_encoder(tmp_path):
    folder = tiny.write_tokenizer(tmp_path / "t")
    with pytest.raises(LcmError, match=f"has {len(VOCAB)} tokens, its text encoder's vocab_size is 100"):
        load_tokenizer(folder, CLIPTextModel(vocab_size=100))
    with pytest.raises(LcmError, match="model_max_length of .*=77; supported: a whole number from 2 to 20"):
        load_tokenizer(folder, CLIPTextModel(max_position_embeddings=20))
    with pytest.raises(LcmError, match=f"ends texts with the id {END}, its text encoder's eos_token_id is 7"):
        load_tokenizer(folder, CLIPTextModel(eos_token_id=7, with_projection=True))
    for encoder in (CLIPTextModel(eos_token_id=7), CLIPTextModel(eos_token_id=2, with_projection=True)):
        assert load_tokenizer(folder, encoder)  # does not pool, or the largest id


def test_files_are_kept_as_they_are(tmp_path):
    folder = tiny.write_tokenizer(tmp_path / "t")
    assert load_tokenizer(folder, ENCODER).files == {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_files_that_transformers_4_needs_are_derived_from_those_of_transformers_5(tmp_path, kind):
    original = tiny.write_tokenizer(tmp_path / "original", kind)
    modern = tmp_path / "modern"
    CLIPTokenizer.from_pretrained(str(original)).save_pretrained(str(modern))
    assert not (modern / "vocab.json").exists()
    tokenizer = load_tokenizer(modern, ENCODER)
    ids, found = tokenize(tokenizer, ["a red circle!"]), tokenizer.files
    assert set(found) == {*FILES, "tokenizer.json"}
    assert json.loads(found["vocab.json"]) == VOCAB
    assert found["merges.txt"] == (original / "merges.txt").read_bytes()
    derived = tmp_path / "derived"
    derived.mkdir()
    for name in FILES:
        (derived / name).write_bytes(found[name])
    assert np.array_equal(tokenize(load_tokenizer(derived, ENCODER), ["a red circle!"]), ids)


def test_threads_share_a_tokenizer():
    """With long and short captions at once, every thread gets what it would get alone."""
    tokenizer = load_tokenizer(tiny.folder("sd1") / "tokenizer", ENCODER)
    captions = ["a red circle", "a blue square and " * 40, "x", "hello " * 30] * 100
    alone = [tokenize_counted(tokenizer, [caption]) for caption in captions]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda caption: tokenize_counted(tokenizer, [caption]), captions))
    for (ids, lost), (others, other_lost) in zip(alone, together, strict=True):
        np.testing.assert_array_equal(ids, others)
        assert lost == other_lost
    assert [int(lost[0]) > 0 for _, lost in alone[:3]] == [False, True, False]
