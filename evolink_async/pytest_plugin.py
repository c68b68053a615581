"""Fixtures for testing programs that use this package: no key, no money, no network.

::

    @pytest.mark.evolink(Status(503, retry_after=2, nth=1), duration=600)
    async def test_my_program(evolink_emulator):
        await my_program.main()            # makes its own Session(), as in production
        assert evolink_emulator.books.submits(prompt="A peaceful lake")

The fixtures are plain ones: they work under any plugin for asynchronous tests, and in
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
    "of the evolink_async.emulator.Emulator it is."
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
    anywhere in the process talks to it and lives in its time, which jumps to the next
    event whenever nobody is busy: a generation of ten minutes takes milliseconds.

    ``@pytest.mark.evolink(*faults, **settings)`` tells it what to do wrong and how to be;
    ``time_scale=60, estimate=1`` gives it real time at 60 times the speed, for programs in
    other processes: their own time is not scaled, and they wait by the estimate. Settings of
    a mark on the test go before those of its class and module, faults of all marks add up.
    """
    with _emulator(list(request.node.iter_markers("evolink"))) as emulator:
        monkeypatch.setenv("EVOLINK_API_KEY", emulator.api_key)
        monkeypatch.setenv("EVOLINK_BASE_URL", emulator.base_url)
        # Sessions made by the program under test are given no clock; this is the default.
        monkeypatch.setattr("evolink_async._clock.default", lambda: emulator.clock)
        yield emulator


@pytest.fixture
def evolink_session(evolink_emulator: Emulator) -> Session:
    """A session with that emulator, to be entered by the test: ``async with evolink_session``."""
    from evolink_async import Session  # noqa: PLC0415 - see above

    return Session(
        evolink_emulator.api_key,
        base_url=evolink_emulator.base_url,
        clock=evolink_emulator.clock,
    )


def _emulator(marks: Sequence[pytest.Mark]) -> Emulator:
    """The emulator that *marks*, the nearest first, ask for."""
    # Here, not above: a plugin is imported by every run of pytest, aiohttp need not be.
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
