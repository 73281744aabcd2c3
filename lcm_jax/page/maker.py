"""The model of a page: every program compiled before anyone asks, then one image at a time."""

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.page.asked import Asked
from lcm_jax.page.turns import Turns
from lcm_jax.sampling.chunks import truncated
from lcm_jax.sampling.control import Net
from lcm_jax.sampling.generator import Generator
from lcm_jax.sampling.png import not_finite, to_uint8
from lcm_jax.sampling.request import Request, make_request, warnings


@dataclasses.dataclass(frozen=True)
class Made:
    """An image uint8 [H W 3], the seconds that it took, and what there is to say of it, one line each."""

    image: np.ndarray
    seconds: float
    notes: list[str]


class Maker:
    """Makes the images of a page.

    Attributes:
      model: that makes them. name: of it and its LoRAs.
      net: the page's ControlNet, if it has one.
      max_steps: that a visitor can ask for.
      size: height and width of all images.
      default_scale: the guidance scale of the model.
      takes_negative: whether a negative prompt can be asked for.
    """

    def __init__(
        self,
        model: Generator,
        fixed: Mapping[str, Any],
        given: Mapping[str, Any],
        max_steps: int,
        net: Net | None = None,
    ):
        """Compiles nothing yet.

        Args:
          fixed: arguments of `make_request` that no visitor changes.
          given: flags of the program, for command lines, see `Asked.command`.

        Raises:
          BadArgument: a value is wrong, or the model cannot do it.
        """
        self.model, self.net, self.max_steps = model, net, max_steps
        self.name = ", ".join([given["model"], *given.get("lora", ())])
        self._fixed, self._given, self._turns = dict(fixed), dict(given), Turns()
        try:
            request = make_request(model.pipeline, **self._fixed, steps=max_steps)
        except BadArgument as error:
            raise (BadArgument("max_steps", max_steps, error.problem) if error.name == "steps" else error) from None
        self.size = request.height, request.width
        self.default_scale = request.guidance_scale
        self.takes_negative = not model.pipeline.has_w_embedding or request.nag_scale != 1.0

    def warm_up(self, say: Callable[[str], None]) -> None:
        """Compiles what visitors can ask for: each number of steps, with and without an image, one pass and two."""
        for asked in self._kinds():
            start = time.perf_counter()
            request = self.request(asked)
            list(self.model.batches(request, [asked.prompt], 1, asked.seed, 1))
            what = "mask" if asked.mask is not None else "text" if asked.image is None else asked.use
            say(f"compiled {asked.steps} step{'s' * (asked.steps > 1)}, {what}: {time.perf_counter() - start:.1f} s")
        start, reading = time.perf_counter(), request.reading
        for text in self._texts(reading.syntax):
            self.model.encode([text], reading=reading)
        say(f"compiled prompts: {time.perf_counter() - start:.1f} s")

    def make(self, asked: Asked, visitor: str) -> Made | None:
        """The image, or None if a newer request of the visitor came before this one's turn.

        Raises:
          BadArgument: a value is wrong.
          LcmError: the prompt cannot be read, or the image is not finite.
        """
        request = self.request(asked)
        batches = self.model.batches(request, [asked.prompt], 1, asked.seed, 1)
        with self._turns.next(visitor) as mine:
            if not mine:
                return None
            start = time.perf_counter()
            images = next(iter(batches))
            seconds = time.perf_counter() - start
        if not_finite(images):
            raise LcmError("the image is not finite, and would be black; start the page with --dtype=float32")
        return Made(to_uint8(images)[0], seconds, self._notes(asked, request))

    def command(self, asked: Asked) -> str:
        """The command line that makes the same image."""
        return asked.command(self._given, self.net and self.net.source, self.size)

    def request(self, asked: Asked) -> Request:
        """What a visitor asks for, checked. Raises BadArgument: a value is wrong, or the model cannot do it."""
        if not 1 <= asked.steps <= self.max_steps:
            problem = f"out of range; choose 1 to {self.max_steps}, or start the page with a larger --max_steps"
            raise BadArgument("steps", asked.steps, problem)
        height, width = self.size
        return make_request(
            self.model.pipeline, **self._fixed | {"height": height, "width": width} | asked.options(self.net)
        )

    def _kinds(self) -> Iterator[Asked]:
        """A request for each program that a visitor may need."""
        image = np.zeros((*self.size, 3), np.uint8)
        mask = np.zeros(self.size, np.uint8)
        mask[: self.size[0] // 2] = 255
        scales = [self.default_scale] if self.model.pipeline.has_w_embedding else [1.0, 2.0]
        images = [{}, {"image": image}, {"image": image, "mask": mask}]
        if self.net is not None:
            images.append({"image": image, "use": "edges"})
        for steps in range(1, self.max_steps + 1):
            for scale in scales:
                for one in images:
                    yield Asked("warm", steps, scale, strength=1.0, **one)

    def _texts(self, syntax: str) -> list[str]:
        """A prompt for each program that reads one: with an embedding, with weights, with both."""
        embedding = next((name for name in self.model.embeddings if re.fullmatch(r"[\w-]+", name)), None)
        words = (
            ["warm"] if embedding is None else ["warm", f"embedding:{embedding}" if syntax == "comfy" else embedding]
        )
        return words if syntax == "plain" else [*words, *(f"({word}:1.5)" for word in words)]

    def _notes(self, asked: Asked, request: Request) -> list[str]:
        found = warnings(self.model.pipeline, request)
        if request.reading.syntax == "plain":
            for name, text in (("prompt", asked.prompt), ("negative prompt", asked.negative_prompt)):
                for length, kept in truncated(self.model.pipeline, self.model.embeddings, [text]).values():
                    found.append(f"the {name} has {length} tokens, and the last {length - kept} are lost")
        return found
