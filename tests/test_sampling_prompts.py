"""How prompts are read: brackets, chunks of 75 tokens, names of embeddings and LoRAs."""

import argparse
import itertools

import numpy as np
import pytest
import tiny

from lcm_jax import sample
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.pretrained.embeddings import Embedding
from lcm_jax.sampling import chunks
from lcm_jax.sampling.prompts import Reading, check_readable, is_marked, loras, make_reading, parse
from lcm_jax.sampling.request import make_request

VOCAB = tiny.vocabulary()[0]
RED, CIRCLE, COMMA = VOCAB["red</w>"], VOCAB["circle</w>"], VOCAB[",</w>"]
START, END = VOCAB[tiny.START], VOCAB[tiny.END]
STAR = Embedding("Star", {name: np.ones((3, 32), np.float32) for name in ("text_encoder", "text_encoder_2")})


def pipeline(name: str = "sd1"):
    return tiny.loaded(name)[0]


def pieces(prompt: str, syntax: str) -> list[tuple[str | None, float]]:
    return [(text, round(weight, 6)) for text, weight in parse(prompt, syntax)]


@pytest.mark.parametrize(
    ("prompt", "a1111", "comfy"),
    [
        ("((hat:1.3))", [("hat", 1.43)], [("hat", 1.3)]),
        ("(a (b:0.5) c)", [("a ", 1.1), ("b", 0.55), (" c", 1.1)], [("a ", 1.1), ("b", 0.5), (" c", 1.1)]),
        ("[dim] light", [("dim", 0.909091), (" light", 1)], [("[dim] light", 1)]),
        ("x (y", [("x ", 1), ("y", 1.1)], [("x (y", 1)]),
        ("x) y", [("x) y", 1)], [("x) y", 1)]),
        ("(a:1.2:1.5)", [("a:1.2", 1.5)], [("a:1.2", 1.5)]),
        (r"\(z\)", [("(z)", 1)], [("(z)", 1)]),
        ("(:1.3)", [("", 1)], [(":1.3", 1.1)]),
        ("(x:abc)", [("x:abc", 1.1)], [("x:abc", 1.1)]),
        ("(x: 1.3 ) y: 2 )", [("x", 1.3), (" y: 2 )", 1)], [("x", 1.3), (" y: 2 )", 1)]),
        (r"\[z\] \\ \n", [("[z] \\ n", 1)], [(r"\[z\] \\ \n", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 0.909091)], [("a [b", 1.1), (" c]", 1)]),
        ("(a)(b)[[c]]", [("ab", 1.1), ("c", 0.826446)], [("ab", 1.1), ("[[c]]", 1)]),
        ("a BREAK (b BREAK c)", [("a", 1), (None, 1), ("b", 1.1), (None, 1.1), ("c", 1.1)], None),
        ("BREAKFAST", [("BREAKFAST", 1)], [("BREAKFAST", 1)]),
        ("BREAK  a BREAK BREAK\tb BREAK ", [(None, 1), ("a", 1), (None, 1), (None, 1), ("b", 1), (None, 1)], None),
        ("(a:-.5) <lora:x:0.8>b", [("a", -0.5), (" b", 1)], [("a", -0.5), (" <lora:x:0.8>b", 1)]),
    ],
)
def test_weights_are_those_of_the_programs(prompt, a1111, comfy):
    assert pieces(prompt, "a1111") == a1111
    assert comfy is None or pieces(prompt, "comfy") == comfy
    assert pieces(prompt, "plain") == [(prompt, 1)]


@pytest.mark.parametrize(
    ("prompt", "message", "comfy"),
    [
        ("x (y", r"prompt=x \(y: the bracket \( \(character 3\) has no partner; add it, write \\\( if", True),
        ("x) y", r"the bracket \) \(character 2\) has no partner", True),
        ("[x", r"the bracket \[ \(character 1\) has no partner", False),
        ("(x:1.2.3)", r"'1.2.3' is no number; write a weight as in \(word:1.2\)", False),
        ("[red:0.5]", r"\[...:0.5...\] changes the text from step to step, which is not supported", False),
        ("[a:b: 7 ]", r"changes the text from step to step", False),
        ("[a|b]", r"\[...\|...\] changes the text from step to step", False),
        ("a AND b", r"AND joins prompts in a1111, which is not supported; write a comma", False),
        ("<hypernet:x:1>", r"<hypernet:x:1> is not supported; only <lora:NAME:WEIGHT> is", False),
        ("<lora:x:1:0.5>", r"<lora:x:1:0.5> has more than one weight", False),
        ("<lora:x:1> <lora:x:2>", r"<lora:x:2> is there twice; write it once", False),
        ("<lora:x:much>", r"'much' is no number", False),
        (f"(x:{'9' * 400})", r"the weight of 'x' is not finite", True),
        ("(" * 101 + ")" * 101, r"nested more than 100 deep", True),
        ("(](" * 30_000, r"nested more than 100 deep", True),  # not in quadratic time
    ],
)
def test_what_cannot_be_read_is_one_line(prompt, message, comfy):
    with pytest.raises(BadArgument, match=message) as error:
        check_readable("a1111", prompt=[prompt])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    check_readable("plain", prompt=prompt)
    if comfy:
        with pytest.raises(BadArgument, match=message):
            check_readable("comfy", prompt=prompt)
    else:
        check_readable("comfy", prompt=prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_syntax": "compel"}, "prompt_syntax=compel: choose one of plain, a1111, comfy"),
        ({"emphasis": "loud", "prompt_syntax": "comfy"}, "emphasis=loud: choose one of original, no_norm, interpolate"),
        ({"emphasis": "no_norm"}, "emphasis=no_norm: is what weights do, which plain prompts do not have"),
        ({"clip_skip": 0}, "clip_skip=0: out of range; choose 1, the last layer, to 2"),
        ({"clip_skip": 3}, "clip_skip=3: out of range"),
    ],
)
def test_settings_of_prompts_that_cannot_be_are_refused(options, message):
    with pytest.raises(BadArgument, match=message):
        make_request(pipeline(), **options)


def test_emphasis_is_the_syntaxs_own_unless_given():
    found = [make_reading(pipeline(), syntax, None, None).emphasis for syntax in ("a1111", "comfy")]
    assert found == ["original", "interpolate"]
    assert make_reading(pipeline(), "comfy", "no_norm", 2) == Reading("comfy", "no_norm", 2)


def test_prompts_with_marks_are_recognised():
    marked = ["a (cat)", "[cat]", "[red:0.5]", r"\(z\)", "<lora:x:1>", "a BREAK b"]
    assert [is_marked(prompt) for prompt in marked] == [True] * len(marked)
    assert not any(map(is_marked, ["a cat", "smile :)", "CATS AND DOGS", "1 < 2, 10:30", ""]))


def split(prompt: str, syntax: str, embeddings=None, name: str = "sd1") -> list[list[int]]:
    """Ids of each chunk between start and end, from the first text encoder."""
    ids = chunks.chunked(pipeline(name), embeddings or {}, [prompt], Reading(syntax)).ids["text_encoder"]
    assert ids.shape[1] == 77 and set(ids[:, 0]) == {START}
    rows = [row.tolist() for row in ids]
    assert all(END in row for row in rows)
    return [row[1 : row.index(END)] for row in rows]


def test_long_prompts_become_chunks():
    """75 tokens fit; the 76th begins a chunk, in plain it is cut off; text after a comma near the end moves along."""
    assert [len(one) for one in split("red " * 75, "a1111")] == [75]
    for syntax in ("a1111", "comfy"):
        assert [len(one) for one in split("red " * 76, syntax)] == [75, 1]
    assert [len(one) for one in split("red " * 76, "plain")] == [75]
    assert split("", "a1111") == [[]]
    assert [len(one) for one in split("red " * 55 + "," + " red" * 20, "a1111")] == [56, 20]  # 20 tokens back
    assert [len(one) for one in split("red " * 54 + "," + " red" * 21, "a1111")] == [75, 1]  # 21: too far
    assert [len(one) for one in split("red " * 74 + ", red", "a1111")] == [75, 1]
    assert split("red " * 75 + ", red", "a1111")[1] == [COMMA, RED]


def test_break_ends_a_chunk_in_a1111_alone():
    assert split("red BREAK circle", "a1111") == [[RED], [CIRCLE]]
    assert split("BREAK red BREAK", "a1111") == [[], [RED]]
    assert len(split("red BREAK circle", "comfy")) == 1


def test_comfy_splits_no_word_of_less_than_8_tokens():
    short, long = "redx" * 3, "redx" * 4  # 'red' is one token only as a word's end: 4 tokens each
    lengths = [len(split(word, "comfy")[0]) for word in (short, long)]
    assert lengths[0] >= 8 and lengths[1] > lengths[0]
    word = "zqzqzqz"  # bytes
    assert len(split(word, "comfy")[0]) == 7
    assert [len(one) for one in split("red " * 70 + word, "comfy")] == [70, 7]
    assert [len(one) for one in split("red " * 70 + word + "z", "comfy")] == [75, 3]
    assert [len(one) for one in split("red " * 70 + word, "a1111")] == [75, 2]


def test_prompts_of_a_batch_are_repeated_to_one_length():
    prompts = ["red " * 76, "circle"]
    found = chunks.chunked(pipeline("sdxl"), {}, prompts, Reading("a1111"))
    assert found.count == 2 and found.weights is None and found.spliced is None
    for ids in found.ids.values():
        assert ids.shape == (4, 77) and (ids[2] == ids[3]).all() and ids[3, 1] == CIRCLE
    with pytest.raises(LcmError, match="prompts of 5, 13 chunks of 75 tokens share no length of at most 64 chunks"):
        chunks.chunked(pipeline(), {}, ["red " * 75 * n for n in (5, 13)], Reading("a1111"))
    with pytest.raises(LcmError, match="a prompt of 65 chunks of 75 tokens is too long; shorten it to 64 chunks"):
        chunks.chunked(pipeline(), {}, ["red " * 75 * 65], Reading("a1111"))  # alone: no other batch_size helps


def test_tokenizers_that_split_differently_have_as_many_chunks(monkeypatch):
    """As SDXL's do: "!!" is one token or two."""
    first, whole = pipeline("sdxl").tokenizer, chunks.tokenize_whole

    def shorter(tokenizer, texts):
        return [ids if tokenizer is first else [*ids[:5], ids[-1]] for ids in whole(tokenizer, texts)]

    monkeypatch.setattr(chunks, "tokenize_whole", shorter)
    found = chunks.chunked(pipeline("sdxl"), {}, ["red " * 76], Reading("a1111"))
    assert found.count == 2 and found.ids["text_encoder"][1, :3].tolist() == [START, RED, END]
    assert found.ids["text_encoder_2"][:, :6].tolist() == [[START, RED, RED, RED, RED, END], [START, END, 0, 0, 0, 0]]


def test_weights_follow_their_tokens():
    found = chunks.chunked(pipeline(), {}, ["a (red:1.5) circle"], Reading("a1111"))
    assert found.weights["text_encoder"][0, :6].tolist() == [1, 1, 1.5, 1, 1, 1]


@pytest.mark.parametrize("syntax", ["plain", "a1111", "comfy"])
def test_embeddings_stand_where_their_name_stands(syntax):
    """In any case, with commas behind it and with its weight, but not inside of a word; and they are never split."""
    embeddings, call = {"star": STAR, "<x-1>": Embedding("<x-1>", STAR.vectors)}, "embedding:" * (syntax == "comfy")
    prompt = f"a starry {call}STAR, {call}<x-1>, red"
    found = chunks.chunked(pipeline(), embeddings, [prompt], Reading(syntax))
    vectors, here = found.spliced["text_encoder"]
    starry = len(split("starry", "plain"))
    length = len(split("starry", "plain")[0])
    assert starry == 1 and np.flatnonzero(here[0]).tolist() == [length + 2 + n for n in (0, 1, 2, 4, 5, 6)]
    assert (vectors[here] == 1).all() and not vectors[~here].any()
    ids = found.ids["text_encoder"][0].tolist()
    assert [ids[length + 5], ids[length + 9], ids[length + 10], ids[length + 11]] == [COMMA, COMMA, RED, END]
    assert chunks.unused(embeddings, [prompt], syntax) == []
    assert chunks.unused(embeddings, ["stars"], syntax) == ["Star", "<x-1>"]
    if syntax != "plain":
        weighted = chunks.chunked(pipeline(), embeddings, [f"({call}star:1.5)"], Reading(syntax))
        assert weighted.weights["text_encoder"][0, :5].tolist() == [1, 1.5, 1.5, 1.5, 1]
        whole = chunks.chunked(pipeline(), embeddings, ["red " * 73 + f"{call}star"], Reading(syntax))
        assert whole.spliced["text_encoder"][1].sum(1).tolist() == [0, 3]
    else:
        long = "red " * 73 + "star"
        assert chunks.truncated(pipeline(), embeddings, [long, "star"]) == {long: (78, 77)}


def test_an_embedding_that_is_not_there_is_one_line_in_comfy():
    with pytest.raises(LcmError, match="there is no embedding 'moon'; those given: Star"):
        chunks.chunked(pipeline(), {"star": STAR}, ["a embedding:moon,"], Reading("comfy"))
    for name in ("star.safetensors", "STAR.pt"):
        found = chunks.chunked(pipeline(), {"star": STAR}, [f"embedding:{name}"], Reading("comfy"))
        assert found.spliced["text_encoder"][1].sum() == 3


def test_loras_of_prompts_are_taken_from_the_command_line_or_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    given, style, other = (tmp_path / name for name in ("lcm.safetensors", "deep/style.safetensors", "b.safetensors"))
    for path in (given, style, other):
        path.touch()

    def found(*prompts, folder=tmp_path / "deep", lora=f"{given}:1", syntax="a1111", negative=None) -> list[str]:
        args = argparse.Namespace(prompt_syntax=syntax, lora=[lora], lora_dir=folder, negative_prompt=negative)
        return sample.with_loras_of(args, prompts)

    assert found("a <lora:style:0.8>", "<lora:style:.8>b") == [f"{given}:1", f"{style}:0.8"]
    assert found("a", negative="<lora:style>") == [f"{given}:1", f"{style}:1.0"]
    assert found("a <lora:lcm:1>", folder=None) == found("a <lora:x:1>", folder=None, syntax="comfy") == [f"{given}:1"]
    for options, message in (
        ({"prompts": ["<lora:stile:0.8>"]}, "<lora:stile:0.8> is not there; --lora and --lora_dir have lcm, style"),
        ({"prompts": ["<lora:lcm:0.5>"]}, "asks for <lora:lcm:0.5>, and the model is loaded with <lora:lcm:1>"),
        ({"prompts": ["<lora:lcm:1>", "b"]}, "prompt=b: asks for other LoRAs than the first prompt"),
        (
            {"prompts": ["a"], "syntax": "comfy"},
            "is for <lora:NAME:WEIGHT> in a1111 prompts; add",
        ),
        ({"prompts": ["a"], "folder": given}, "is no folder"),
    ):
        with pytest.raises(BadArgument, match=message):
            found(*options.pop("prompts"), **options)
    (tmp_path / "style.safetensors").touch()
    with pytest.raises(BadArgument, match="<lora:style:1> is there 2 times"):
        found("<lora:style>", folder=tmp_path)


def test_tags_give_names_and_weights():
    assert loras("a <lora:x y:0.8>, <lora:z>") == {"x y": 0.8, "z": 1.0}


def test_pieces_of_any_text_keep_its_letters():
    """Whatever the brackets, no letter is lost and none appears."""
    for characters in itertools.product("ab()[:\\", repeat=4):
        prompt = "".join(characters)
        for syntax in ("a1111", "comfy"):
            try:
                read = "".join(piece.text for piece in parse(prompt, syntax))
            except LcmError:
                continue
            assert [c for c in read if c in "ab"] == [c for c in prompt if c in "ab"], prompt
