"""The prompt, legible at the foot of a picture."""

from __future__ import annotations

import unicodedata
from functools import cache

from PIL import Image, ImageDraw, ImageFont

__all__ = ["write_caption"]

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pillow finds these by name; the first one that has the glyphs is used.
_WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "AppleSDGothicNeo.ttc",
    "malgun.ttf",
    "msyh.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
)
# Unicode names the characters of these scripts by their sound.
_SPELT_SCRIPTS = ("HANGUL SYLLABLE", "HIRAGANA LETTER", "KATAKANA LETTER")
_SIZES = (1.0, 0.85, 0.72, 0.6, 0.5, 0.42, 0.36, 0.3)
_SHARE = 0.26
"""Of the height of a picture: the most a caption takes."""


def write_caption(scene: Image.Image, prompt: str) -> None:
    """Write *prompt* on the lower part of *scene*: smaller if it is long, cut if very long."""
    text = _printable(prompt)
    if not text:
        return
    width, height = scene.size
    margin = round(min(width, height) * 0.05)
    draw = ImageDraw.Draw(scene)
    lines, font, step = _fitted(draw, text, width - 2 * margin, round(height * _SHARE), scene.size)
    top = height - margin - step * len(lines)
    _shade(scene, top - margin)
    weight = max(1, step // 22)
    for number, line in enumerate(lines):
        place = (margin, top + number * step)
        draw.text((place[0] + weight, place[1] + weight), line, font=font, fill=(10, 10, 20))
        draw.text(place, line, font=font, fill=(255, 252, 244))


def _shade(scene: Image.Image, top: int) -> None:
    """Darken the foot of the picture, so that white letters stand out on anything."""
    foot = (scene.width, scene.height - top)
    shade = Image.linear_gradient("L").resize(foot)
    shade = shade.point([min(150, round(v * 1.1)) for v in range(256)])
    mask = Image.new("L", scene.size)
    mask.paste(shade, (0, top))
    scene.paste((10, 12, 24), mask=mask)


def _printable(prompt: str) -> str:
    """*prompt* on one line, without what cannot be drawn in any font."""
    composed = unicodedata.normalize("NFC", prompt)
    kept = (
        " " if char.isspace() else char
        for char in composed
        if char.isspace() or unicodedata.category(char)[0] != "C"
    )
    return " ".join("".join(kept).split())


def _fitted(
    draw: ImageDraw.ImageDraw, text: str, width: int, height: int, scene: tuple[int, int]
) -> tuple[list[str], _Font, int]:
    """Lines, font and line height that fit into *width* x *height*."""
    family = _family(text)
    shown = _with_glyphs(text, family)
    for scale in _SIZES:
        size = max(11, round((scene[0] * scene[1]) ** 0.5 * 0.044 * scale))
        font, step = _font(family, size), round(size * 1.32)
        lines = _wrapped(draw, shown, font, width)
        if len(lines) * step <= height:
            return lines, font, step
    most = max(1, height // step)
    return [*lines[: most - 1], _cut(draw, lines[most - 1], font, width)], font, step


def _cut(draw: ImageDraw.ImageDraw, line: str, font: _Font, width: int) -> str:
    while line and draw.textlength(line + "...", font=font) > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> list[str]:
    """*text* in lines of at most *width*, broken at blanks, or inside words that are too long."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if draw.textlength(longer, font=font) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for char in word:
            if lines[-1] and draw.textlength(lines[-1] + char, font=font) > width:
                lines.append("")
            lines[-1] += char
    return lines


@cache
def _font(family: str | None, size: int) -> _Font:
    """The font of this name, or pillow's own."""
    if family is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(family, size)


def _family(text: str) -> str | None:
    """The first font with a glyph for every character; pillow's own if none is complete."""
    if not _missing(text, None):
        return None
    families = [family for family in _WIDE_FONTS if _is_there(family)]
    return min([None, *families], key=lambda family: len(_missing(text, family)))


@cache
def _is_there(family: str) -> bool:
    try:
        ImageFont.truetype(family, 20)
    except OSError:
        return False
    return True


def _missing(text: str, family: str | None) -> set[str]:
    return {char for char in set(text) if not _has_glyph(char, family)}


@cache
def _blank(family: str | None) -> bytes:
    """What this font draws for a character it does not have."""
    return bytes(_font(family, 20).getmask("\U0010ffff"))


@cache
def _has_glyph(char: str, family: str | None) -> bool:
    return char == " " or bytes(_font(family, 20).getmask(char)) != _blank(family)


def _with_glyphs(text: str, family: str | None) -> str:
    """*text* in letters the font has: romanised, without accents, or else a dot."""
    missing = _missing(text, family)
    return "".join(_substitute(char, family) if char in missing else char for char in text)


def _substitute(char: str, family: str | None) -> str:
    script, _, sound = unicodedata.name(char, "").rpartition(" ")
    if script in _SPELT_SCRIPTS:
        return sound.lower()
    letter = unicodedata.normalize("NFKD", char)[0]
    return letter if _has_glyph(letter, family) else "\N{MIDDLE DOT}"
