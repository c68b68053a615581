"""Landscapes at the edge of the day, one for each prompt and variant, with the prompt on them.

Sky, sun or moon, clouds, ridges that fade into the distance, and a lake that mirrors it all;
every choice is drawn from a hash of the prompt, so the same prompt gives the same picture.
Needs pillow, and is imported only when the first picture is drawn.
"""

from __future__ import annotations

import io
import math
import random

from attrs import frozen
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

from evolink_async.emulator._caption import write_caption

__all__ = ["draw_picture"]

_Colour = tuple[int, int, int]
_Curve = list[float]


@frozen
class _Palette:
    """One hour of the day.

    Attributes:
        sky: Colours from the zenith to the horizon.
        far: Colour of the farthest ridge.
        near: Colour of the nearest.
        light: Colour of sun or moon and of its glow.
        night: Moon and stars instead of a sun.
    """

    sky: tuple[_Colour, ...]
    far: _Colour
    near: _Colour
    light: _Colour
    night: bool = False


_PALETTES = {
    "gold": _Palette(
        ((58, 74, 112), (164, 122, 122), (244, 162, 92), (255, 214, 130)),
        (206, 134, 98), (46, 30, 42), (255, 244, 204),
    ),
    "violet": _Palette(
        ((20, 20, 58), (62, 46, 108), (136, 84, 146), (236, 150, 150)),
        (112, 80, 140), (16, 14, 36), (255, 232, 214), night=True,
    ),
    "mist": _Palette(
        ((98, 138, 156), (154, 184, 188), (212, 220, 206), (246, 238, 214)),
        (164, 186, 188), (30, 52, 62), (255, 252, 236),
    ),
    "rose": _Palette(
        ((44, 40, 92), (122, 70, 130), (226, 104, 122), (255, 178, 128)),
        (178, 88, 122), (30, 20, 48), (255, 226, 190),
    ),
    "teal": _Palette(
        ((6, 16, 34), (10, 48, 66), (30, 104, 106), (148, 202, 164)),
        (44, 106, 110), (4, 16, 26), (240, 255, 240), night=True,
    ),
    "dawn": _Palette(
        ((62, 84, 138), (142, 136, 176), (232, 172, 168), (255, 218, 178)),
        (190, 152, 170), (44, 44, 72), (255, 240, 214),
    ),
    "blue": _Palette(
        ((8, 16, 42), (20, 44, 86), (52, 96, 138), (150, 186, 196)),
        (64, 104, 140), (6, 14, 30), (244, 248, 255), night=True,
    ),
    "ember": _Palette(
        ((28, 24, 44), (88, 38, 54), (186, 66, 50), (255, 166, 88)),
        (150, 62, 56), (20, 12, 20), (255, 222, 168),
    ),
}  # fmt: skip
_HINTS = {
    "sunset": "gold", "golden": "gold", "autumn": "ember", "fire": "ember", "desert": "ember",
    "sunrise": "dawn", "dawn": "dawn", "morning": "dawn", "spring": "dawn",
    "mist": "mist", "fog": "mist", "snow": "mist", "winter": "mist", "peaceful": "mist",
    "night": "blue", "moon": "blue", "star": "blue", "aurora": "teal", "forest": "teal",
    "dusk": "violet", "evening": "rose", "love": "rose",
}  # fmt: skip
"""The palette that a word of the prompt suggests."""


def draw_picture(prompt: str, size: tuple[int, int], variant: int) -> bytes:
    """A PNG of exactly *size* for *prompt*; each *variant*, from 1, is another picture."""
    chance = random.Random(  # noqa: S311 - a drawing
        f"{variant}:{prompt}".encode("utf-8", "surrogatepass")
    )
    scene = _paint(_palette(prompt, variant), size, chance)
    write_caption(scene, prompt)
    file = io.BytesIO()
    scene.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _palette(prompt: str, variant: int) -> _Palette:
    """The palette a word of the prompt suggests, or one by chance; the next for each variant."""
    words, names = prompt.lower(), list(_PALETTES)
    seed = prompt.encode("utf-8", "surrogatepass")
    first = random.Random(seed).randrange(len(names))  # noqa: S311 - a drawing
    hinted = next((name for word, name in _HINTS.items() if word in words), names[first])
    return _PALETTES[names[(names.index(hinted) + variant - 1) % len(names)]]


def _paint(palette: _Palette, size: tuple[int, int], chance: random.Random) -> Image.Image:
    width, height = size
    shore = round(height * chance.uniform(0.62, 0.70))
    horizon = round(shore * chance.uniform(0.86, 0.94))
    light = (
        round(width * chance.choice((chance.uniform(0.2, 0.4), chance.uniform(0.6, 0.8)))),
        round(horizon * chance.uniform(0.35, 0.80)),
    )
    land = _sky(palette, (width, shore), horizon)
    if palette.night:
        _add_stars(land, horizon, chance)
    _add_light(land, palette, light, chance)
    _add_clouds(land, palette, horizon, chance)
    _add_ridges(land, palette, horizon, chance)
    if not palette.night:
        _add_birds(land, palette, chance)
    scene = Image.new("RGB", size)
    scene.paste(land)
    scene.paste(_lake(land, palette, height - shore, light[0], chance), (0, shore))
    return _finish(scene, chance)


def _mix(one: _Colour, other: _Colour, share: float) -> _Colour:
    return (
        round(one[0] + (other[0] - one[0]) * share),
        round(one[1] + (other[1] - one[1]) * share),
        round(one[2] + (other[2] - one[2]) * share),
    )


def _sky(palette: _Palette, size: tuple[int, int], horizon: int) -> Image.Image:
    """The colours of the sky, from the zenith down to the horizon."""
    width, height = size
    column = Image.new("RGB", (1, height))
    stops = palette.sky
    for row in range(height):
        place = min(1.0, row / horizon) ** 1.15 * (len(stops) - 1)
        first = min(int(place), len(stops) - 2)
        share = place - first
        eased = share * share * (3 - 2 * share) * 0.4 + share * 0.6
        column.putpixel((0, row), _mix(stops[first], stops[first + 1], eased))
    return column.resize((width, height))


def _add_stars(land: Image.Image, horizon: int, chance: random.Random) -> None:
    layer = Image.new("L", land.size)
    draw = ImageDraw.Draw(layer)
    for _ in range(land.width * horizon // 2200):
        x = chance.uniform(0, land.width)
        y = horizon * 0.85 * chance.random() ** 1.4
        strength = chance.random() ** 3
        shade = round((60 + 195 * strength) * (1 - y / horizon))
        radius = 0.4 + 1.1 * strength
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    land.paste((255, 250, 240), mask=layer)


def _add_light(
    land: Image.Image, palette: _Palette, centre: tuple[int, int], chance: random.Random
) -> None:
    """The sun or the moon, and the glow around it."""
    unit = min(land.size)
    for spread, strength in ((1.7, 0.30), (0.75, 0.30), (0.28, 0.42)):
        _add_glow(land, palette.light, centre, round(unit * spread), strength)
    radius = unit * chance.uniform(0.045, 0.075)
    disc = _disc(land.size, centre, radius)
    if palette.night and chance.random() < 0.6:
        shadow = (centre[0] + radius * 0.42, centre[1] - radius * 0.22)
        disc = ImageChops.subtract(disc, _disc(land.size, shadow, radius * 0.92))
    land.paste(_mix(palette.light, (255, 255, 255), 0.35), mask=disc)


def _add_glow(
    land: Image.Image, colour: _Colour, centre: tuple[int, int], radius: int, strength: float
) -> None:
    # The gradient is 0 in the middle and 255 at a distance of 128 pixels.
    glow = Image.radial_gradient("L").point(
        [round(255 * strength * max(0.0, 1 - level / 180) ** 2.2) for level in range(256)]
    )
    glow = glow.resize((2 * radius, 2 * radius), Image.Resampling.BICUBIC)
    mask = Image.new("L", land.size)
    mask.paste(glow, (centre[0] - radius, centre[1] - radius))
    land.paste(colour, mask=mask)


def _disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> Image.Image:
    """A mask of a disc with a smooth edge."""
    scale = 4
    side = int(2 * radius + 4)
    small = Image.new("L", (side * scale, side * scale))
    middle, wide = side * scale / 2, radius * scale
    box = (middle - wide, middle - wide, middle + wide, middle + wide)
    ImageDraw.Draw(small).ellipse(box, fill=255)
    mask = Image.new("L", size)
    mask.paste(small.reduce(scale), (round(centre[0] - side / 2), round(centre[1] - side / 2)))
    return mask


def _noise(columns: int, rows: int, chance: random.Random) -> Image.Image:
    return Image.frombytes("L", (columns, rows), chance.randbytes(columns * rows))


def _add_clouds(land: Image.Image, palette: _Palette, horizon: int, chance: random.Random) -> None:
    """Long thin clouds, lit from below: noise of three grains, stretched and thinned out."""
    mask = Image.new("L", (land.width, horizon))
    for rows, weight in ((7, 0.5), (15, 0.33), (31, 0.25)):
        noise = _noise(max(2, rows // 2), rows, chance)
        grain = noise.resize(mask.size, Image.Resampling.BICUBIC)
        mask = ImageChops.add(mask, grain.point([round(weight * v) for v in range(256)]))
    cover = chance.uniform(128, 150)
    thinned = mask.point([min(150, max(0, round((v - cover) * 2.4))) for v in range(256)])
    fade = Image.linear_gradient("L").resize(mask.size)
    fade = fade.point([round(255 * math.sin(math.pi * v / 255) ** 0.8) for v in range(256)])
    thinned = ImageChops.multiply(thinned, fade)
    lit = _mix(palette.sky[-1], palette.light, 0.4)
    colours = _sky(
        _Palette((palette.sky[1], palette.sky[2], lit), lit, lit, lit), mask.size, horizon
    )
    land.paste(colours, (0, 0), thinned)


def _fractal(points: int, waves: float, rough: float, chance: random.Random) -> _Curve:
    """A wandering line from 0 to 1: value noise of six octaves, each *rough* times the last."""
    line = [0.0] * points
    weight, total = 1.0, 0.0
    for _ in range(6):
        knots = [chance.random() for _ in range(int(waves) + 3)]
        offset = chance.random()
        for index in range(points):
            place = index / points * waves + offset
            knot = int(place)
            share = (1 - math.cos((place - knot) * math.pi)) / 2
            line[index] += weight * (knots[knot] + (knots[knot + 1] - knots[knot]) * share)
        total += weight
        weight *= rough
        waves *= 2.1
    return [value / total for value in line]


def _add_ridges(land: Image.Image, palette: _Palette, horizon: int, chance: random.Random) -> None:
    """Ridges from far to near: each darker, lower and rougher than the one behind it."""
    layers = chance.choice((5, 6, 7))
    haze = _mix(palette.sky[-1], palette.light, 0.15)
    for layer in range(layers):
        depth = layer / (layers - 1)
        base = horizon + (land.height - horizon) * depth**1.4
        tall = land.height * (0.34 * (1 - depth) ** 1.1 + 0.07)
        line = _fractal(land.width // 2 + 2, 2.0 + 2.5 * depth, 0.42 + 0.08 * depth, chance)
        heights = [base - tall * (value - 0.30) * 1.5 for value in line]
        if layer >= layers - 2:
            heights = _with_trees(heights, land.height * (0.018 + 0.022 * depth), chance)
        colour = _mix(palette.far, palette.near, depth**0.85)
        _add_ridge(land, heights, colour, _mix(colour, haze, 0.55 * (1 - depth) + 0.12))


def _add_ridge(land: Image.Image, heights: _Curve, top: _Colour, foot: _Colour) -> None:
    """Fill everything below a line, given at every second pixel; mist lies at its foot."""
    mask = Image.new("L", (land.width * 2, land.height * 2))
    outline = [(index * 4, y * 2) for index, y in enumerate(heights)]
    corners = [(land.width * 2 + 4, land.height * 2), (0, land.height * 2)]
    ImageDraw.Draw(mask).polygon([*outline, *corners], fill=255)
    first = max(0, min(land.height - 2, round(min(heights))))
    column = Image.new("RGB", (1, land.height), top)
    for row in range(first, land.height):
        share = min(1.0, (row - first) / max(1.0, land.height * 0.22))
        column.putpixel((0, row), _mix(top, foot, share**1.6))
    land.paste(column.resize(land.size), mask=mask.reduce(2))


def _with_trees(heights: _Curve, tall: float, chance: random.Random) -> _Curve:
    """The line with groves of firs on it."""
    groves = _fractal(len(heights), 5.0, 0.5, chance)
    line = list(heights)
    spot = 0.0
    while spot < len(line):
        high = tall * chance.uniform(0.35, 1.0) * max(0.12, groves[int(spot)] * 2 - 0.45)
        half = max(1, round(high * 0.14))
        for index in range(max(0, int(spot) - half), min(len(line), int(spot) + half + 1)):
            share = 1 - abs(index - int(spot)) / (half + 1)
            line[index] = min(line[index], heights[int(spot)] - high * share**1.3)
        spot += chance.uniform(0.8, 2.4) * max(1, half)
    return line


def _add_birds(land: Image.Image, palette: _Palette, chance: random.Random) -> None:
    draw = ImageDraw.Draw(land)
    x, y = land.width * chance.uniform(0.3, 0.7), land.height * chance.uniform(0.15, 0.35)
    colour = _mix(palette.near, palette.sky[1], 0.35)
    for _ in range(chance.choice((0, 3, 5, 7))):
        span = land.width * chance.uniform(0.005, 0.009)
        lift = chance.uniform(0.35, 0.6)
        wings = [
            (x + span * step / 6, y - span * lift * math.sin(2.5 * abs(step / 6) ** 0.8))
            for step in range(-6, 7)
        ]
        draw.line(wings, fill=colour, width=max(1, round(span / 5)), joint="curve")
        x += land.width * chance.choice((-1, 1)) * chance.uniform(0.018, 0.05)
        y += land.height * chance.uniform(-0.025, 0.025)


def _lake(
    land: Image.Image, palette: _Palette, height: int, light: int, chance: random.Random
) -> Image.Image:
    """The land upside down, darker and in waves that grow towards the viewer."""
    mirror = land.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    mirror = mirror.resize((land.width, round(land.height * 0.9)))
    mirror = mirror.filter(ImageFilter.BoxBlur(1.5))
    mirror = ImageEnhance.Brightness(mirror).enhance(0.80)
    water = Image.new("RGB", (land.width, height))
    phases = [chance.uniform(0, 2 * math.pi) for _ in range(3)]
    for row in range(height):
        near = row / height
        wave = sum(
            math.sin(row / (pace * (0.4 + near)) + phase)
            for pace, phase in zip((2.3, 5.1, 11.0), phases, strict=True)
        )
        source = min(mirror.height - 1, max(0, round(row + wave * (0.6 + 3.5 * near))))
        line = mirror.crop((0, source, land.width, source + 1))
        water.paste(line, (0, row))
        water.paste(line, (round(wave * (0.5 + 3.0 * near)), row))
    _add_glints(water, palette, light, chance)
    deep = Image.linear_gradient("L").resize(water.size).point([v * 2 // 5 for v in range(256)])
    water.paste(_mix(palette.near, palette.sky[0], 0.35), mask=deep)
    return water


def _add_glints(water: Image.Image, palette: _Palette, light: int, chance: random.Random) -> None:
    """The road of light on the water."""
    layer = Image.new("L", water.size)
    draw = ImageDraw.Draw(layer)
    for _ in range(water.height):
        near = chance.random()
        y = near * water.height
        x = chance.gauss(light, water.width * (0.018 + 0.05 * near))
        half = water.width * chance.uniform(0.004, 0.020) * (0.4 + near)
        draw.line((x - half, y, x + half, y), round(chance.uniform(25, 130) * (1 - 0.6 * near)))
    layer = layer.filter(ImageFilter.GaussianBlur(0.8))
    water.paste(palette.light, mask=layer)


def _finish(scene: Image.Image, chance: random.Random) -> Image.Image:
    """A little grain, which also hides the steps of the gradients, and darker corners."""
    tile = _noise(256, 256, chance).point([v * 9 // 255 for v in range(256)])
    grain = Image.new("L", scene.size)
    for x in range(0, scene.width, 256):
        for y in range(0, scene.height, 256):
            grain.paste(tile, (x, y))
    scene = ImageChops.add(scene, Image.merge("RGB", (grain,) * 3), offset=-4)
    corners = Image.radial_gradient("L").resize(scene.size)
    corners = corners.point([max(0, v - 120) * 70 // 135 for v in range(256)])
    scene.paste((8, 8, 18), mask=corners)
    return scene
