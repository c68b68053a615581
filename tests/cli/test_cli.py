"""The command line: what it prints where, its exit codes, and how it is left."""

from __future__ import annotations

import asyncio
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, closing, contextmanager, redirect_stdout
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
from attrs import frozen
from hostile import HostileServer, answer, cut, error, hang, snapshot
from PIL import Image

from evolink_async import Session
from evolink_async.__main__ import main
from evolink_async._cli import commands
from evolink_async.emulator import Emulator, ManualClock, faults

T = TypeVar("T")

KEY = "sk-test-secret-0123456789"
TASK = snapshot()["id"]
EVOLINK = ("-m", "evolink_async")
CLEAR = "\x1b[2J\x1b]0;owned\x07"
UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@frozen
class Ended:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Run(Protocol):
    """Runs the command line in this process."""

    def __call__(self, *argv: str) -> Ended: ...


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
    monkeypatch.setattr(commands, "_EMULATED", settings)
    return settings


@contextmanager
def in_thread(server: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """*server* on an event loop of its own, beside the command under test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        started = asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(10)
        try:
            yield started
        finally:
            stop = server.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(_awaited(stop), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _awaited(stop: Any) -> None:
    await stop
    await asyncio.sleep(0)


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


def submit(api: Emulator, **fields: Any) -> str:
    """Have *api* complete a task that the command line knows nothing of; its id."""
    fields = {"model": "wan2.5-text-to-image", "prompt": "A lake", **fields}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with closing(HTTPConnection(api.base_url.removeprefix("http://"))) as connection:
        connection.request("POST", "/v1/images/generations", json.dumps(fields), headers)
        task_id: str = json.load(connection.getresponse())["id"]
    return task_id


# ---------------------------------------------------------------------------------------------
# Usage


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "Missing command"),
        (["paint"], "No such command 'paint'"),
        (["generate"], "Missing argument 'PROMPT'"),
        (["generate", "A lake", "--colour"], "No such option"),
        (["generate", "A lake", "--n", "many"], "'many' is not a valid integer"),
        (["generate", "A lake", "--timeout", "0"], "0"),
        (["generate", "A lake", "--timeout", "nan", "--emulator"], "deadline=nan is not allowed"),
        (["generate", " "], "prompt=' ' is not allowed"),
        (
            ["generate", "A lake", "--n", "3"],
            "n=3 is not allowed: 1, 2 or 4; to let the API decide, pass --no-validate",
        ),
        (["generate", "A lake", "--size", "1x1"], "size='1x1' is not allowed"),
        (["generate", "A lake", "--model", "other"], "model='other' is not allowed"),
        (["generate", "A lake"], "no API key is given; set EVOLINK_API_KEY;"),
        (["generate", "A lake", "--emulator", "--idempotency-key", "short"], "idempotency_key="),
        (["status", "no/id"], "task_id='no/id' is not allowed"),
        (["list", "--status", "dreaming"], "'dreaming' is not one of"),
        (["list", "--limit", "0"], "0 is not in the range"),
        (["emulator", "--port", "70000"], "70000 is not in the range"),
        (["emulator", "--pictures", "huge"], "pictures must be"),
    ],
)
def test_usage_errors(
    run: Run,
    fast: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    said: str,
) -> None:
    """What cannot be asked for is one line on stderr and exit code 2."""
    if argv[:1] == ["status"]:
        monkeypatch.setenv("EVOLINK_API_KEY", KEY)
    ended = run(*argv)
    assert ended.code == 2
    assert ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_what_was_typed_is_shown_without_control_characters(run: Run) -> None:
    """An argument quoted in an error cannot drive the terminal."""
    ended = run(f"pa{CLEAR}int")
    assert ended.code == 2
    assert not UNSEEN.search(ended.err)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["generate", "--help"], ["--version"]])
def test_help_and_version(run: Run, argv: list[str]) -> None:
    """Help and version are results: stdout, exit code 0."""
    ended = run(*argv)
    assert ended.code == 0
    assert ended.err == ""
    expected = importlib.metadata.version("evolink-async") if argv == ["--version"] else "Usage:"
    assert expected in ended.out


def python(code: str, *argv: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run *code* in a new interpreter."""
    return subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False, **settings
    )


def test_help_loads_neither_aiohttp_nor_rich() -> None:
    """Help needs nothing that takes long to import."""
    ended = python(
        "import sys; from evolink_async.__main__ import main; code = main(['--help'])\n"
        "sys.exit(code or sorted({'aiohttp', 'rich.console', 'PIL'} & set(sys.modules)) or 0)"
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_importing_main_loads_no_click() -> None:
    """The entry point itself can be imported without the extra."""
    ended = python(
        "import sys, evolink_async.__main__\n"
        "sys.exit(sorted({'click', 'rich', 'aiohttp'} & set(sys.modules)) or 0)"
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_a_missing_extra_is_named(missing: str) -> None:
    """Without click or rich the command says what to install."""
    ended = python(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == sys.argv[1]:\n"
        "            raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from evolink_async.__main__ import main\n"
        "sys.exit(main(['--help']))",
        missing,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "pip install 'evolink-async[cli]'" in line


def test_the_emulator_without_pillow_is_named() -> None:
    """Without pillow ``--emulator`` says what to install."""
    ended = python(
        "import sys; sys.modules['PIL'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'PIL' else find(name, *rest)\n"
        "from evolink_async.__main__ import main\n"
        "sys.exit(main(['generate', 'A lake', '--emulator']))"
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "pip install 'evolink-async[emulator]'" in line


# ---------------------------------------------------------------------------------------------
# generate


@pytest.mark.usefixtures("fast")
def test_generate_saves_pictures_and_prints_their_paths(run: Run, tmp_path: Path) -> None:
    """Paths are the only thing on stdout; changes are lines on stderr."""
    ended = run(
        "generate", "A lake", "--emulator", "--n", "2", "--size", "1024x768", "--out", "o/p"
    )
    assert ended.code == 0
    paths = [Path(line) for line in ended.out.splitlines()]
    assert len(paths) == 2
    assert {path.parent for path in paths} == {Path("o/p")}
    for path in paths:
        with Image.open(tmp_path / path) as picture:
            assert picture.size == (1024, 768)
    lines = ended.err.splitlines()
    assert re.fullmatch(r"task-\S+ pending 0 %", lines[0])
    assert re.fullmatch(r"task-\S+ completed 100 %", lines[-1])
    assert len(lines) == len(set(lines))


@pytest.mark.usefixtures("fast")
def test_generate_saves_in_the_current_folder_by_default(run: Run, tmp_path: Path) -> None:
    """Without --out files appear where one is."""
    ended = run("generate", "A lake", "--emulator")
    assert [path.name for path in tmp_path.iterdir()] == [Path(ended.out.strip()).name]


@pytest.mark.usefixtures("fast")
def test_generate_prints_one_json_document(run: Run, tmp_path: Path) -> None:
    """With --json stdout is the task as the API sent it, and the files."""
    ended = run("generate", "A peaceful lake", "--n", "4", "--emulator", "--json")
    assert ended.code == 0
    assert ended.json["status"] == "completed"
    assert len(ended.json["results"]) == 4
    assert sorted(ended.json["files"]) == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.usefixtures("fast")
def test_the_embedded_emulator_needs_no_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key, address and proxy of the environment do not concern ``--emulator``."""
    monkeypatch.setenv("EVOLINK_API_KEY", KEY)
    monkeypatch.setenv("EVOLINK_BASE_URL", "https://elsewhere.invalid")
    assert run("generate", "A lake", "--emulator").code == 0


def test_the_embedded_emulator_draws_pictures_in_a_few_seconds() -> None:
    """Unless told otherwise it draws, and its time runs faster than ours."""
    settings: dict[str, Any] = dict(commands._EMULATED)
    least, most = settings.pop("duration")
    scale = settings.pop("time_scale")
    assert 1 <= least / scale < most / scale < 10
    assert settings == {}


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ([], {}),
        (["--size", "768x1024"], {"size": "768x1024"}),
        (["--n", "4"], {"n": 4}),
        (["--no-prompt-extend"], {"prompt_extend": False}),
        (["--model", "other", "--no-validate"], {"model": "other"}),
        (["--n", "3", "--no-validate"], {"n": 3}),
        (["--idempotency-key", "my-own-key-0123456789"], {}),
    ],
)
def test_options_reach_the_api(
    run: Run, server: HostileServer, options: list[str], sent: dict[str, Any]
) -> None:
    """An option sets its field; the others are not sent."""
    server.script = [error(400)]
    ended = run("generate", "A lake", *options)
    assert ended.code == 3
    (post,) = server.posts
    assert post.json == {"model": "wan2.5-text-to-image", "prompt": "A lake", **sent}
    if "--idempotency-key" in options:
        assert post.headers["Idempotency-Key"] == options[1]


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_nothing_is_bought_that_cannot_be_saved(
    run: Run, server: HostileServer, tmp_path: Path, folder: str
) -> None:
    """A folder that cannot be made is found out before the submit."""
    (tmp_path / "file").touch()
    ended = run("generate", "A lake", "--out", folder)
    assert ended.code in {2, 3}
    assert len(ended.errors) == 1
    assert server.received == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            faults.TaskFails("content_policy_violation", f"not {CLEAR}that"),
            "failed (content_policy_violation)",
        ),
        (faults.TaskCancelled(), "was cancelled"),
        (faults.TaskHangs(40), "did not end in time, it is processing"),
    ],
)
def test_a_task_that_does_not_complete(
    run: Run, fast: dict[str, Any], fault: faults.Fault, said: str
) -> None:
    """Exit code 1, an error line, and with --json the task as last seen."""
    fast["faults"] = (fault,)
    ended = run("generate", "A lake", "--emulator", "--timeout", "100", "--json")
    assert ended.code == 1
    (line,) = ended.errors
    assert said in line
    assert ended.json["status"] in {"failed", "cancelled", "processing"}
    assert not UNSEEN.search(ended.err)
    assert not UNSEEN.search(ended.out)


def test_a_timeout_says_how_to_go_on(run: Run, server: HostileServer) -> None:
    """A task that outlasts --timeout is not lost."""
    server.script = [answer(200, snapshot(task_info={"estimated_time": 0}))]
    server.reads = [answer(200, snapshot(status="processing", progress=10))]
    ended = run("generate", "A lake", "--timeout", "0.3", "--out", "my pictures")
    assert ended.code == 1
    assert ended.out == ""
    assert f"task {TASK} did not end in time" in ended.errors[0]
    assert f"evolink-async wait {TASK}" in ended.err
    assert f"evolink-async download {TASK} --out 'my pictures'" in ended.err


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (error(401), "HTTP 401"),
        (error(402), "HTTP 402"),
        (error(404), "HTTP 404"),
        (answer(403, {"error": {"code": 403, "message": f"no{CLEAR}"}}), "HTTP 403"),
    ],
)
def test_a_refused_submit(run: Run, server: HostileServer, behaviour: Any, said: str) -> None:
    """What the API refuses is one line and exit code 3."""
    server.script = [behaviour]
    ended = run("generate", "A lake")
    assert ended.code == 3
    (line,) = ended.err.splitlines()
    assert said in line
    assert not UNSEEN.search(ended.err)
    assert KEY not in ended.err


def test_an_uncertain_submit_says_how_to_ask_again(run: Run, server: HostileServer) -> None:
    """A lost answer costs exit code 3 and gives the key to ask again with."""
    server.script = [cut]
    ended = run("generate", "A lake")
    assert ended.code == 3
    (post,) = server.posts
    assert "nothing was resent" in ended.errors[0]
    assert "may have been accepted" in ended.err
    assert f"--idempotency-key {post.headers['Idempotency-Key']}" in ended.err
    assert "evolink-async list" in ended.err


def test_asking_again_finds_the_first_answer(run: Run, api: Emulator) -> None:
    """--idempotency-key asks for what an earlier command may have bought."""
    key = "my-own-key-0123456789"
    for _ in range(2):
        assert run("generate", "A lake", "--idempotency-key", key, "--overwrite").code == 0
    assert api.books.accepted == 1


def test_no_network(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An API that cannot be reached is exit code 3; what was tried again is shown."""
    monkeypatch.setenv("EVOLINK_API_KEY", KEY)
    monkeypatch.setenv("EVOLINK_BASE_URL", "http://127.0.0.1:9")
    ended = run("status", TASK)
    assert ended.code == 3
    assert "cannot connect to http://127.0.0.1:9" in ended.errors[0]


def test_results_that_cannot_be_saved_are_not_lost(run: Run, server: HostileServer) -> None:
    """A failed download says how to repeat it."""
    done = snapshot(status="completed", results=[f"{server.base_url}/gone.png"])
    server.script, server.reads = [answer(200, done)], [answer(403, b"expired")]
    ended = run("generate", "A lake", "--out", "out")
    assert ended.code == 3
    assert len(ended.errors) == 1
    assert f"evolink-async download {TASK} --out out --overwrite" in ended.err


def test_a_task_without_results(run: Run, server: HostileServer) -> None:
    """Completed with nothing to show is not done."""
    server.script = [answer(200, snapshot(status="completed", results=[]))]
    ended = run("generate", "A lake")
    assert (ended.code, ended.out) == (1, "")
    assert "completed without results" in ended.errors[0]


# ---------------------------------------------------------------------------------------------
# The other commands


def test_status(run: Run, api: Emulator) -> None:
    """One line, or the task as the API sent it."""
    task_id = submit(api)
    assert run("status", task_id).out == f"{task_id} completed 100 %\n"
    ended = run("status", task_id, "--json")
    assert (ended.code, ended.json["id"]) == (0, task_id)


def test_status_of_a_failed_task_is_not_a_failure(run: Run, server: HostileServer) -> None:
    """Looking has succeeded; what is seen is shown without control characters."""
    told = {"code": f"bad{CLEAR}", "message": f"worse\n{CLEAR}\x9b31m\u202e"}
    server.reads = [answer(200, snapshot(status="failed", error=told))]
    ended = run("status", TASK)
    assert ended.code == 0
    assert ended.out.startswith(f"{TASK} failed 0 % bad")
    assert len(ended.out.splitlines()) == 1
    assert not UNSEEN.search(ended.out)
    assert "\u202e" not in ended.out


def test_status_without_progress(run: Run, server: HostileServer) -> None:
    """What the API does not say is not made up, and who only looked is not warned."""
    server.reads = [answer(200, snapshot(progress=None))]
    ended = run("status", TASK)
    assert (ended.out, ended.err) == (f"{TASK} pending\n", "")


def test_status_of_an_unknown_task(run: Run, api: Emulator) -> None:
    """An id the API does not know is exit code 3."""
    ended = run("status", "task-unknown")
    assert ended.code == 3
    assert "HTTP 404" in ended.errors[0]


def test_wait_prints_links(run: Run, api: Emulator) -> None:
    """The links of all results, one a line; or the task as the API sent it."""
    task_id = submit(api, n=2)
    ended = run("wait", task_id, "--timeout", "60")
    assert ended.code == 0
    assert tuple(ended.out.splitlines()) == api.books.task(task_id).result_urls
    again = run("wait", task_id, "--json")
    assert tuple(again.json["results"]) == api.books.task(task_id).result_urls
    assert "files" not in again.json


def test_wait_for_a_failed_task(run: Run, server: HostileServer) -> None:
    """Waiting for a task that failed is exit code 1."""
    server.reads = [answer(200, snapshot(status="failed", error={"code": "service_error"}))]
    ended = run("wait", TASK, "--json")
    assert ended.code == 1
    assert ended.json["status"] == "failed"
    assert "evolink-async" not in ended.err


def test_a_wait_the_api_refuses_says_how_to_go_on(run: Run, server: HostileServer) -> None:
    """A task that cannot be looked at any more still goes on."""
    server.reads = [error(400)]
    ended = run("wait", TASK, "--timeout", "0.3")
    assert ended.code == 1
    assert f"evolink-async wait {TASK}" in ended.err


def test_download(run: Run, api: Emulator, tmp_path: Path) -> None:
    """Files are saved once, and replaced only with --overwrite."""
    task_id = submit(api, n=2)
    first = run("download", task_id, "--out", "out")
    assert first.code == 0
    assert sorted(first.out.splitlines()) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.glob("out/*")
    )
    again = run("download", task_id, "--out", "out")
    assert again.code == 3
    assert len(again.errors) == 1
    assert f"evolink-async download {task_id} --out out --overwrite" in again.err
    assert run("download", task_id, "--out", "out", "--overwrite").code == 0
    told = run("download", task_id, "--out", "out", "--overwrite", "--json", "--timeout", "9").json
    assert told["files"] == first.out.splitlines()


def test_paths_are_printed_as_they_are(run: Run, api: Emulator) -> None:
    """Another program finds the file by what is printed, whatever the folder is called."""
    folder = os.fsdecode(b"out \xff\xc3\xa9")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run("download", submit(api), "--out", folder).code == 0
    printed = stdout.buffer.getvalue() if isinstance(stdout.buffer, io.BytesIO) else b""
    assert Path(os.fsdecode(printed.strip())).parent == Path(folder)
    assert Path(os.fsdecode(printed.strip())).exists()


def test_list(run: Run, api: Emulator) -> None:
    """A line per task, newest first; or a JSON list."""
    ids = [submit(api) for _ in range(3)]
    lines = run("list", "--limit", "2").out.splitlines()
    assert [line.split()[0] for line in lines] == ids[:0:-1]
    assert lines[0].split()[1] == "completed"
    assert lines[0].split()[3] == "wan2.5-text-to-image"
    rows = run("list", "--status", "completed", "--json").json
    assert [row["id"] for row in rows] == ids[::-1]
    assert run("list", "--status", "failed").out == ""
    assert run("list", "--model", "other", "--json").json == []


def test_list_of_odd_rows(run: Run, server: HostileServer) -> None:
    """A row's words and times may be anything."""
    rows = [
        {"id": "task-1", "status": CLEAR, "model": f"m{CLEAR}", "created_at": 1e300},
        {"id": "task-2", "status": "new", "created_at": 1757156493},
        {"id": "task-3", "status": "new"},
    ]
    server.reads = [answer(200, {"data": rows, "total": 3})]
    ended = run("list")
    assert ended.code == 0
    first, second, third = ended.out.splitlines()
    assert not UNSEEN.search(ended.out)
    assert first.startswith("task-1")
    assert "2025-09-06T11:01:33Z" in second
    assert third.split() == ["task-3", "new", "-", "-"]


def test_credits(run: Run, server: HostileServer) -> None:
    """What is left of account and key; an amount the API did not tell is a question mark."""
    user = {"remaining_credits": 1095.39, "used_credits": 135.9}
    token = {"remaining_credits": 99416.44, "used_credits": 583.55}
    tight, loose = {"user": user, "token": token}, {"user": {"remaining_credits": 1}}
    server.reads = [
        answer(200, {"data": tight}),
        answer(200, {"data": {**tight, "token": {"unlimited_credits": True}}}),
        answer(200, {"data": loose}),
    ]
    assert run("credits").out == (
        "account: 1095.39 left, 135.9 used\nthis key: 99416.44 left, 583.55 used\n"
    )
    assert run("credits").out.splitlines()[1] == "this key: no limit, ? used"
    assert run("credits", "--json").json["data"]["user"]["remaining_credits"] == 1


def test_what_is_tried_again_is_shown(run: Run, server: HostileServer) -> None:
    """Patience the API asks for is a line on stderr, and no error."""
    good = answer(200, {"data": {"user": {"remaining_credits": 1}}})
    server.reads = [error(429, Retry_After="0"), good]
    ended = run("credits")
    assert ended.code == 0
    assert "cooling down" in ended.err
    assert ended.errors == []


# ---------------------------------------------------------------------------------------------
# What nobody expects


def test_an_unexpected_error_does_not_show_the_key(
    run: Run, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug is reported in full, but for the key."""
    row = {"id": "task-1", "status": "new", "created_at": 1}
    server.reads = [answer(200, {"data": [row], "total": 1})]

    def broken(*_: object) -> None:
        raise RuntimeError(f"Bearer {KEY}\n{CLEAR}")

    monkeypatch.setattr(time, "gmtime", broken)
    ended = run("list")
    assert ended.code == 3
    assert "unexpected RuntimeError" in ended.errors[0]
    assert "in broken" in ended.err
    assert KEY not in ended.err
    assert not UNSEEN.search(ended.err)


def test_output_may_be_any_text_stream(run: Run, api: Emulator) -> None:
    """A program that replaces sys.stdout by what it has can call the command line."""
    task_id = submit(api)
    with redirect_stdout(io.StringIO()) as stdout:
        assert run("status", task_id).code == 0
    assert stdout.getvalue() == f"{task_id} completed 100 %\n"


def test_what_an_encoding_lacks_is_escaped(
    run: Run, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word the terminal cannot spell does not end the command."""
    server.reads = [answer(200, snapshot(status="moderé"))]
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("status", TASK).code == 0
    stdout.seek(0)
    assert stdout.read() == f"{TASK} moder\\xe9 0 %\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written_is_an_error(api: Emulator) -> None:
    """A full disk under stdout is not passed over in silence."""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, *EVOLINK, "wait", submit(api)], stdout=full, check=False
        )
    assert ended.returncode == 3


def test_a_command_runs_without_output_streams(
    run: Run, api: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where stdout and stderr are closed, files are saved all the same."""
    task_id = submit(api)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        code = main(["download", task_id])
    assert code == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_importing() -> None:
    """Ctrl-C before the command line is there is exit code 130 and no traceback."""
    ended = python(
        "import sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "from evolink_async.__main__ import main\n"
        "sys.exit(main(['--help']))"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_interrupt_before_anything_began(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while still importing or parsing is exit code 130 and no traceback."""

    def impatient(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "Runner", impatient)
    with pytest.warns(RuntimeWarning, match="never awaited"):
        ended = run("credits")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.splitlines()[-1] == "interrupted"


def test_a_reader_that_leaves_does_not_stop_a_command(api: Emulator, tmp_path: Path) -> None:
    """Files are saved and the exit code is 0 even if nobody reads stdout and stderr any more."""
    task_id = submit(api)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, *EVOLINK, "download", task_id, "--out", tmp_path],
            stdout=writing,
            stderr=writing,
            check=False,
        )
    finally:
        os.close(writing)
    assert ended.returncode == 0
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------
# On a terminal


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Stderr on a pseudo-terminal; what is yielded says what it has shown."""
    ours, theirs = os.openpty()
    shown = bytearray()

    def drain() -> None:
        try:
            while data := os.read(ours, 65536):
                shown.extend(data)
        except OSError:  # Linux's way to say that the other end is closed
            pass

    thread = threading.Thread(target=drain)
    thread.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    try:
        with open(theirs, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:  # noqa: PTH123 - a descriptor
            patch.setattr(sys, "stderr", stderr)
            yield lambda: shown.decode("utf-8", "replace")
    finally:
        thread.join(10)
        os.close(ours)


@pytest.mark.usefixtures("fast")
def test_a_terminal_gets_a_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal progress is a bar, and stdout still holds paths only."""
    with terminal(monkeypatch) as shown:
        ended = run("generate", "A lake", "--emulator")
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 1
    assert "━" in shown()
    assert "completed" in shown()


def test_a_bar_shows_no_control_characters_of_the_server(
    run: Run, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status words and markup from the server are inert on a terminal."""
    odd = snapshot(status=f"odd{CLEAR}[red]", progress=5)
    done = snapshot(status="completed", results=[f"{server.base_url}/x"])
    server.reads = [answer(200, odd), answer(200, done)]
    with terminal(monkeypatch) as shown:
        ended = run("wait", TASK)
    assert ended.code == 0
    assert CLEAR not in shown()
    assert "\x1b]0;owned" not in shown()
    assert re.search(rf"{TASK} odd[^━]*\[red\]", shown())


@pytest.mark.usefixtures("fast")
def test_a_dumb_terminal_gets_lines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot move its cursor is not asked to."""
    with terminal(monkeypatch) as shown:
        monkeypatch.setenv("TERM", "dumb")
        ended = run("generate", "A lake", "--emulator")
    assert ended.code == 0
    assert "\x1b" not in shown()
    assert "completed 100 %" in shown()


# ---------------------------------------------------------------------------------------------
# Leaving


@contextmanager
def process(argv: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, ended in any case."""
    child = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def ended_by(child: subprocess.Popen[str], *numbers: signal.Signals) -> Ended:
    for number in numbers:
        child.send_signal(number)
    out, err = child.communicate(timeout=30)
    return Ended(child.returncode, out, err)


def heard(server: HostileServer) -> threading.Event:
    """Set once *server* has received a request."""
    event = threading.Event()
    server.on_request = lambda _: event.set()
    return event


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_waiting(
    server: HostileServer, tmp_path: Path, number: signal.Signals
) -> None:
    """The id of what goes on and how to pick it up are printed; exit code 130."""
    with process([*EVOLINK, "generate", "A lake", "--out", "out"], tmp_path) as child:
        assert child.stderr is not None
        assert "pending" in child.stderr.readline()
        ended = ended_by(child, number)
    assert (ended.code, ended.out) == (130, "")
    hint, last = ended.err.splitlines()
    assert f"evolink-async wait {TASK}" in hint
    assert f"evolink-async download {TASK} --out out" in hint
    assert last == "interrupted"


def test_interrupted_in_the_middle_of_a_submit(server: HostileServer, tmp_path: Path) -> None:
    """The key of a submit in the air is printed, and nothing waits for its answer."""
    server.script = [hang]
    received = heard(server)
    with process([*EVOLINK, "generate", "A lake"], tmp_path) as child:
        assert received.wait(30)
        ended = ended_by(child, signal.SIGINT)
    assert (ended.code, ended.out) == (130, "")
    (post,) = server.posts
    hint, last = ended.err.splitlines()
    assert f"--idempotency-key {post.headers['Idempotency-Key']}" in hint
    assert "may have been accepted" in hint
    assert last == "interrupted"


def test_interrupted_before_anything_was_sent(server: HostileServer, tmp_path: Path) -> None:
    """A submit that was refused, and waits to be sent again, is nothing to worry about."""
    server.script = [error(429, Retry_After="100")]
    with process([*EVOLINK, "generate", "A lake"], tmp_path) as child:
        assert child.stderr is not None
        while "cooling down" not in child.stderr.readline():
            pass
        ended = ended_by(child, signal.SIGINT)
    assert ended.code == 130
    assert ended.err.splitlines()[-2:] == ["nothing was submitted", "interrupted"]


@pytest.mark.parametrize("emulated", [False, True])
def test_interrupted_just_as_the_answer_came(emulated: bool) -> None:  # noqa: FBT001 - a parameter
    """A submit that was accepted in the last moment is told by its task."""
    task = Session(KEY).task(TASK)
    told = commands._left_behind(task, commands._Order(folder="out", emulated=emulated))
    assert told.startswith(f"task {TASK}")
    assert ("evolink-async download" in told) is not emulated


@pytest.mark.parametrize("command", ["generate", "download"])
def test_interrupted_while_downloading(server: HostileServer, tmp_path: Path, command: str) -> None:
    """A paid result that is not on disk yet is not lost."""
    done = snapshot(status="completed", results=[f"{server.base_url}/slow.png"])
    server.script, server.reads = [answer(200, done)], [answer(200, done), hang]
    if command == "generate":
        server.reads = [hang]
    received = threading.Event()
    server.on_request = lambda request: received.set() if "slow" in request.path else None
    argument = "A lake" if command == "generate" else TASK
    with process([*EVOLINK, command, argument, "--out", "out"], tmp_path) as child:
        assert received.wait(30)
        ended = ended_by(child, signal.SIGINT)
    assert (ended.code, ended.out) == (130, "")
    assert f"evolink-async download {TASK} --out out --overwrite" in ended.err
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_with_an_emulator(tmp_path: Path) -> None:
    """What ran on an embedded emulator ends with it, and that is what is said."""
    with process([*EVOLINK, "generate", "A lake", "--emulator"], tmp_path) as child:
        assert child.stderr is not None
        assert "pending" in child.stderr.readline()
        ended = ended_by(child, signal.SIGINT)
    assert ended.code == 130
    hint, last = ended.err.splitlines()
    assert "ends here, with its emulator" in hint
    assert last == "interrupted"


def test_interrupted_while_looking(server: HostileServer, tmp_path: Path) -> None:
    """Where nothing goes on there is nothing to say."""
    server.reads = [hang]
    received = heard(server)
    with process([*EVOLINK, "credits"], tmp_path) as child:
        assert received.wait(30)
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(130, "", "interrupted\n")


def test_interrupted_while_a_name_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that hangs in the resolver does not keep the process."""
    monkeypatch.setenv("EVOLINK_API_KEY", KEY)
    code = (
        "import socket, sys, time\n"
        "def hang(*_, **__):\n"
        "    print('looking', flush=True)\n"
        "    time.sleep(1000)\n"
        "socket.getaddrinfo = hang\n"
        "sys.argv = ['evolink-async', 'credits']\n"
        "from evolink_async.__main__ import main\n"
        "sys.exit(main())"
    )
    with process(["-c", code], tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "looking\n"
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(130, "", "interrupted\n")


def test_a_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    """Whatever the first one waits for, the second one does not."""
    code = (
        "import asyncio\n"
        "from evolink_async._cli import console\n"
        "async def stubborn():\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        try:\n"
        "            await asyncio.Event().wait()\n"
        "        except asyncio.CancelledError:\n"
        "            print('never', flush=True)\n"
        "console.drive(stubborn())"
    )
    with process(["-c", code], tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "never\n"
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(-signal.SIGINT, "", "")


def test_the_emulator_serves_until_interrupted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says where it is, can be used by the other commands, and ends without complaint."""
    options = ["--port", "0", "--credits", "7", "--duration", "1", "2", "--time-scale", "1000"]
    options += ["--pictures", "tiny", "--seed", "3"]
    with process([*EVOLINK, "emulator", *options], tmp_path) as child:
        assert child.stdout is not None
        for _ in range(2):
            name, _, value = child.stdout.readline().strip().partition("=")
            monkeypatch.setenv(name, value)
        assert run("credits").out.startswith("account: 7 left, 0 used")
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(0, "", "")


def test_an_emulator_on_a_taken_port(run: Run, server: HostileServer) -> None:
    """A port that somebody else has is exit code 3."""
    ended = run("emulator", "--port", server.base_url.rpartition(":")[2])
    assert ended.code == 3
    assert len(ended.errors) == 1
