"""What each command prints, and its exit code."""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import CLEAR, KEY, TASK, UNSEEN, Run, python, submit
from hostile import HostileServer, answer, cut, error, snapshot
from PIL import Image

from evolink_async._cli.console import EMULATED
from evolink_async.emulator import Emulator, faults

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
    """Wrong usage is one line on stderr and exit code 2."""
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
    """Without --out files are saved in the current folder."""
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
    """``--emulator`` ignores key, address and proxy of the environment."""
    monkeypatch.setenv("EVOLINK_API_KEY", KEY)
    monkeypatch.setenv("EVOLINK_BASE_URL", "https://elsewhere.invalid")
    assert run("generate", "A lake", "--emulator").code == 0


def test_the_embedded_emulator_draws_pictures_in_a_few_seconds() -> None:
    """By default it draws pictures, and its time runs faster than real time."""
    settings: dict[str, Any] = dict(EMULATED)
    least, most = settings.pop("duration")
    scale = settings.pop("time_scale")
    assert 1 <= least / scale < most / scale < 10
    assert settings == {"credits": 1e9}


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
    """A folder that cannot be made is an error before the submit."""
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
    """A completed task without results is exit code 1."""
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
    """The command succeeds; the message is shown without control characters."""
    told = {"code": f"bad{CLEAR}", "message": f"worse\n{CLEAR}\x9b31m\u202e"}
    server.reads = [answer(200, snapshot(status="failed", error=told))]
    ended = run("status", TASK)
    assert ended.code == 0
    assert ended.out.startswith(f"{TASK} failed 0 % bad")
    assert len(ended.out.splitlines()) == 1
    assert not UNSEEN.search(ended.out)
    assert "\u202e" not in ended.out


def test_status_without_progress(run: Run, server: HostileServer) -> None:
    """Progress that the API does not report is left out, and nothing is on stderr."""
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
    """A task that cannot be polled any more still goes on."""
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
    """What is left of account and key; an amount that the API left out is a question mark."""
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


def test_retries_are_shown(run: Run, server: HostileServer) -> None:
    """A wait that the API asks for is a line on stderr, and no error."""
    good = answer(200, {"data": {"user": {"remaining_credits": 1}}})
    server.reads = [error(429, Retry_After="0"), good]
    ended = run("credits")
    assert ended.code == 0
    assert "cooling down" in ended.err
    assert ended.errors == []
