"""What a visitor of the page asks for, checked: as arguments of `make_request`, and as a command line.

Images come as data URIs, the bytes themselves: a visitor names no files. The page keeps what `fit` made of an image, in
the size of the model's, and sends it again with each request, so the server remembers nothing of a visitor.
"""

import base64
import dataclasses
import io
import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from lcm_jax.data import images
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.sampling import like
from lcm_jax.sampling.control import Control, Net
from lcm_jax.sampling.image import fitted, read_image
from lcm_jax.sampling.request import check_numbers, check_texts

MAX_FILE = 2**24  # bytes of an image
MAX_SIDE = 4096  # pixels
MAX_PROMPT = 2000  # characters
CANNY = (100.0, 200.0)
USES = ("image", "edges")  # of an image: image to image, or to follow its edges with a ControlNet
IMAGE, MASK = "image.png", "mask.png"  # names under which the page saves what a command line reads
_PREFIX, _BASE64 = "data:", ";base64,"


@dataclasses.dataclass(frozen=True)
class Asked:
    """A visitor's request.

    Attributes:
      prompt, negative_prompt, steps, guidance_scale, seed: as `Generator` takes them.
      image: uint8 [H W 3]; None: from noise alone.
      mask: uint8 [H W], white where the image is repainted; None: everywhere.
      use: of the image, one of `USES`.
      strength: of image to image, (0, 1].
      control_scale: of the ControlNet. canny: thresholds of its edges.
    """

    prompt: str
    steps: int = 4
    guidance_scale: float = 1.0
    seed: int = 0
    negative_prompt: str = ""
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    use: str = "image"
    strength: float = 0.5
    control_scale: float = 1.0
    canny: tuple[float, float] = CANNY

    def __post_init__(self):
        """Raises BadArgument for what no model can do; the rest is for `make_request`."""
        check_texts(prompt=self.prompt, negative_prompt=self.negative_prompt)
        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(self, name))) > MAX_PROMPT:
                raise BadArgument(
                    name, f"{getattr(self, name)[:40]}...", f"has {length} characters; write at most {MAX_PROMPT}"
                )
        check_numbers(self.seed)
        if self.use not in USES:
            raise BadArgument("use", self.use, f"choose one of {', '.join(USES)}")

    def options(self, net: Net | None) -> dict[str, Any]:
        """Arguments of `make_request`, with the page's ControlNet."""
        found = {"steps": self.steps, "guidance_scale": self.guidance_scale}
        if self.negative_prompt:
            found["negative_prompt"] = self.negative_prompt
        if self.image is None:
            return found
        if self.use == "edges":
            if net is None:
                raise BadArgument("use", self.use, "the page has no ControlNet; start it with --control=NET")
            return found | {"control": [Control(net, self.image, self.control_scale, canny=self.canny)]}
        masked = {} if self.mask is None else {"mask": self.mask}
        return found | {"image": self.image, "strength": self.strength} | masked

    def command(self, given: Mapping[str, Any], net: str | None, size: tuple[int, int]) -> str:
        """The command line that makes the same image, from files that the page saves.

        Args:
          given: flags of the program that `lcm_jax.sample` has, too: the model's, sampler, dtype.
          net: name of the ControlNet.
          size: height and width of the image.
        """
        flags = {**given, "prompt": self.prompt, "steps": self.steps, "guidance_scale": self.guidance_scale}
        if self.negative_prompt:
            flags["negative_prompt"] = self.negative_prompt
        flags |= {"seed": self.seed, "num_images": 1, "height": size[0], "width": size[1]}
        if self.image is not None and self.use == "edges":
            low, high = map(_text, self.canny)
            flags |= {"control": f"{net}:{IMAGE}:{_text(self.control_scale)}", "canny": f"{low},{high}"}
        elif self.image is not None:
            flags |= {"image": IMAGE, "strength": self.strength}
            flags |= {} if self.mask is None else {"mask": MASK}
        flags = {name: one if isinstance(one, list) else _text(one) for name, one in flags.items()} | {"out": "images"}
        words = [word.partition("=") for word in like.words(flags)]
        quoted = [f"{name}={shlex.quote(value)}" if equals else name for name, equals, value in words]
        return " ".join(["python -m lcm_jax.sample", *quoted])


def _text(value: Any) -> str:
    """A value as a word: 8.0 is "8"."""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def read_uri(uri: Any, name: str) -> np.ndarray:
    """The image of a data URI, uint8 [h w 3].

    Raises:
      BadArgument: it is none, of more than MAX_FILE bytes or MAX_SIDE pixels, or no image.
    """
    if not isinstance(uri, str) or not uri.startswith(_PREFIX) or _BASE64 not in uri[:100]:
        raise BadArgument(name, "(not an image)", "give an image file, such as a PNG or JPEG")
    content = uri[uri.index(_BASE64) + len(_BASE64) :]
    size = f"({len(content) * 3 // 4} bytes)"
    if len(content) * 3 // 4 > MAX_FILE:
        raise BadArgument(name, size, f"is too large; give an image of at most {MAX_FILE // 2**20} MiB")
    try:
        data = base64.b64decode(content, validate=True)
        height, width = images.header_size(data)
        if max(height, width) > MAX_SIDE:
            raise LcmError(f"has {width} x {height} pixels, at most {MAX_SIDE} on a side are taken")
        return images.decode(data)
    except (LcmError, ValueError) as error:
        raise BadArgument(name, size, f"{error}; give one image, such as a PNG or JPEG") from None


def to_uri(image: np.ndarray) -> str:
    """uint8 [h w] or [h w 3] -> data URI of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def fit(uri: Any, height: int, width: int) -> str:
    """An image that a visitor chose, as the page keeps it: a PNG of this size, cut off evenly. Raises BadArgument."""
    return to_uri(fitted(read_image(read_uri(uri, "image"), "image", smallest=1), height, width, "crop"))


def read_kept(kept: Any, height: int, width: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What the page keeps, "", "IMAGE" or "IMAGE MASK" -> uint8 [height width 3] and [height width], or None.

    Raises:
      BadArgument: it is not what `fit` made, and a mask of its size.
    """
    found = []
    for uri, name in zip(to_text(kept, "image").split(" ", 1) if kept else (), ("image", "mask"), strict=False):
        one = read_uri(uri, name)
        if one.shape[:2] != (height, width):
            size = f"{one.shape[1]} x {one.shape[0]}"
            raise BadArgument(name, size, f"the page makes {width} x {height}; choose the image again")
        found.append(one)
    image, mask = (*found, None, None)[:2]
    return image, None if mask is None else mask[:, :, 0]


def to_number(value: Any, name: str, whole: bool = False) -> float | int:
    """A number that a visitor typed. Raises BadArgument if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise BadArgument(name, "" if value is None else str(value)[:40], "give a number")
    if whole and value != int(value):
        raise BadArgument(name, value, "give a whole number")
    return int(value) if whole else float(value)


def to_text(value: Any, name: str) -> str:
    """What a visitor wrote. Raises BadArgument if it is no text."""
    if value is not None and not isinstance(value, str):
        raise BadArgument(name, str(value)[:40], "give a text")
    return value or ""
