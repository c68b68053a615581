"""Fixtures shared by all tests; the environment is kept out of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from desk import Desk

from evolink_async import Session
from evolink_async.emulator import Emulator, ManualClock


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, address or proxy of the person running the tests reaches them."""
    for name in ("EVOLINK_API_KEY", "EVOLINK_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def clock() -> ManualClock:
    """Time that jumps to the next sleeper when nothing is in the air."""
    return ManualClock()


@pytest.fixture
async def emulator(clock: ManualClock) -> AsyncIterator[Emulator]:
    """An emulated API on loopback, in virtual time, with small pictures and much credit."""
    async with Emulator(clock=clock, pictures="tiny", credits=100_000) as emulator:
        yield emulator


@pytest.fixture
async def session(emulator: Emulator) -> AsyncIterator[Session]:
    """A session with that API, sharing its time."""
    async with Session(
        emulator.api_key, base_url=emulator.base_url, clock=emulator.clock
    ) as session:
        yield session


@pytest.fixture
def desk(emulator: Emulator, tmp_path: Path) -> Desk:
    """Runs batches against the emulated API, into a folder of the test's own."""
    return Desk(emulator, tmp_path / "out")
