"""The gallery page: its text, and what a browser makes of it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from attrs import define, evolve, field

from evolink_async.batch._gallery import write_gallery
from evolink_async.batch._ledger import File, Item
from evolink_async.emulator._png import tiny_picture

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
in_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='o'\">"

SAVED = Item(
    number=1,
    identity="sha256:1",
    user_id=None,
    line=1,
    wanted=True,
    request={"prompt": "a lake", "size": "1280x1280"},
    metadata={},
    model="wan2.5-text-to-image",
    pictures=1,
    state="saved",
    task_id="task-unified-1",
    snapshot={"duration": 21},
    credits_used=1.0,
    times={"saved": 1757156493.0},
)


def saved(number: int, prompt: str, *names: str, **values: Any) -> Item:
    """A saved item with files of these names."""
    files = tuple(File(name=name, sha256="", bytes=1) for name in names)
    request = {"prompt": prompt, "size": "1280x1280"}
    return evolve(SAVED, number=number, line=number, request=request, files=files, **values)


def failed(number: int, prompt: str, code: str, reason: str) -> Item:
    """A failed item."""
    return saved(number, prompt, state="failed", code=code, message=reason)


async def written(folder: Path, items: Iterable[Item], title: str = "My batch") -> Path:
    """The page of *items*, in *folder*."""

    async def each() -> AsyncIterator[Item]:
        for item in items:
            yield item

    page = folder / "gallery.html"
    pieces = [piece async for piece in write_gallery(each(), title=title)]
    page.write_text("".join(pieces), "utf-8")
    return page


async def test_nothing_from_outside_is_markup(tmp_path: Path) -> None:
    """Prompts, ids, reasons, metadata and the title cannot end the element they stand in."""
    items = [
        saved(1, EVIL, "a-1.png", user_id=EVIL, metadata={EVIL: [EVIL]}),
        failed(2, EVIL, EVIL, EVIL),
    ]
    text = (await written(tmp_path, items, title=EVIL)).read_text("utf-8")
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 2
    assert "<img src=x" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    first, second = json.loads(data[1])
    assert (first["prompt"], first["id"], first["more"]) == (EVIL, EVIL, {EVIL: [EVIL]})
    assert (second["code"], second["reason"]) == (EVIL, EVIL)


async def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    """It names no other host, and its policy lets no other script run."""
    text = (await written(tmp_path, [SAVED])).read_text("utf-8")
    assert not re.search(r"(?:https?:)?//[a-z]", text)
    assert "default-src 'none'" in text
    assert "'unsafe-inline'" not in text


async def test_the_policy_allows_the_pages_own_style_and_script_and_no_other(
    tmp_path: Path,
) -> None:
    """Each is named by the hash of exactly what stands in its element."""
    text = (await written(tmp_path, [SAVED])).read_text("utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    for element in ("style", "script"):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src 'sha256-{digest}';" in policy[1]


async def test_file_names_are_quoted_into_links(tmp_path: Path) -> None:
    """A name with characters that mean something in a link still leads to its file."""
    text = (await written(tmp_path, [saved(1, "a", "a b#1%.png")])).read_text("utf-8")
    assert "a%20b%231%25.png" in text


# ---------------------------------------------------------------------------------------------
# In a browser


@define
class Tab:
    """A page in headless Chromium."""

    socket: aiohttp.ClientWebSocketResponse
    seen: list[dict[str, Any]] = field(factory=list)
    _number: int = 0

    async def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        await self.socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.seen.append(message)

    async def run(self, script: str) -> Any:
        """The value of *script*, awaited if it is a promise."""
        answer = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def open(self, page: Path) -> None:
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=page.as_uri())
        await self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    async def until(self, script: str) -> None:
        """Return once *script* is true."""
        while not await self.run(script):  # noqa: ASYNC110 - the browser tells nobody
            await asyncio.sleep(0.02)

    @property
    def complaints(self) -> list[str]:
        """What the browser logged: blocked scripts, missing files, exceptions."""
        return [
            json.dumps(message["params"])
            for message in self.seen
            if message.get("method") in {"Log.entryAdded", "Runtime.exceptionThrown"}
        ]


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Tab]:
    """An empty tab of a browser of its own."""
    assert CHROMIUM is not None
    profile = tmp_path / "profile"
    browser = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    try:
        port = await debugging_port(profile / "DevToolsActivePort")
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            async with http.get("/json/list") as answer:
                pages = [each for each in await answer.json() if each["type"] == "page"]
            async with http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Tab(socket)
    finally:
        browser.terminate()
        await browser.wait()


async def debugging_port(file: Path) -> str:
    """The port the browser writes into *file* once it listens."""
    while True:
        lines = await asyncio.to_thread(lambda: file.read_text().split() if file.exists() else [])
        if len(lines) > 1:
            return lines[0]
        await asyncio.sleep(0.02)


def picture(folder: Path, *names: str) -> None:
    """A small picture under each of these names."""
    content = tiny_picture("a lake", (64, 64), 1)
    for name in names:
        (folder / name).write_bytes(content)


CARDS = "document.querySelectorAll('.card').length"
LOADED = "[...document.images].filter((image) => image.complete && image.naturalWidth).length"


@in_browser
async def test_a_prompt_that_is_a_script_is_text(tab: Tab, tmp_path: Path) -> None:
    """It is read, not run, on its card and in the viewer; the page's own script may run."""
    picture(tmp_path, "a-1.png")
    await tab.open(await written(tmp_path, [saved(1, EVIL, "a-1.png"), failed(2, EVIL, "x", EVIL)]))
    await tab.run("document.querySelector('.card').click()")
    assert await tab.run("document.querySelector('.caption').textContent") == EVIL
    assert await tab.run("document.getElementById('prompt').textContent") == EVIL
    assert await tab.run("document.title") == "My batch"
    assert await tab.run("document.scripts.length") == 2
    assert tab.complaints == []


@in_browser
async def test_two_thousand_pictures_are_drawn_as_one_scrolls(tab: Tab, tmp_path: Path) -> None:
    """At first only what is near the top is there; scrolling brings the rest."""
    names = [f"lake-{k}-1.png" for k in range(2000)]
    picture(tmp_path, *names)
    await tab.open(await written(tmp_path, [saved(k, f"lake {k}", n) for k, n in enumerate(names)]))
    assert 0 < await tab.run(CARDS) < 500
    await tab.until(LOADED)
    assert await tab.run(LOADED) < 500
    while await tab.run(CARDS) < 2000:
        await tab.run("window.scrollTo(0, document.body.scrollHeight)")
        await asyncio.sleep(0.02)
    assert tab.complaints == []


@in_browser
async def test_failed_ones_are_filtered_with_their_reasons(tab: Tab, tmp_path: Path) -> None:
    """The filter counts them, and shows them and why; searching finds prompts."""
    picture(tmp_path, "a-1.png", "a-2.png")
    items = [saved(1, "a lake", "a-1.png", "a-2.png"), failed(2, "a sea", "bad_code", "too bad")]
    await tab.open(await written(tmp_path, items))
    buttons = await tab.run("[...document.querySelectorAll('nav button')].map((b) => b.innerText)")
    assert [button.split() for button in buttons] == [["All", "2"], ["Saved", "1"], ["Failed", "1"]]
    await tab.run("document.querySelector('[data-state=failed]').click()")
    texts = await tab.run("[...document.querySelectorAll('.card')].map((c) => c.textContent)")
    assert texts == ["bad_codetoo bada sea"]
    await tab.run("document.querySelector('[data-state=all]').click()")
    await tab.run("search.value = 'LAKE'; search.oninput()")
    assert await tab.run(CARDS) == 2


@in_browser
async def test_the_viewer_shows_the_facts_and_goes_on_by_keys(tab: Tab, tmp_path: Path) -> None:
    """Arrow keys lead from picture to picture; what is known of each stands beside it."""
    picture(tmp_path, "a-1.png", "a-2.png")
    await tab.open(
        await written(tmp_path, [saved(1, "a lake", "a-1.png", "a-2.png", metadata={"by": "me"})])
    )
    await tab.run("document.querySelector('.card').click()")
    await tab.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    facts = (await tab.run("document.getElementById('facts').innerText")).split("\n")
    for fact in ("2 of 2", "1280x1280", "21 s", "task-unified-1", "a-2.png", "me"):
        assert fact in facts
    assert (await tab.run("document.querySelector('#stage img').src")).endswith("/a-2.png")


@in_browser
async def test_it_fits_a_phone(tab: Tab, tmp_path: Path) -> None:
    """Nothing sticks out at the side, in the grid or in the viewer, whatever the prompt."""
    picture(tmp_path, "a-1.png")
    await tab.call(
        "Emulation.setDeviceMetricsOverride",
        width=360,
        height=740,
        deviceScaleFactor=2,
        mobile=True,
    )
    items = [saved(1, "x" * 2000, "a-1.png"), failed(2, "a", "c" * 80, "r" * 500)]
    await tab.open(await written(tmp_path, items, title="t" * 200))
    assert await tab.run("document.documentElement.scrollWidth") == 360
    await tab.run("document.querySelector('.card').click()")
    assert await tab.run("document.getElementById('viewer').scrollWidth") == 360


@in_browser
async def test_a_picture_that_is_gone_is_said_to_be(tab: Tab, tmp_path: Path) -> None:
    """Where a file was moved away, its card says so."""
    await tab.open(await written(tmp_path, [saved(1, "a lake", "gone-1.png")]))
    await tab.until("document.querySelector('main').textContent.includes('not here any more')")
