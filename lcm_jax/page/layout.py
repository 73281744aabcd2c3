"""The page of `lcm_jax.app`: its controls, and what they call. The only module that imports Gradio.

No event has a queue, and `always_last` sends the newest values once the answer before is there. All values are texts
and numbers (`guard`); what a visitor wrote is escaped before it is HTML.
"""

import html
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from absl import logging

from lcm_jax.errors import LcmError
from lcm_jax.page import asked
from lcm_jax.page.asked import CANNY, Asked, to_number, to_text
from lcm_jax.page.maker import Maker

TITLE = "lcm_jax"
SMALL = 128  # pixels: images up to this size are shown with sharp pixels
_HERE = Path(__file__).parent
_FONTS = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # of the visitor's machine, not of a server


def make_app(maker: Maker, start: Asked) -> fastapi.FastAPI:
    """The page, which begins with `start`, as an ASGI application; `guard.Guard` belongs in front of it."""
    theme = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", font=_FONTS[0], font_mono=_FONTS[1])
    return gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        _page(maker, start),
        path="/",
        theme=theme,
        css=(_HERE / "page.css").read_text() + ":root {{ --aspect: {1} / {0}; }}".format(*maker.size),
        footer_links=[],
        allowed_paths=[],
        blocked_paths=["/"],
        show_error=False,
        ssr_mode=False,
        pwa=False,
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
    )


def _page(maker: Maker, start: Asked) -> gr.Blocks:
    (height, width), scale = maker.size, start.guidance_scale
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        about = f"{maker.name} · {width} × {height} pixels"
        gr.HTML(f"<h1>{TITLE}</h1><p>{html.escape(about)}</p>", elem_id="title")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=300):
                prompt = gr.Textbox(
                    start.prompt,
                    label="Prompt",
                    lines=2,
                    max_lines=8,
                    autofocus=True,
                    elem_id="prompt",
                    placeholder="Type, and the image follows",
                    max_length=asked.MAX_PROMPT,
                )
                negative = gr.Textbox(
                    start.negative_prompt,
                    label="Negative prompt",
                    visible=maker.takes_negative,
                    max_length=asked.MAX_PROMPT,
                    elem_id="negative",
                )
                with gr.Row():
                    steps = gr.Slider(
                        1,
                        max(maker.max_steps, 2),
                        start.steps,
                        step=1,
                        label="Steps",
                        min_width=200,
                        visible=maker.max_steps > 1,
                        elem_id="steps",
                    )
                    guidance = gr.Slider(
                        1, max(10.0, scale), scale, step=0.1, label="Guidance", min_width=200, elem_id="guidance"
                    )
                with gr.Row():
                    seed = gr.Number(
                        start.seed, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed"
                    )
                    new_seed = gr.Button("New seed", elem_id="new-seed", size="sm", min_width=90, scale=0)
                with gr.Accordion("Start from an image", open=False, elem_id="image"):
                    picker = gr.HTML(
                        "",
                        html_template=(_HERE / "picker.html").read_text(),
                        js_on_load=(_HERE / "picker.js").read_text(),
                        apply_default_css=False,
                        elem_id="picker",
                        width=width,
                        height=height,
                        largest=asked.MAX_FILE,
                    )
                    fault = gr.HTML("", apply_default_css=False, elem_id="fault")
                    uses = [("Change it", "image"), ("Follow its edges", "edges")]
                    use = gr.Radio(uses, value="image", label="The image", visible=maker.net is not None, elem_id="use")
                    strength = gr.Slider(
                        0.05, 1, 0.5, step=0.05, label="Strength", info="How far from the image", elem_id="strength"
                    )
                    control = gr.Slider(
                        0, 2, 1, step=0.05, label="Weight of the edges", visible=False, elem_id="control"
                    )
                    with gr.Row(visible=False) as thresholds:
                        low = gr.Slider(0, 500, CANNY[0], step=1, label="Edges from", min_width=120)
                        high = gr.Slider(0, 500, CANNY[1], step=1, label="Strong edges from", min_width=120)
            with gr.Column(scale=6, min_width=300):
                kind = "small" if max(height, width) <= SMALL else ""
                image = f'<img class="{kind}" alt="The image" src="${{value}}">'
                frame = f'<div class="frame">{image}<span>Write a prompt</span></div>'
                made = gr.HTML("", html_template=frame, apply_default_css=False, elem_id="made")
                said = gr.HTML("", apply_default_css=False, elem_id="said")
        command = gr.Textbox(
            label="The same image on the command line", interactive=False, lines=2, buttons=["copy"], elem_id="command"
        )

        values = [prompt, negative, steps, guidance, seed, picker, use, strength, control, low, high]
        shown = [made, said, command]

        def follow(request: gr.Request, *given: Any) -> list[Any]:
            return _followed(maker, given, request.session_hash or "")

        # preprocess: Gradio would answer values out of range with an error of its own.
        quick = dict(queue=False, preprocess=False, show_progress="hidden", trigger_mode="always_last")
        quick["api_visibility"] = "private"
        moved = [one.input for one in (prompt, negative, steps, guidance, seed, use, strength, control, low, high)]
        gr.on([*moved, picker.input, page.load], follow, values, shown, **quick)
        new_seed.click(None, None, seed, js="() => Math.floor(Math.random() * 2 ** 32)", queue=False).then(
            follow, values, shown, **quick
        )
        picker.upload(lambda uri: _chosen(uri, maker), picker, [picker, fault], **quick).then(
            follow, values, shown, **quick
        )
        use.input(_controls_of, use, [strength, control, thresholds], **quick)
    return page


def _followed(maker: Maker, given: tuple[Any, ...], visitor: str) -> list[Any]:
    """The image, what there is to say of it, and the command line; nothing new for what was overtaken."""
    prompt, negative, steps, scale, seed, kept, use, strength, control, low, high = given
    try:
        if not to_text(prompt, "prompt").strip():
            return ["", "", ""]
        image, mask = asked.read_kept(kept, *maker.size)
        wanted = Asked(
            prompt,
            to_number(steps, "steps", whole=True),
            to_number(scale, "guidance_scale"),
            to_number(seed, "seed", whole=True),
            to_text(negative, "negative_prompt"),
            image,
            mask,
            use,
            to_number(strength, "strength"),
            to_number(control, "control"),
            (to_number(low, "canny"), to_number(high, "canny")),
        )
        made = maker.make(wanted, visitor)
    except LcmError as error:
        return [gr.skip(), _said(error=str(error)), gr.skip()]
    except Exception:
        logging.exception("an image of the page failed")
        return [gr.skip(), _said(error="this image failed; the program's terminal says why"), gr.skip()]
    if made is None:
        return [gr.skip()] * 3
    about = f"{wanted.steps} step{'s' * (wanted.steps > 1)}, {made.seconds * 1e3:.0f} ms"
    return [asked.to_uri(made.image), _said(about, *made.notes), maker.command(wanted)]


def _controls_of(use: str) -> list[Any]:
    """Which controls are there: strength, weight and thresholds."""
    return [gr.update(visible=use == one) for one in ("image", "edges", "edges")]


def _chosen(uri: Any, maker: Maker) -> list[Any]:
    """A chosen image as the page keeps it, or what is wrong with it."""
    try:
        return [asked.fit(uri, *maker.size), ""]
    except LcmError as error:
        return ["", _said(error=str(error))]


def _said(*lines: str, error: str = "") -> str:
    """Lines below the image, as HTML: the first about it, then notes."""
    kinds = ["error"] if error else ["about", *["note"] * (len(lines) - 1)]
    return "".join(
        f'<p class="{kind}">{html.escape(line)}</p>'
        for kind, line in zip(kinds, (error,) if error else lines, strict=True)
    )
