"""Fixtures for testing programs that use this package: no key, no money, no network.

::

    @pytest.mark.evolink(Status(503, retry_after=2, nth=1), duration=600)
    async def test_my_program(evolink_emulator):
        await my_program.main()            # makes its own Session(), as in production
        assert evolink_emulator.books.submits(prompt="A peaceful lake")

The fixtures are synchronous: they work with any plugin for asynchronous tests, and in
synchronous tests of programs that run a loop of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from evolink_async import Session
    from evolink_async.emulator import Emulator

__all__ = ["evolink_emulator", "evolink_session", "pytest_configure"]

_MARKER = (
    "evolink(*faults, **settings): faults the evolink_emulator fixture makes, and settings "
    "of its evolink_async.emulator.Emulator."
)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.fixture
def evolink_emulator(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Emulator]:
    """An emulated API in a thread and event loop of its own, with small pictures.

    ``EVOLINK_API_KEY`` and ``EVOLINK_BASE_URL`` point to it, so a ``Session()`` made
    anywhere in the process uses the emulator and its clock. That clock jumps to the next event
    whenever nothing is running: a generation of ten minutes takes milliseconds.

    ``@pytest.mark.evolink(*faults, **settings)`` sets its faults and settings. For a program in
    another process use ``time_scale=60, estimate=1``: real time at 60 times the speed. That
    program's own time is not scaled, and it waits by the estimate. Settings of a mark on the
    test win over those of its class and module; the faults of all marks add up.
    """
    with _emulator(list(request.node.iter_markers("evolink"))) as emulator:
        monkeypatch.setenv("EVOLINK_API_KEY", emulator.api_key)
        monkeypatch.setenv("EVOLINK_BASE_URL", emulator.base_url)
        # The program under test gives its sessions no clock, so the default is replaced.
        monkeypatch.setattr("evolink_async._clock.default", lambda: emulator.clock)
        yield emulator


@pytest.fixture
def evolink_session(evolink_emulator: Emulator) -> Session:
    """A session with that emulator, to be entered by the test: ``async with evolink_session``."""
    from evolink_async import Session  # noqa: PLC0415 - see _emulator

    return Session(
        evolink_emulator.api_key,
        base_url=evolink_emulator.base_url,
        clock=evolink_emulator.clock,
    )


def _emulator(marks: Sequence[pytest.Mark]) -> Emulator:
    """The emulator with the faults and settings of *marks*, which begin with the nearest."""
    # Imported here, because every run of pytest imports this module and few need aiohttp.
    from evolink_async.emulator import Emulator, ManualClock  # noqa: PLC0415

    settings: dict[str, Any] = {}
    faults: tuple[Any, ...] = ()
    for mark in reversed(marks):
        _check(mark, tuple(inspect.signature(Emulator).parameters))
        settings.update(mark.kwargs)
        faults += mark.args
    if "time_scale" not in settings:
        settings.setdefault("clock", ManualClock())
    try:
        return Emulator(**{"pictures": "tiny", **settings, "faults": faults})
    except (ImportError, TypeError, ValueError) as error:
        _refuse(str(error))


def _check(mark: pytest.Mark, names: tuple[str, ...]) -> None:
    if not mark.args and not mark.kwargs:
        _refuse("it needs faults, settings, or both")
    if "faults" in mark.kwargs:
        _refuse("faults come first and without a keyword")
    for name in mark.kwargs:
        if name not in names:
            known = ", ".join(each for each in names if each != "faults")
            _refuse(f"an emulator has no setting {name!r}; it has {known}")


def _refuse(why: str) -> NoReturn:
    example = "@pytest.mark.evolink(faults.Status(503, nth=1), duration=600)"
    pytest.fail(f"@pytest.mark.evolink: {why}\nIt is used like {example}", pytrace=False)
