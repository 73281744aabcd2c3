"""The page of `lcm_jax.app` in a headless browser: its server, a browser of this machine, and keys that are typed."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcm_jax.errors import LcmError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OVERRIDE = "LCM_JAX_BROWSER"
PROMPT = "a large red star at the left on a white background"
# Resolves with the milliseconds from the key's own time to the frame that shows its image: all that an answer brings is
# shown at once, and the command line names the prompt.
_WAIT = """(prompt) => new Promise((done) => {
  const image = document.querySelector("#made img"), command = document.querySelector("#command textarea");
  const look = () => command.value.includes(`--prompt='${prompt}'`) && image.complete
    ? requestAnimationFrame(() => done(performance.now() - window.keyed)) : setTimeout(look, 4);
  look();
})"""
_KEYED = """document.addEventListener("keydown", (event) => { window.keyed = event.timeStamp; }, true)"""


def find_browser(playwright: Any) -> str:
    """The program of a Chromium or Chrome: $LCM_JAX_BROWSER, one on the path, or playwright's own.

    Raises:
      LcmError: there is none; it says what to install.
    """
    found = [os.environ.get(OVERRIDE), *map(shutil.which, NAMES), playwright.chromium.executable_path]
    for one in filter(None, found):
        if Path(one).exists():
            return one
    raise LcmError(
        f"no browser; run apt-get install chromium, or playwright install chromium, or name one in ${OVERRIDE}"
    )


@contextlib.contextmanager
def served(*flags: str, seconds: float = 1800) -> Iterator[str]:
    """The address of a page of `lcm_jax.app`, in a process of its own. Raises LcmError if it ends before it serves."""
    command = [sys.executable, "-m", "lcm_jax.app", "--port=0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        late = time.monotonic() + seconds
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if found := re.match(r"open (\S+)", line):
                yield found[1]
                break
            if time.monotonic() > late:
                raise LcmError(f"no page after {seconds:.0f} s")
        else:
            raise LcmError(f"{' '.join(command)} ended with exit code {process.wait()}")
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def browsing() -> Iterator[Any]:
    """A headless browser, of playwright. Raises LcmError if there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise LcmError("a browser needs playwright: pip install 'lcm_jax[app,test-app]'") from None
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as in most containers; the page is ours.
        browser = playwright.chromium.launch(executable_path=find_browser(playwright), args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int = 1280, height: int = 860, **options: Any) -> Iterator[Any]:
    """A page of a browser at an address. `asked_for` has the addresses that it loads, `said` its console's lines.

    options: of playwright's context, such as is_mobile and has_touch.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    try:
        page = context.new_page()
        page.asked_for, page.said = [], []
        page.on("request", lambda request: page.asked_for.append(request.url))
        page.on("console", lambda message: page.said.append(message.text))
        page.add_init_script(_KEYED)
        page.goto(address)
        page.wait_for_selector("#prompt textarea", timeout=60_000)
        yield page
    finally:
        context.close()


def wait_for_image(page: Any, prompt: str, seconds: float = 60) -> None:
    """Returns when the page shows the image of this prompt."""
    page.wait_for_function(
        "(prompt) => document.querySelector('#command textarea').value.includes(`--prompt='${prompt}'`)"
        " && document.querySelector('#made img').complete",
        arg=prompt,
        timeout=seconds * 1e3,
    )


def key_times(page: Any, text: str, pause: float = 0.05) -> list[float]:
    """Types `text`, letters and spaces, after the prompt: milliseconds from each key to its image.

    pause: seconds after an image until the next key.
    """
    field, times = page.locator("#prompt textarea"), []
    field.click()
    page.keyboard.press("End")
    for character in text:
        prompt = field.input_value() + character
        page.keyboard.press(character if character != " " else "Space")
        times.append(page.evaluate(_WAIT, prompt))
        time.sleep(pause)
    return times
