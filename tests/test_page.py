"""The page of `lcm_jax.app` without a browser: who is next, what is refused, and the command line of an image."""

import asyncio
import base64
import builtins
import dataclasses
import json
import shlex
import threading
import time
from unittest import mock

import numpy as np
import pytest
import tiny
from PIL import Image
from test_sample import RECORD, compilations
from test_sampling_control import MIDDLE, save_net

from lcm_jax import app, pretrained, sample
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.page import asked as asked_lib
from lcm_jax.page import guard
from lcm_jax.page.asked import Asked, fit, read_kept, read_uri, to_number, to_uri
from lcm_jax.page.maker import Maker
from lcm_jax.page.turns import Turns
from lcm_jax.pretrained.embeddings import Embedding
from lcm_jax.sampling.chunks import chunked
from lcm_jax.sampling.load import load

SIZE = (16, 16)


def pixels(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A one-level LCM in `model`, and a ControlNet for it in `net`."""
    root = tmp_path_factory.mktemp("page")
    tiny.copy("middle lcm", root / "model")
    tiny.write_json(root / "model" / pretrained.RECORD, RECORD)
    save_net(MIDDLE, 10, root / "net")
    return root


@pytest.fixture(scope="module")
def maker(micro) -> Maker:
    """With two steps at most, compiled."""
    model, given = load(micro / "model"), {"model": str(micro / "model")}
    found = Maker(model, {}, given, 2, model.control_net(micro / "net"))
    found.warm_up(lambda line: None)
    return found


# ---- who is next -----------------------------------------------------------------------------------------------------


def run(turns: Turns, visitor: str, name: str, done: list, until: threading.Event | None = None) -> threading.Thread:
    """A request in a thread; adds (name, whether it had its turn) to `done`."""

    def request():
        with turns.next(visitor) as mine:
            if mine and until is not None:
                until.wait(10)
            done.append((name, mine))

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    return thread


def until(condition) -> None:
    late = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < late
        time.sleep(0.001)


def test_of_a_visitor_only_the_newest_request_that_waits_has_a_turn():
    turns, done, end = Turns(), [], threading.Event()
    threads = [run(turns, "a", "running", done, end)]
    until(lambda: turns._busy)
    for dropped, name in enumerate(("first", "second", "third")):
        threads.append(run(turns, "a", name, done))
        until(lambda n=dropped: turns.waiting() == 1 and len(done) == n)  # the one before is dropped at once
    assert done == [("first", False), ("second", False)]
    end.set()
    for thread in threads:
        thread.join(10)
    assert done[2:] == [("running", True), ("third", True)]
    assert turns.waiting() == 0 and not turns._busy


def test_visitors_take_turns_and_do_not_overtake_each_other():
    turns, done, end = Turns(), [], threading.Event()
    threads = [run(turns, "a", "running", done, end)]
    until(lambda: turns._busy)
    for n, visitor in enumerate("bca", 1):
        threads.append(run(turns, visitor, visitor, done))
        until(lambda n=n: turns.waiting() == n)
    end.set()
    for thread in threads:
        thread.join(10)
    assert done == [("running", True), ("b", True), ("c", True), ("a", True)]


def test_a_request_that_fails_gives_up_its_turn():
    turns, done = Turns(), []
    with pytest.raises(KeyError), turns.next("a"):
        raise KeyError
    run(turns, "b", "after", done).join(10)
    assert done == [("after", True)]


# ---- images and their command line -----------------------------------------------------------------------------------

MASK = np.zeros((16, 16), np.uint8)
MASK[3:9, 4:12] = 255
ASKED = {
    "text": Asked('it\'s a "red" $circle; `ls` | 2', 2, 7.5, seed=3),
    "image": Asked("a red circle", 2, 4.0, image=pixels(1), strength=0.35),
    "mask": Asked("a red circle", 2, 4.0, image=pixels(1), mask=MASK, strength=0.8),
    "edges": Asked("a red circle", 1, 8.0, 2**32 - 1, image=pixels(2), use="edges", control_scale=0.7, canny=(50, 90)),
}


@pytest.mark.parametrize("kind", ASKED)
def test_the_command_line_makes_the_same_image(maker, kind, tmp_path, monkeypatch):
    wanted = ASKED[kind]
    made, command = maker.make(wanted, "a"), maker.command(wanted)
    monkeypatch.chdir(tmp_path)
    if wanted.image is not None:
        Image.fromarray(wanted.image).save(tmp_path / asked_lib.IMAGE)
    if wanted.mask is not None:
        Image.fromarray(wanted.mask).save(tmp_path / asked_lib.MASK)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "lcm_jax.sample"]
    assert sample.main(words[3:]) == 0
    image = Image.open(tmp_path / "images" / "0000_0000.png")
    np.testing.assert_array_equal(np.asarray(image), made.image)
    assert image.text["prompt"] == wanted.prompt


def test_flags_of_the_program_are_in_the_command_line(micro):
    p = app.parser()
    args = p.parse_args([f"--model={micro}", "--lora=a:0.5", "--lora=b c", "--sampler=ddim", "--tiled", "--height=32"])
    given = app.given_flags(p, args)
    command = Asked("a").command(given, None, (32, 16))
    read = sample.parser().parse_args(shlex.split(command)[3:])
    assert (read.lora, read.sampler, read.tiled) == (["a:0.5", "b c"], "ddim", True)
    assert (read.height, read.width, read.num_images) == (32, 16, 1)


def test_the_sampler_is_the_models_own_on_the_page_and_in_its_command_line(micro):
    """A phased map is sampled with tcd by both: the command line makes the image of the page."""
    p = app.parser()
    args, model = p.parse_args([f"--model={micro / 'model'}"]), load(micro / "model")
    model.pipeline = dataclasses.replace(model.pipeline, record={**RECORD, "phases": 2, "map": "phased"})
    made = Maker(model, {name: getattr(args, name) for name in ("sampler", "spacing")}, {"model": "a"}, 2)
    assert made.request(Asked("a", 2)).settings.sampler == "tcd"
    assert "sampler" not in app.given_flags(p, args)


def test_a_negative_prompt_needs_guidance_that_the_model_has(micro):
    """An LCM with w embedding takes one with --nag_scale, which the command line passes on."""
    p, model = app.parser(), load(micro / "model")
    given = app.given_flags(p, p.parse_args(["--model=a", "--nag_scale=3"]))
    wanted = Asked("a", 1, 4.0, negative_prompt="b")
    without, guided = (Maker(model, fixed, given, 1) for fixed in ({}, {"nag_scale": 3.0}))
    assert (without.takes_negative, guided.takes_negative) == (False, True)
    with pytest.raises(BadArgument, match="negative_prompt=b: this UNet has a w embedding.*add nag_scale=3"):
        without.request(wanted)
    request = guided.request(wanted)
    assert (request.nag_scale, request.negative_prompt) == (3.0, "b")
    assert "nag_scale" in app.FIXED and " --nag_scale=3 " in guided.command(wanted)


def test_nothing_compiles_after_the_warm_up(maker):
    with compilations() as compiled:
        for wanted in ASKED.values():
            for steps in (1, 2):
                maker.make(Asked(**{**vars(wanted), "steps": steps, "guidance_scale": 3.3, "prompt": "b"}), "a")
    assert compiled == []


@pytest.mark.parametrize(
    ("syntax", "texts"),
    [
        ("plain", ["warm", "star"]),
        ("a1111", ["warm", "star", "(warm:1.5)", "(star:1.5)"]),
        ("comfy", ["warm", "embedding:star", "(warm:1.5)", "(embedding:star:1.5)"]),
    ],
)
def test_prompts_with_weights_and_embeddings_are_compiled_too(micro, syntax, texts, monkeypatch):
    model, seen = load(micro / "model"), []
    width = model.pipeline.text_encoder.hidden_size
    model.embeddings = {"star": Embedding("Star", {"text_encoder": np.ones((2, width), np.float32)})}
    monkeypatch.setattr(model, "batches", lambda *_: iter(()))
    monkeypatch.setattr(model, "encode", lambda captions, reading: seen.append((*captions, reading)))
    maker = Maker(model, {"prompt_syntax": syntax}, {"model": "a"}, 1)
    maker.warm_up(lambda line: None)
    assert [text for text, _ in seen] == texts
    for n, (text, reading) in enumerate(seen):
        found = chunked(model.pipeline, model.embeddings, [text], reading)
        assert ((found.spliced is not None), (found.weights is not None)) == (n % 2 == 1, n > 1)


def test_more_steps_than_were_compiled_are_refused(maker):
    with pytest.raises(BadArgument, match="steps=3: out of range; choose 1 to 2, or start the page with a larger"):
        maker.make(Asked("a", 3), "a")


def test_notes_for_a_visitor(maker):
    assert maker.make(Asked("red " * 100, 1, 8.0), "a").notes == ["the prompt has 102 tokens, and the last 25 are lost"]
    assert "outside" in maker.make(Asked("a", 1, 30.0), "a").notes[0]
    negative = Asked("a", 1, 8.0, negative_prompt="red " * 100)
    notes = maker._notes(negative, maker.request(Asked("a", 1, 8.0)))
    assert notes == ["the negative prompt has 102 tokens, and the last 25 are lost"]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "a" * 2001}, "has 2001 characters; write at most 2000"),
        ({"prompt": "\ud800"}, "is not UTF-8"),
        ({"seed": 2**32}, "seed=4294967296: out of range"),
        ({"use": "both"}, "choose one of image, edges"),
    ],
)
def test_values_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(BadArgument, match=message):
        Asked(**{"prompt": "a", **wrong})


@pytest.mark.parametrize("value", [None, "", "1", True, float("nan"), float("inf"), 10**400, [1], 1.5])
def test_numbers_are_numbers(value):
    with pytest.raises(BadArgument, match="^steps="):
        to_number(value, "steps", whole=True)


def test_edges_need_a_net(micro):
    with pytest.raises(BadArgument, match="start it with --control=NET"):
        Asked("a", image=pixels(1), use="edges").options(None)


def test_a_chosen_image_is_kept_in_the_size_of_the_page():
    kept = fit(to_uri(pixels(1, 40, 60)), 16, 16)
    image, mask = read_kept(kept, 16, 16)
    assert image.shape == (16, 16, 3) and mask is None
    assert fit(kept, 16, 16) == kept
    drawn = np.zeros((16, 16), np.uint8)
    drawn[4:8] = 255
    image, mask = read_kept(f"{kept} {to_uri(drawn)}", 16, 16)
    np.testing.assert_array_equal(mask, drawn)
    assert read_kept("", 16, 16) == (None, None)
    with pytest.raises(BadArgument, match="image=16 x 16: the page makes 32 x 32; choose the image again"):
        read_kept(kept, 32, 32)


PATHS = ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/", "data:image/png,x", {"path": "/etc/passwd"}, 7]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_no_image_is_read_from_a_name(path):
    with pytest.raises(BadArgument, match="give an image file"):
        read_uri(path, "image")


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (uri(b"GIF89a nothing"), "give one image, such as a PNG or JPEG"),
        ("data:image/png;base64,#!", "give one image"),
        (to_uri(np.zeros((1, 4097), np.uint8)), "has 4097 x 1 pixels, at most 4096"),
        (uri(bytes(2**24 + 2)), "is too large; give an image of at most 16 MiB"),
    ],
    ids=["no image", "no base64", "wide", "large"],
)
def test_images_that_cannot_be_used(found, message):
    with pytest.raises(BadArgument, match=message) as error:
        read_uri(found, "image")
    assert len(str(error.value)) < 200


# ---- what the server answers ----------------------------------------------------------------------------------------


def answer(app, method="GET", path="/", query="", body=b"", **headers) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of an ASGI application's answer."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    headers = {"host": "127.0.0.1:7860", **({"content-length": str(len(body))} if method == "POST" else {}), **headers}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items() if value],
    }
    sent, given = [], [{"type": "http.request", "body": body[:3], "more_body": True}, {"body": body[3:]}]

    async def receive():
        return given.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], start, b"".join(message.get("body", b"") for message in sent[1:])


async def behind(scope, receive, send):
    """Answers 200 with the body that it was sent."""
    body = (await receive())["body"] if scope["method"] == "POST" else b""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


PREDICT = "/gradio_api/run/predict"
VALUES = json.dumps({"data": ["a", 1, 2.5, None, True], "fn_index": 0}).encode()


def test_the_routes_of_the_page_alone_are_there():
    here = guard.Guard(behind)
    for path in ("/", "/config", "/theme.css", "/assets/index.js", "/static/fonts/a.woff2"):
        assert answer(here, path=path)[0] == 200
    assert answer(here, "POST", PREDICT, body=VALUES)[::2] == (200, VALUES)
    closed = [
        "file=/etc/passwd",
        "file/etc/passwd",
        "proxy=http://a",
        "upload",
        "queue/join",
        "component_server",
        "info",
    ]
    for path in [
        *(f"/gradio_api/{one}" for one in closed),
        "/monitoring",
        "/login",
        "/docs",
        "/assets/",
        "//",
        PREDICT,
    ]:
        assert answer(here, path=path)[0] == 404, path
    assert answer(here, "POST", "/gradio_api/upload", body=VALUES)[0] == 404


def test_no_other_host_is_loaded_from():
    assert "default-src 'self'" in answer(guard.Guard(behind))[1]["content-security-policy"]


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:7860", 200), ("[::1]:7860", 200), ("127.0.0.1", 200), ("evil.example", 403), ("127.0.0.1.evil", 403),
     ("", 403), ("[", 403)],
)  # fmt: skip
def test_without_a_token_only_this_machine_is_answered(host, status):
    assert answer(guard.Guard(behind), host=host)[0] == status


@pytest.mark.parametrize(
    ("origin", "status"), [("http://127.0.0.1:7860", 200), ("http://evil.example", 403), ("null", 403)]
)
def test_other_pages_cannot_send_requests(origin, status):
    assert answer(guard.Guard(behind), "POST", PREDICT, body=VALUES, origin=origin)[0] == status


def test_every_route_needs_the_token():
    there = guard.Guard(behind, "secret")
    for path in ("/", "/config", "/assets/index.js", "/nowhere"):
        assert answer(there, path=path, host="there:1")[0] == 401
        assert answer(there, path=path, cookie=f"{there.cookie}=secre")[0] == 401
        assert answer(there, path=path, query="token=Secret")[0] == 401
    assert answer(there, "POST", PREDICT, body=VALUES)[0] == 401
    status, headers, _ = answer(there, query="token=secret")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"] and "SameSite=Strict" in headers["set-cookie"]
    cookie = headers["set-cookie"].split(";")[0]
    assert answer(there, "POST", PREDICT, body=VALUES, cookie=cookie, host="there:1")[0] == 200
    assert answer(there, cookie=f"{there.cookie}=é;;=")[0] == 401
    beside = guard.Guard(behind, "other")  # on another port of the same host
    both = f"{cookie}; {beside.cookie}=other"
    assert [answer(one, cookie=both, host="there:1")[0] for one in (there, beside)] == [200, 200]


def test_the_token_is_compared_in_constant_time():
    with mock.patch.object(guard.hmac, "compare_digest", return_value=True) as compared:
        there = guard.Guard(behind, "secret")
        assert answer(there, cookie=f"{there.cookie}=other")[0] == 200
    compared.assert_called_once_with(b"other", b"secret")


@pytest.mark.parametrize(
    "values",
    [
        [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        [{"path": "http://127.0.0.1/", "meta": {"_type": "gradio.FileData"}}],
        [["/etc/passwd"]],
        "a",
    ],
)
def test_values_are_texts_and_numbers(values):
    assert answer(guard.Guard(behind), "POST", PREDICT, body=json.dumps({"data": values}).encode())[0] == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b"[" * 100_000, b"\xff"])
def test_a_body_is_json(body):
    assert answer(guard.Guard(behind), "POST", PREDICT, body=body)[0] == 400


def test_large_bodies_are_not_read():
    here = guard.Guard(behind)
    assert answer(here, "POST", PREDICT, body=VALUES, content_length=str(2**25 + 1))[0] == 413
    assert answer(here, "POST", PREDICT, body=VALUES, content_length="9" * 5000)[0] == 413
    assert answer(here, "POST", PREDICT, body=VALUES, content_length="")[0] == 411
    assert answer(here, "POST", PREDICT, body=VALUES, transfer_encoding="chunked")[0] == 411


# ---- the program ----------------------------------------------------------------------------------------------------


def test_without_gradio_it_names_the_extra(micro, capsys, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("gradio", "uvicorn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert app.main([f"--model={micro / 'model'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the page needs Gradio") and "pip install 'lcm_jax[app]'" in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken_is_refused():
    with app.listening("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert app.address_of(bound, "127.0.0.1", None) == f"http://127.0.0.1:{port}/"
        with pytest.raises(BadArgument, match=f"port={port}: cannot be listened at"):
            app.listening("127.0.0.1", port)
    with pytest.raises(BadArgument, match="host=no host: cannot be listened at"):
        app.listening("no host", 0)
    with pytest.raises(BadArgument, match="port=65536: out of range"):
        app.listening("127.0.0.1", 65536)


def test_the_most_steps_are_those_that_the_model_has(maker):
    with pytest.raises(LcmError, match="max_steps=51"):
        Maker(maker.model, {}, {"model": "a"}, 51)


# ---- the page, with Gradio -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layout():
    pytest.importorskip("gradio")
    from lcm_jax.page import layout

    return layout


def given(**changes) -> tuple:
    names = ("prompt", "negative", "steps", "scale", "seed", "kept", "use", "strength", "control", "low", "high")
    return tuple(
        {**dict.fromkeys(names, 1), "prompt": "a", "negative": "", "kept": "", "use": "image", **changes}[n]
        for n in names
    )


def test_an_error_is_a_message_below_the_image(layout, maker):
    image, said, command = layout._followed(maker, given(steps=9), "a")
    assert (
        said == '<p class="error">steps=9: out of range; choose 1 to 2, or start the page with a larger --max_steps</p>'
    )
    assert "value" not in image and "value" not in command  # as they are
    with mock.patch.object(maker.model, "batches", side_effect=RuntimeError("secret")):
        said = layout._followed(maker, given(), "a")[1]
    assert said.startswith('<p class="error">this image failed; ') and "secret" not in said


@pytest.mark.parametrize("wrong", [{"prompt": 7}, {"negative": True}, {"kept": 7}, {"use": 7}, {"steps": "7"}], ids=str)
def test_values_of_another_type_are_messages(layout, maker, wrong):
    assert layout._followed(maker, given(**wrong), "a")[1].startswith('<p class="error">')


def test_what_a_visitor_wrote_is_no_html(layout, maker):
    said = layout._followed(maker, given(use="<b>"), "a")[1]
    assert said.startswith('<p class="error">use=&lt;b&gt;: choose one of image, edges')


def test_a_page_makes_an_image(layout, maker):
    image, said, command = layout._followed(maker, given(scale=8), "a")
    np.testing.assert_array_equal(read_uri(image, "image"), maker.make(Asked("a", 1, 8.0, 1), "a").image)
    assert "1 step, " in said and "--prompt=a --steps=1 --guidance_scale=8 --seed=1" in command
    assert layout._followed(maker, given(prompt=" "), "a") == ["", "", ""]


def test_a_chosen_image_that_is_none_is_reported(layout, maker):
    kept, fault = layout._chosen("/etc/passwd", maker)
    assert kept == "" and "give an image file" in fault
