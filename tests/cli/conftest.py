"""Runs commands, and the servers they find by the environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import KEY, Ended, Run, in_thread
from hostile import HostileServer, answer, snapshot

from evolink_async.__main__ import main
from evolink_async._cli import console
from evolink_async.emulator import Emulator, ManualClock


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str) -> Ended:
        code = main(argv)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return call


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of the emulator behind ``--emulator``: virtual time and small pictures."""
    settings: dict[str, Any] = {"clock": ManualClock(), "pictures": "tiny"}
    monkeypatch.setattr(console, "EMULATED", settings)
    return settings


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """An emulated API found by the environment; what it generates is completed at once."""
    quick = Emulator(time_scale=1000, duration=0.1, estimate=1, pictures="tiny", api_key=KEY)
    with in_thread(quick) as emulator:
        monkeypatch.setenv("EVOLINK_API_KEY", KEY)
        monkeypatch.setenv("EVOLINK_BASE_URL", emulator.base_url)
        yield emulator


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    """A server that behaves as its script says, found by the environment."""
    with in_thread(HostileServer(script=[answer(200, snapshot())])) as hostile:
        monkeypatch.setenv("EVOLINK_API_KEY", KEY)
        monkeypatch.setenv("EVOLINK_BASE_URL", hostile.base_url)
        yield hostile
