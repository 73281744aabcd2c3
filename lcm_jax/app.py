"""A page on which a model's image follows what is typed.

    python -m lcm_jax.app --model=runs/shapes_lcm/export
    python -m lcm_jax.app --model=BASE --lora=LCM_LORA --control=CANNY_NET
    python -m lcm_jax.app --model=DIR --host=0.0.0.0

It needs Gradio: pip install 'lcm_jax[app]'. Everything is compiled before the page is served. By default it is for this
machine alone; with another --host the address that is printed holds a token, and nothing is answered without it.
"""

import argparse
import functools
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from typing import Any

from lcm_jax.diffusion.timesteps import SPACINGS
from lcm_jax.ending import exit_code
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.page.asked import Asked
from lcm_jax.page.guard import LOOPBACK, Guard
from lcm_jax.page.maker import Maker
from lcm_jax.sampling import flags, like, nag
from lcm_jax.sampling.plan import SAMPLERS, check_steps
from lcm_jax.sampling.prompts import check_syntax
from lcm_jax.sampling.request import check_guidance_scale, check_numbers, check_texts

_SHARED = ("sampler", "spacing", "nag_scale", "prompt_syntax", "emphasis", "clip_skip")
FIXED = (*_SHARED, "height", "width")  # no visitor changes them
PASSED = (*like.MODEL, *like.COMPUTED, *_SHARED, "fsdp")  # in the command line of an image


def parser() -> flags.Parser:
    p = flags.Parser(prog="python -m lcm_jax.app", description=__doc__.splitlines()[0])
    flags.add_model_flags(p)
    flags.add_image_flags(p)
    flags.add_prompt_flags(p)
    p.add_argument("--prompt", default="", help="that the page begins with")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: as of lcm_jax.sample")
    p.add_argument("--spacing", choices=SPACINGS, default="trailing", help="timesteps of ddim and dpm")
    p.add_argument("--steps", type=int, help="that the page begins with; default: --max_steps")
    p.add_argument(
        "--max_steps", type=int, default=4, help="that can be asked for; each number is compiled at the start"
    )
    p.add_argument("--guidance_scale", type=float, help="that the page begins with; default: as of lcm_jax.sample")
    p.add_argument("--seed", type=int, default=0, help="that the page begins with")
    p.add_argument("--control", metavar="NET", help="ControlNet for edges (folder, hub id or .safetensors)")
    p.add_argument("--host", default=LOOPBACK[0], help="address to listen at; 0.0.0.0: all of this machine's")
    p.add_argument("--port", type=int, default=7860, help="0: any that is free")
    return p


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine; who connects early waits. Raises BadArgument."""
    if not 0 <= port < 2**16:
        raise BadArgument("port", port, f"out of range; choose 0 to {2**16 - 1}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()
    except (OSError, UnicodeError) as error:
        where, value = ("host", host) if isinstance(error, UnicodeError | socket.gaierror) else ("port", port)
        raise BadArgument(where, value, f"cannot be listened at ({error}); choose another") from None
    return bound


def address_of(bound: socket.socket, host: str, token: str | None) -> str:
    """What to open in a browser."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{bound.getsockname()[1]}/" + (f"?token={token}" if token else "")


def given_flags(p: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """The flags that `lcm_jax.sample` needs, too, to make the same images."""
    return {name: value for name in PASSED if (value := getattr(args, name)) not in (p.get_default(name), None)}


def run(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Serves the page until it is stopped."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    try:
        import uvicorn

        from lcm_jax.page.layout import make_app
    except ImportError as error:
        raise LcmError(f"the page needs Gradio ({error}): pip install 'lcm_jax[app]'") from None
    check_texts(prompt=args.prompt, negative_prompt=args.negative_prompt)
    check_numbers(args.seed)
    for name in ("max_steps", "steps"):
        if getattr(args, name) is not None:
            check_steps(getattr(args, name))
    check_guidance_scale(args.guidance_scale)
    nag.check_scale(args.nag_scale)
    check_syntax(args.prompt_syntax or "plain", args.emphasis)
    bound = listening(args.host, args.port)
    token = None if args.host in LOOPBACK else secrets.token_urlsafe(32)

    model = flags.load_model(args, args.embedding)
    net = args.control and model.control_net(args.control, args.variant)
    fixed = {name: getattr(args, name) for name in FIXED} | {"prompt_syntax": args.prompt_syntax or "plain"}
    maker = Maker(model, fixed, given_flags(p, args), args.max_steps, net)
    scale = maker.default_scale if args.guidance_scale is None else args.guidance_scale
    start = Asked(args.prompt, args.steps or args.max_steps, scale, args.seed, args.negative_prompt or "")
    maker.request(start)  # what it begins with is something that it can make
    app = Guard(make_app(maker, start), token)
    maker.warm_up(functools.partial(print, flush=True))
    print(f"open {address_of(bound, args.host, token)}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run(sockets=[bound])


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    return exit_code(lambda: run(p, args), "the page is closed", flags.SMALLER)


if __name__ == "__main__":
    sys.exit(main())
