"""Pictures in rows and columns, each with its caption below it.

A cell is as wide as the widest picture, or MIN_WIDTH, and as high as the highest picture with LINES of text; a picture
is at its cell's top left corner, pixel by pixel as it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lcm_jax.data.report import one_line

MIN_WIDTH = 160  # of a cell, so that a caption has room under a small picture
LINES, LINE_HEIGHT, FONT_SIZE = 3, 14, 11  # of a caption, in pixels
GAP = 6  # between cells
LONGEST = 1000  # characters of a caption that are measured at all
_ELLIPSIS = "…"


def columns_for(count: int) -> int:
    """Of a sheet about as many cells wide as high."""
    return int(np.ceil(np.sqrt(count)))


def corners(shapes: Sequence[tuple[int, int]]) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """(top, left) of each picture of `shapes` (height, width), and the sheet's (height, width); in pixels."""
    high = max(height for height, _ in shapes) + LINES * LINE_HEIGHT + GAP
    wide = max(MIN_WIDTH, *(width for _, width in shapes)) + GAP
    columns = columns_for(len(shapes))
    rows = -(-len(shapes) // columns)
    places = [(GAP + number // columns * high, GAP + number % columns * wide) for number in range(len(shapes))]
    return places, (GAP + rows * high, GAP + columns * wide)


def draw(pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Image.Image:
    """The sheet of uint8 [h w 3] pictures, which may differ in size, and their captions."""
    shapes = [picture.shape[:2] for picture in pictures]
    places, (height, width) = corners(shapes)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    room = max(MIN_WIDTH, *(shape[1] for shape in shapes))
    for picture, caption, shape, (top, left) in zip(pictures, captions, shapes, places, strict=True):
        for number, line in enumerate(wrapped(caption, font, room)):
            pen.text((left, top + shape[0] + number * LINE_HEIGHT), line, "black", font)
        sheet.paste(Image.fromarray(picture), (left, top))
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most LINES lines, none wider than `width` pixels; the last one ends in an ellipsis if the text goes on."""
    rest, lines = one_line(text, LONGEST), []
    while rest and len(lines) < LINES:
        end = _fitting(rest, font, width)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + _ELLIPSIS) > width:
            last = last[:-1].rstrip()
        lines[-1] = last + _ELLIPSIS
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many characters fit, at least 1: to the end of a word, or within a word that is too long for a line."""
    end = len(text)
    if font.getlength(text) > width:
        low, end = 1, len(text)  # low fits, end does not
        while end - low > 1:
            middle = (low + end) // 2
            low, end = (middle, end) if font.getlength(text[:middle]) <= width else (low, middle)
        end = low
        if not text[end].isspace() and " " in text[:end]:
            end = text[:end].rindex(" ")
    return end
