"""The emulator's pictures: true sizes, legible prompts, the same for the same prompt."""

from __future__ import annotations

import io
import struct
import zlib

import pytest

from evolink_async.emulator import Emulator, ManualClock
from evolink_async.emulator._png import tiny_picture

pytest.importorskip("PIL")

from emulator_caller import calling
from PIL import Image, ImageDraw, ImageFont

from evolink_async.emulator import _caption, _pictures
from evolink_async.emulator._pictures import draw_picture


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


@pytest.mark.parametrize("size", [(768, 768), (1536, 384), (383, 1537)])
def test_tiny_pictures_are_true_pictures(size: tuple[int, int]) -> None:
    """A tiny picture is a PNG of exactly the size, in one colour of its own per variant."""
    one, other = (opened(tiny_picture("lake", size, variant)) for variant in (1, 2))
    assert (one.format, one.size) == ("PNG", size)
    assert [count for count, _ in one.convert("RGB").getcolors() or ()] == [size[0] * size[1]]
    assert one.convert("RGB").getpixel((0, 0)) != other.convert("RGB").getpixel((0, 0))


def test_tiny_pictures_are_tiny_and_need_nothing() -> None:
    """The largest tiny picture has under 2 kB, and its rows are all there."""
    data = tiny_picture("\ud800", (1440, 1440), 1)
    assert len(data) < 2000
    start = data.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", data[start - 8 : start - 4])
    assert len(zlib.decompress(data[start : start + length])) == 1440 * 181


@pytest.mark.parametrize("size", [(768, 768), (1536, 384), (384, 1536)])
def test_full_pictures_have_the_size_and_are_repeatable(size: tuple[int, int]) -> None:
    """The same prompt gives the same picture; another variant gives another."""
    one = draw_picture("A peaceful lake", size, 1)
    assert opened(one).size == size
    assert one == draw_picture("A peaceful lake", size, 1)
    assert one != draw_picture("A peaceful lake", size, 2)


def test_a_word_of_the_prompt_sets_the_hour() -> None:
    """A picture of the night is darker than one of a winter morning."""

    def brightness(prompt: str) -> float:
        histogram = opened(draw_picture(prompt, (768, 768), 1)).convert("L").histogram()
        return sum(level * count for level, count in enumerate(histogram)) / sum(histogram)

    assert brightness("stars at night") < brightness("snow in winter")


def caption_of(prompt: str, size: tuple[int, int] = (768, 768)) -> tuple[Image.Image, Image.Image]:
    """A grey picture, before and after the prompt is written on it."""
    before = Image.new("RGB", size, (128, 128, 128))
    after = before.copy()
    _caption.write_caption(after, prompt)
    return before, after


def test_the_prompt_stands_at_the_foot() -> None:
    """White letters stand on the lower part of the picture only."""
    before, after = caption_of("A peaceful lake")
    assert after.crop((0, 0, 768, 384)).tobytes() == before.crop((0, 0, 768, 384)).tobytes()
    foot = after.crop((0, 384, 768, 768)).convert("L").histogram()
    assert sum(foot[:60]) > 1000
    assert sum(foot[240:]) > 1000


@pytest.mark.parametrize("prompt", ["", " \n\t ", "\x00\x07"])
def test_nothing_legible_leaves_the_picture_alone(prompt: str) -> None:
    """A prompt without a printable character writes nothing."""
    before, after = caption_of(prompt)
    assert before.tobytes() == after.tobytes()


def test_a_long_prompt_gets_smaller_and_is_cut() -> None:
    """A prompt of 2000 characters keeps to the foot and ends in dots."""
    draw = ImageDraw.Draw(Image.new("RGB", (768, 768)))
    lines, _, step = _caption._fitted(draw, "word " * 400, 700, 200, (768, 768))
    assert len(lines) * step <= 200
    assert lines[-1].endswith("...")


def test_a_long_word_is_broken() -> None:
    """A word wider than the picture goes on in the next line, losing nothing."""
    draw = ImageDraw.Draw(Image.new("RGB", (768, 768)))
    font = _caption._font(None, 30)
    lines = _caption._wrapped(draw, "see " + "x" * 200, font, 400)
    assert len(lines) > 2
    assert "".join(lines) == "see" + "x" * 200


def test_letters_the_font_lacks_are_spelt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a font for them, Korean is romanised, and what cannot be is a dot."""
    monkeypatch.setattr(_caption, "_WIDE_FONTS", ("no-such-font.ttf",))
    assert _caption._family("평화") is None
    assert _caption._with_glyphs("평화 ば 湖 a", None) == "pyeonghwa ba · a"
    assert _caption._with_glyphs("\u1e0b", None) == "d"


def test_a_font_that_has_the_letters_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Where the built-in font lacks a letter, an installed one that has it is used."""
    letters = "\u0416"
    if not _caption._missing(letters, None):
        pytest.skip("the built-in font has it")
    installed = "DejaVuSans.ttf"
    try:
        ImageFont.truetype(installed, 20)
    except OSError:
        pytest.skip("no other font here")
    monkeypatch.setattr(_caption, "_WIDE_FONTS", (installed,))
    assert _caption._family(letters) == installed
    _, after = caption_of(letters)
    assert after.getextrema()


def test_every_palette_is_drawn() -> None:
    """Successive variants go through all hours of the day."""
    hours = {_pictures._palette("x", variant) for variant in range(1, 9)}
    assert hours == set(_pictures._PALETTES.values())


async def test_the_emulator_serves_full_pictures() -> None:
    """By default results are the drawn pictures."""
    async with (
        Emulator(clock=ManualClock(autoadvance=False)) as emulator,
        calling(emulator) as api,
    ):
        name = await api.task(prompt="A serene lake", size="768x768")
        emulator.complete(name)
        (url,) = emulator.books.task(name).result_urls
        assert (await api.get(url)).body == draw_picture("A serene lake", (768, 768), 1)
