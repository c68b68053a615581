"""The pytest plugin, used as by somebody else's tests."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from evolink_async.emulator.faults import CallbackDropped

pytest_plugins = ["pytester"]

PROGRAM = '''
import asyncio
from evolink_async import Session

async def paint(prompt, folder):
    """A program that knows nothing of emulators."""
    async with Session() as session:
        task = await session.submit(prompt)
        return await task.download(folder)

def main(prompt, folder):
    return asyncio.run(paint(prompt, folder))
'''

TESTS = """
import time
import pytest
import program
from evolink_async import TaskFailedError
from evolink_async.emulator import RealClock
from evolink_async.emulator.faults import Status, TaskFails

pytestmark = pytest.mark.evolink(Status(503, retry_after=3, route="submit", nth=1), credits=5)

@pytest.mark.evolink(duration=600)
def test_a_synchronous_program(evolink_emulator, tmp_path):
    start = time.monotonic()
    (path,) = program.main("A peaceful lake", tmp_path)
    assert path.stat().st_size
    assert time.monotonic() - start < 60
    (task,) = evolink_emulator.books.tasks(prompt="A peaceful lake")
    assert (task.ends_at - task.accepted_at, task.charged) == (600, 1)
    assert [each.status for each in evolink_emulator.books.submits()] == [503, 200]
    assert evolink_emulator.books.remaining == 4

@pytest.mark.asyncio
@pytest.mark.evolink(TaskFails("content_policy_violation", prompt="bad"))
async def test_an_asynchronous_program(evolink_emulator, tmp_path):
    with pytest.raises(TaskFailedError):
        await program.paint("something bad", tmp_path)
    assert len(evolink_emulator.faults.active) == 2

@pytest.mark.asyncio
async def test_a_session(evolink_session, evolink_emulator):
    async with evolink_session as session:
        await session.generate("A peaceful lake")
    assert evolink_emulator.books.charged == 1

@pytest.mark.evolink(clock=RealClock(1000))
def test_real_time(evolink_emulator, tmp_path):
    assert program.main("A peaceful lake", tmp_path)

def test_nothing_is_left_behind(monkeypatch):
    import os
    from evolink_async import _clock
    assert "EVOLINK_API_KEY" not in os.environ
    assert _clock.default is _clock.LoopClock
"""


@pytest.fixture(autouse=True)
def settings_of_theirs(pytester: pytest.Pytester) -> None:
    """A project with pytest-asyncio, as it is set up by default."""
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function")


def plugin_options() -> list[str]:
    """How a run of pytest gets the plugin: by itself, where the package is installed."""
    points = importlib.metadata.entry_points(group="pytest11")
    installed = any(point.value == "evolink_async.pytest_plugin" for point in points)
    return [] if installed else ["-p", "evolink_async.pytest_plugin"]


def test_the_recipe_of_the_readme(pytester: pytest.Pytester) -> None:
    """The recipe for testing one's own code passes as it is printed."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = [block.removeprefix("python\n") for block in readme.split("```")[1::2]]
    (recipe,) = (block for block in blocks if "evolink_emulator" in block)
    pytester.makepyfile(recipe)
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=1)


def test_a_program_is_tested_with_the_fixtures(pytester: pytest.Pytester) -> None:
    """Synchronous and asynchronous programs run against the emulator without a change."""
    pytester.makepyfile(program=PROGRAM, test_program=TESTS)
    result = pytester.runpytest_inprocess(*plugin_options(), "--strict-markers", "-W", "error")
    result.assert_outcomes(passed=5)


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("mark", "it needs faults, settings, or both"),
        ("mark()", "it needs faults, settings, or both"),
        ("mark(Status, credits=1)", "Status is a class, not a fault; write Status()"),
        ("mark(Status(), Endless)", "Endless is a class, not a fault; write Endless()"),
        ("mark('Status')", "'Status' is no fault"),
        ("mark(colour=1)", "an emulator has no setting 'colour'; it has host, port,"),
        ("mark(faults=(Status(),))", "faults come first and without a keyword"),
        ("mark(duration=-1)", "duration must be a number from 0"),
        ("mark(TaskFails(task='a'))", "TaskFails: no task 'a' has been accepted"),
        ("mark(clock=ManualClock(), time_scale=2)", "time_scale is for the real time"),
    ],
)
def test_a_wrong_mark_is_explained(pytester: pytest.Pytester, mark: str, words: str) -> None:
    """A mark that cannot be is one short error that says why and how it is used."""
    pytester.makepyfile(
        f"""
        import pytest
        from evolink_async.emulator import ManualClock
        from evolink_async.emulator.faults import *

        mark = pytest.mark.evolink

        @{mark}
        def test_it(evolink_emulator):
            pass
        """
    )
    result = pytester.runpytest_inprocess(*plugin_options())
    result.assert_outcomes(errors=1)
    text = result.stdout.str()
    assert f"@pytest.mark.evolink: {words}" in text
    assert "It is used like @pytest.mark.evolink(faults.Status(503, nth=1), duration=600)" in text
    assert "Traceback" not in text


def test_a_mark_without_parentheses_after_its_fault(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark that pytest takes for a decoration of the fault's class says so."""
    # What pytest decorates the class with is taken off again.
    monkeypatch.setattr(CallbackDropped, "pytestmark", [], raising=False)
    pytester.makepyfile(
        """
        import pytest
        from evolink_async.emulator.faults import CallbackDropped

        @pytest.mark.evolink(CallbackDropped)
        def test_it(evolink_emulator):
            pass
        """
    )
    result = pytester.runpytest_inprocess(*plugin_options())
    result.assert_outcomes(errors=1)
    assert "write CallbackDropped(), with parentheses, as in @pytest.mark.e" in result.stdout.str()


def test_a_time_scale_is_enough_for_real_time(pytester: pytest.Pytester) -> None:
    """A mark with a time scale has the real time, without a clock beside it."""
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.evolink(time_scale=60)
        def test_it(evolink_emulator):
            assert evolink_emulator.clock.scale == 60
        """
    )
    pytester.runpytest_inprocess(*plugin_options()).assert_outcomes(passed=1)


def test_the_marker_is_explained(pytester: pytest.Pytester) -> None:
    """`pytest --markers` says what the marker does."""
    result = pytester.runpytest_inprocess(*plugin_options(), "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.evolink(?faults, ??settings): faults the*"])


def test_the_plugin_alone_loads_no_aiohttp(pytester: pytest.Pytester) -> None:
    """A run of pytest that uses none of the fixtures does not pay for them."""
    pytester.makepyfile(
        """
        import sys

        def test_it():
            assert "evolink_async.pytest_plugin" in sys.modules
            assert "aiohttp" not in sys.modules
        """
    )
    pytester.runpytest_subprocess(*plugin_options()).assert_outcomes(passed=1)
