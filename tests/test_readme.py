"""The README: its commands, its example and its tables say what the package does."""

from __future__ import annotations

import asyncio
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from evolink_async import PollPolicy, RetryPolicy, Session, Timeout
from evolink_async.__main__ import main
from evolink_async._cli import commands
from evolink_async.emulator import Emulator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES: list[tuple[str, str]] = re.findall(
    r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL
)
COMMANDS = FENCES[0][1].splitlines()
PYTHON = [text for language, text in FENCES if language == "python"]


def table(first: str) -> list[list[str]]:
    """The cells of the rows of the table whose heading starts with *first*."""
    _, _, below = README.partition(f"| {first} |")
    rows = below.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_first_block_holds_two_commands_that_need_nothing_else() -> None:
    """Each makes an environment of its own, which is not kept in the repository, and uses it."""
    assert len(COMMANDS) == 2
    folders = [shlex.split(command)[3] for command in COMMANDS]
    assert len(set(folders)) == 2
    for command, folder in zip(COMMANDS, folders, strict=True):
        made, *steps = command.split(" && ")
        assert made == f"python3 -m venv {folder}"
        assert folder.startswith(".venv")
        assert all(f"{folder}/bin/" in step for step in steps)
    assert ".venv*/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_extras_they_install_exist(command: str) -> None:
    """``pip install '.[extra]'`` names an extra of pyproject.toml."""
    (extra,) = re.findall(r"'\.\[(\w+)\]'", command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]


def test_the_first_command_leaves_a_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What follows the installation saves one 1280x1280 picture in the folder the text names."""
    monkeypatch.chdir(tmp_path)
    program, *argv = shlex.split(COMMANDS[0].rpartition(" && ")[2])
    assert Path(program).name == "evolink-async"
    assert main(argv) == 0
    (path,) = capsys.readouterr().out.splitlines()
    assert Path(path).parent == Path("out")
    assert "in `out/`" in README
    with Image.open(path) as picture:
        assert picture.size == (1280, 1280)
        assert len(picture.resize((64, 64)).convert("RGB").getcolors(4096) or ()) > 100


async def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first example, as it stands, submits, watches and saves."""
    script = tmp_path / "example.py"
    script.write_text(PYTHON[0], encoding="utf-8")
    async with Emulator(time_scale=1000, pictures="tiny", estimate=1) as emulator:
        monkeypatch.setenv("EVOLINK_BASE_URL", emulator.base_url)
        monkeypatch.setenv("EVOLINK_API_KEY", emulator.api_key)
        example = await asyncio.create_subprocess_exec(
            sys.executable, script, cwd=tmp_path, stdout=PIPE, stderr=PIPE
        )
        out, err = await example.communicate()
        (task,) = emulator.books.tasks()
    assert (example.returncode, err) == (0, b"")
    *progress, path = out.decode().splitlines()
    assert progress[-1] == "completed 100"
    assert (tmp_path / path).exists()
    assert task.prompt == "A serene lake at sunset"


def test_the_example_fits_on_the_first_screen() -> None:
    """Ten lines of code."""
    assert len([line for line in PYTHON[0].splitlines() if line]) <= 10


@pytest.mark.parametrize("snippet", PYTHON)
def test_all_python_compiles(snippet: str) -> None:
    """Every snippet is Python; recipes may await where they stand."""
    lines = snippet.splitlines(keepends=True)
    body = "".join(f"    {line}" for line in lines)
    compile(f"async def recipe(session, prompts):\n{body}", "README.md", "exec")


def test_every_command_is_in_the_table() -> None:
    """The table names the commands that exist, with their arguments."""
    documented = {tuple(row[0].split()[1:]) for row in table("command")}
    existing = {
        (name, *(p.metavar or str(p.name).upper() for p in _arguments(command)))
        for name, command in commands.cli.commands.items()
    }
    assert documented == existing


def _arguments(command: click.Command) -> list[click.Argument]:
    return [param for param in command.params if isinstance(param, click.Argument)]


def test_every_exit_code_is_in_the_table() -> None:
    """The table and the docstring of the entry point name the same exit codes."""
    documented = [row[0] for row in table("exit code")]
    assert documented == re.findall(r"(\d+) [a-zA-Z]", inspect.getdoc(main) or "")


@pytest.mark.parametrize(("setting", "default"), [row[:2] for row in table("setting")])
def test_defaults_are_those_of_the_code(setting: str, default: str) -> None:
    """The table of defaults is true."""
    owner, _, name = setting.partition(".")
    owners: dict[str, Any] = {
        "Session": Session,
        "PollPolicy": PollPolicy,
        "RetryPolicy": RetryPolicy,
        "Timeout": Timeout,
    }
    value = inspect.signature(owners[owner]).parameters[name].default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    assert (f"{value:g}" if number else str(value)) == default


def test_every_default_is_in_the_table() -> None:
    """No setting of the three policies is left out."""
    documented = {row[0] for row in table("setting")}
    existing = {
        f"{owner.__name__}.{name}"
        for owner in (Timeout, PollPolicy, RetryPolicy)
        for name in inspect.signature(owner).parameters
    }
    assert existing <= documented


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """The script takes the command from the README instead of having its own."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    assert "pytest" not in script
    show = _line(script, "test_command=") + '; printf %s "$test_command"'
    taken = subprocess.run(  # noqa: S603 - our own script
        ["bash", "-c", show],  # noqa: S607 - wherever it is
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert taken.stdout == COMMANDS[1]


def _line(script: str, start: str) -> str:
    (line,) = [line for line in script.splitlines() if line.startswith(start)]
    return line


async def test_the_callback_example_runs(unused_tcp_port: int) -> None:
    """The callback example, as it stands, ends by a callback."""
    (example,) = [text for text in PYTHON if "CallbackReceiver" in text]
    script = example.replace("8080", str(unused_tcp_port))
    script = script.replace("Emulator(", "Emulator(time_scale=20, ", 1)
    ran = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=PIPE, stderr=PIPE
    )
    out, err = await ran.communicate()
    assert (ran.returncode, err) == (0, b"")
    assert out.endswith(b" 1\n")
