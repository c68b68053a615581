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
from PIL import Image, ImageChops, ImageFont

from evolink_async.emulator import _pictures
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


def caption_of(prompt: str, size: tuple[int, int] = (768, 768)) -> tuple[Image.Image, Image.Image]:
    """A grey picture, before and after the prompt is written on it."""
    before = Image.new("RGB", size, (128, 128, 128))
    after = before.copy()
    _pictures.write_caption(after, prompt)
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


@pytest.mark.parametrize("prompt", ["word " * 400, "x" * 2000, "W" * 500 + " " + "i" * 1400])
@pytest.mark.parametrize("size", [(768, 768), (1536, 384), (384, 1536)])
def test_a_long_prompt_keeps_to_the_foot(prompt: str, size: tuple[int, int]) -> None:
    """A prompt of 2000 characters gets smaller, and is cut before it leaves its place."""
    before, after = caption_of(prompt, size)
    box = ImageChops.difference(before, after).getbbox()
    assert box is not None
    assert box[0] > 0
    assert box[1] > size[1] // 2
    assert box[2:] < size


def test_a_long_word_is_broken() -> None:
    """A word wider than the picture goes on in the next line, losing nothing."""
    font = _pictures._font("see", 30)
    lines = _pictures._wrapped("see " + "x" * 200, font, 400)
    assert len(lines) > 2
    assert "".join(lines).replace(" ", "") == "see" + "x" * 200
    assert max(map(font.getlength, lines)) <= 400


def test_a_font_that_has_the_letters_is_taken() -> None:
    """Where pillow's own font lacks a letter, an installed one that has it is used."""
    try:
        ImageFont.truetype("DejaVuSans.ttf", 20)
    except OSError:
        pytest.skip("no other font here")
    font = _pictures._font("\u0416", 20)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert bytes(font.getmask("\u0416")) != bytes(font.getmask("\U0010ffff"))


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
