"""Lakes under a coloured sky, one for each prompt and variant, with the prompt written on them.

Every choice is drawn from the prompt and the variant, so the same ones give the same picture.
Needs pillow, and is imported only when the first picture is drawn.
"""

from __future__ import annotations

import io
import math
import random
import textwrap
import unicodedata
from contextlib import suppress
from functools import lru_cache

from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont, ImageOps

__all__ = ["draw_picture"]

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "AppleSDGothicNeo.ttc",
    "malgun.ttf",
    "msyh.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)
"""Fonts that pillow may find by name, for letters its own font lacks."""
_RIDGES = 5


def draw_picture(prompt: str, size: tuple[int, int], variant: int) -> bytes:
    """A PNG of exactly *size* for *prompt*; each *variant*, from 1, is another picture."""
    chance = random.Random(  # noqa: S311 - a drawing
        f"{variant}:{prompt}".encode("utf-8", "surrogatepass")
    )
    scene = _landscape(size, chance)
    write_caption(scene, prompt)
    file = io.BytesIO()
    scene.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _landscape(size: tuple[int, int], chance: random.Random) -> Image.Image:
    """Sky, sun and ridges, and a lake that mirrors them."""
    width, height = size
    hue = chance.randrange(190, 350)
    shore = height * 2 // 3
    # Drawn at twice the size, so that edges become smooth.
    land = _gradient(_colour(hue, 45, 25), _colour(hue + 70, 85, 78), (2 * width, 2 * shore))
    _add_sun(land, _colour(hue + 70, 95, 92), chance)
    for ridge in range(_RIDGES):
        _add_ridge(land, ridge / (_RIDGES - 1), hue, chance)
    land = land.reduce(2)
    lake = ImageOps.flip(land).resize((width, height - shore)).filter(ImageFilter.BoxBlur(3))
    scene = Image.new("RGB", size)
    scene.paste(land)
    scene.paste(
        Image.blend(lake, Image.new("RGB", lake.size, _colour(hue, 50, 12)), 0.4), (0, shore)
    )
    return scene


def _colour(hue: int, saturation: int, lightness: int) -> tuple[int, ...]:
    return ImageColor.getrgb(f"hsl({hue % 360},{saturation}%,{lightness}%)")


def _gradient(top: tuple[int, ...], foot: tuple[int, ...], size: tuple[int, int]) -> Image.Image:
    return ImageOps.colorize(Image.linear_gradient("L"), top, foot).resize(size)


def _add_sun(land: Image.Image, light: tuple[int, ...], chance: random.Random) -> None:
    side = min(land.size)
    x, y = chance.uniform(0.2, 0.8) * land.width, chance.uniform(0.2, 0.5) * land.height
    # The gradient is 0 in the middle and 255 at the corners.
    glow = Image.radial_gradient("L").point([max(0, 128 - v) ** 2 // 90 for v in range(256)])
    corner = round(x - side / 2), round(y - side / 2)
    land.paste(light, corner, glow.resize((side, side), Image.Resampling.BICUBIC))
    ImageDraw.Draw(land).circle((x, y), side / 18, fill=light)


def _add_ridge(land: Image.Image, depth: float, hue: int, chance: random.Random) -> None:
    """A range of hills; *depth* goes from 0, far and pale, to 1, near and dark."""
    base, tall = (0.55 + 0.4 * depth) * land.height, (0.12 - 0.05 * depth) * land.height
    waves = [
        (tall / rank, rank * chance.uniform(3, 6) / land.width, chance.uniform(0, math.tau))
        for rank in (1, 2, 4, 9, 19)
    ]
    line = [
        (x, base - sum(high * math.sin(x * pace + phase) for high, pace, phase in waves))
        for x in range(0, land.width + 4, 4)
    ]
    colour = _colour(hue + 70 - round(70 * depth), 40, 62 - round(50 * depth))
    corners = [(land.width, land.height), (0, land.height)]
    ImageDraw.Draw(land).polygon([*line, *corners], fill=colour)


def write_caption(scene: Image.Image, prompt: str) -> None:
    """Write *prompt* at the foot of *scene*: smaller if it is long, cut if very long."""
    composed = unicodedata.normalize("NFC", prompt)
    text = " ".join("".join(char if char.isprintable() else " " for char in composed).split())
    if not text:
        return
    width, height = scene.size
    margin = min(scene.size) // 20
    size = round(math.sqrt(width * height) * 0.044)
    while True:
        font, step = _font(text, size), round(size * 1.32)
        lines, most = _wrapped(text, font, width - 2 * margin), max(1, height // 4 // step)
        if len(lines) <= most or size <= 11:
            break
        size = max(11, round(size * 0.85))
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-3] + "..."]
    draw = ImageDraw.Draw(scene)
    for number, line in enumerate(reversed(lines), start=1):
        place = margin, height - margin - step * number
        draw.text(
            place,
            line,
            font=font,
            fill="white",
            stroke_width=max(1, size // 12),
            stroke_fill="black",
        )


def _wrapped(text: str, font: _Font, width: int) -> list[str]:
    """*text* in lines of at most *width* pixels, broken at blanks or inside very long words."""
    columns = max(1, round(width / font.getlength(text) * len(text)))
    while True:
        lines = textwrap.wrap(text, columns)
        if columns == 1 or max(map(font.getlength, lines)) <= width:
            return lines
        columns = columns * 9 // 10


def _font(text: str, size: int) -> _Font:
    """The font that lacks the fewest letters of *text*: pillow's own, or one that is installed."""

    def lacking(font: _Font) -> int:
        missing = bytes(font.getmask("\U0010ffff"))
        return sum(bytes(font.getmask(char)) == missing for char in set(text))

    own, *installed = _fonts(size)
    return own if lacking(own) == 0 else min((own, *installed), key=lacking)


@lru_cache(16)
def _fonts(size: int) -> tuple[_Font, ...]:
    fonts: list[_Font] = [ImageFont.load_default(size)]
    for name in _FONTS:
        with suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return tuple(fonts)
