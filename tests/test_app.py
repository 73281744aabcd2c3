"""The page of `lcm_jax.app` in a headless browser: `make test-app`."""

import re
import shlex
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import numpy as np
import pytest
import tiny
from PIL import Image
from test_page import pixels
from test_sampling_control import MIDDLE, save_net

from experiments.page import browser
from lcm_jax import sample
from lcm_jax.page.asked import read_uri

pytestmark = pytest.mark.app

START = "a red circle"


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A one-level LCM of 16 pixels in `model`, a ControlNet for it in `net`, and an image."""
    root = tmp_path_factory.mktemp("app")
    tiny.copy("middle lcm", root / "model")
    save_net(MIDDLE, 10, root / "net")
    Image.fromarray(pixels(1, 48, 64)).save(root / "photo.png")
    return root


@pytest.fixture(scope="module")
def address(micro):
    flags = (f"--model={micro / 'model'}", f"--control={micro / 'net'}", "--max_steps=2", f"--prompt={START}")
    with browser.served(*flags) as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    with browser.browsing() as found:
        yield found


@pytest.fixture
def page(chromium, address):
    with browser.opened(chromium, address) as found:
        browser.wait_for_image(found, START)
        yield found


def shown(page) -> np.ndarray:
    """The image, with the pixels that the server sent."""
    return read_uri(page.locator("#made img").get_attribute("src"), "image")


def command(page) -> str:
    return page.locator("#command textarea").input_value()


def wait_for_flag(page, text: str) -> None:
    page.wait_for_function(
        "(text) => document.querySelector('#command textarea').value.includes(text)", arg=text, timeout=60_000
    )


def test_the_image_follows_what_is_typed(page):
    images = [shown(page)]
    for letter in "s and":
        assert browser.key_times(page, letter) > [0]
        images.append(shown(page))
    assert len(np.unique(np.stack(images), axis=0)) > 1
    assert f"--prompt='{START}s and'" in command(page)


def test_keys_that_were_overtaken_are_not_made(page):
    """All of them at once: the last has its image, and far fewer are asked for than there are letters."""
    before = sum("predict" in url for url in page.asked_for)
    text = " at the left of a small blue square on a black background"
    page.locator("#prompt textarea").click()
    page.keyboard.press("End")
    page.evaluate("window.keyed = performance.now()")
    page.keyboard.type(text, delay=0)
    browser.wait_for_image(page, START + text)
    asked = sum("predict" in url for url in page.asked_for) - before
    assert 1 <= asked < len(text) / 2


def choose_image(page, micro) -> None:
    page.get_by_text("Start from an image").click()
    page.locator("#picker .file").set_input_files(micro / "photo.png")
    wait_for_flag(page, "--image=image.png --strength=0.5")


def draw(page) -> None:
    page.locator("#picker .mask").scroll_into_view_if_needed()
    box = page.locator("#picker .mask").bounding_box()
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.3 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"], steps=4)
    page.mouse.up()


def saved(page, micro, name: str) -> None:
    """Follows the link under which the page saves a file."""
    with page.expect_download() as download:
        page.locator(f"#picker .save-{name}").click()
    assert download.value.suggested_filename == f"{name}.png"
    download.value.save_as(micro / f"{name}.png")


def same_from_the_command_line(page, micro, monkeypatch) -> None:
    """Runs the command line of the page, and compares its file with the page's image."""
    monkeypatch.chdir(micro)
    assert sample.main([*shlex.split(command(page))[3:], "--overwrite"]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(micro / "images" / "0000_0000.png")), shown(page))


def test_an_image_and_a_mask_drawn_by_hand(page, micro, monkeypatch):
    choose_image(page, micro)
    without = shown(page)
    draw(page)
    wait_for_flag(page, "--mask=mask.png")
    assert (shown(page) != without).any()
    saved(page, micro, "image")
    saved(page, micro, "mask")
    mask = np.asarray(Image.open(micro / "mask.png").convert("L"))
    assert mask.shape == (16, 16) and {0, 255} <= set(np.unique(mask)) and (mask > 127).mean() < 0.5
    same_from_the_command_line(page, micro, monkeypatch)
    page.get_by_role("button", name="Clear mask").click()
    page.wait_for_function("!document.querySelector('#command textarea').value.includes('--mask')")
    page.get_by_role("button", name="Remove image").click()
    page.wait_for_function("!document.querySelector('#command textarea').value.includes('--image')")


def test_the_edges_of_an_image_lead(page, micro, monkeypatch):
    choose_image(page, micro)
    page.get_by_label("Follow its edges").check()
    wait_for_flag(page, "--canny=100,200")
    saved(page, micro, "image")
    same_from_the_command_line(page, micro, monkeypatch)


def test_errors_are_messages(page, micro):
    page.locator("#guidance input[type=number]").fill("")
    page.locator("#seed input").fill("")
    page.wait_for_selector("#said .error")
    assert re.match(r"(seed|guidance_scale)=: give a number", page.locator("#said .error").inner_text())
    (micro / "text.png").write_text("no image")
    page.get_by_text("Start from an image").click()
    page.locator("#picker .file").set_input_files(micro / "text.png")
    page.wait_for_selector("#fault .error")
    assert "give one image, such as a PNG or JPEG" in page.locator("#fault .error").inner_text()


def test_nothing_is_loaded_from_elsewhere(page, address):
    assert {urlsplit(url).netloc for url in page.asked_for if not url.startswith("data:")} == {urlsplit(address).netloc}
    assert not [text for text in page.said if "Content Security Policy" in text or "Failed to load" in text]


def status(address: str, path: str, body: bytes | None = None) -> int:
    try:
        return urllib.request.urlopen(urllib.request.Request(address + path, data=body), timeout=60).status
    except urllib.error.HTTPError as error:
        return error.code


def test_gradios_routes_for_files_are_closed(address):
    here = __file__
    assert status(address, "") == 200
    for path in (f"gradio_api/file={here}", "gradio_api/file=http://127.0.0.1/", "gradio_api/proxy=http://127.0.0.1/"):
        assert status(address, path) == 404
    for path in ("gradio_api/upload", "gradio_api/component_server", "gradio_api/queue/join"):
        assert status(address, path, b"{}") == 404
    assert status(address, "gradio_api/run/predict", b'{"data": [{"path": "/etc/passwd"}], "fn_index": 0}') == 400


def test_a_phones_width_is_enough(chromium, address):
    with browser.opened(chromium, address, 375, 740, is_mobile=True, has_touch=True) as page:
        browser.wait_for_image(page, START)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        image, field = page.locator("#made img").bounding_box(), page.locator("#prompt").bounding_box()
        assert image["width"] > 320 and image["y"] < field["y"]


def test_with_another_host_the_address_holds_a_token(chromium, micro):
    flags = (f"--model={micro / 'model'}", "--max_steps=1", f"--prompt={START}", "--host=127.0.0.2")
    with browser.served(*flags) as found:
        plain, _, token = found.partition("?token=")
        assert len(token) > 40
        for path in ("", "config", "assets/", "gradio_api/startup-events"):
            assert status(plain, path) == 401
        assert status(plain, "gradio_api/run/predict", b"{}") == 401
        with browser.opened(chromium, found) as page:
            browser.wait_for_image(page, START)
            assert page.url == plain
