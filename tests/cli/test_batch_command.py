"""The command `evolink-async batch`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import not_found, until

from evolink_async import _clock
from evolink_async.__main__ import main
from evolink_async._cli import batch as batch_cli
from evolink_async._cli import console as console_module
from evolink_async.batch import BatchProgress
from evolink_async.batch._ledger import LEDGER
from evolink_async.emulator import Emulator, ManualClock, RealClock, faults


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """An emulated API in a thread, found by the environment; generations end at once."""
    with Emulator(pictures="tiny", time_scale=1000, duration=1, estimate=1) as emulator:
        monkeypatch.setenv("EVOLINK_API_KEY", emulator.api_key)
        monkeypatch.setenv("EVOLINK_BASE_URL", emulator.base_url)
        yield emulator


@pytest.fixture
def lakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of three prompts, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lakes.txt").write_text("lake 0\nlake 1\nlake 2\n")
    return "lakes.txt"


def test_the_command_saves_and_summarises(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table on stdout, progress on stderr; the second time nothing is bought."""
    assert main(["batch", lakes, "--out", "out"]) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (rows["saved"], rows["items"], rows["credits"]) == ("3", "3", "3")
    assert rows["gallery"] == (Path("out").resolve() / "gallery.html").as_uri()
    assert "3 of 3 saved" in err
    assert main(["batch", lakes, "--out", "out", "--no-gallery", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["saved"], report["pictures"], report["gallery"]) == (3, 0, None)
    assert api.books.accepted == 3


def test_the_command_names_what_went_wrong_and_what_to_do(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failed, uncertain and unsent items each with a reason, and the options that may help."""
    api.faults.add(
        faults.TaskFails("service_error", "\x1b[2Jbusy", prompt="lake 0", times=1),
        faults.Reset("after", route="submit", prompt="lake 1", times=1),
        faults.NotAPicture("text/html", route="result", times=1),
    )
    assert main(["batch", lakes, "--out", "out"]) == 1
    err = capsys.readouterr().err
    assert "line 1: failed, service_error" in err
    assert "line 2: may have been accepted and charged (idempotency key" in err
    assert "line 3: generated, not downloaded yet" in err
    for word in ("--resend-uncertain", "--retry-failed", "run the same command again", "busy"):
        assert word in err
    assert "\x1b" not in err
    rest = Path("rest.txt")
    rest.write_text("lake 2\n")
    assert main(["batch", str(rest), "--out", "out"]) == 1
    assert "no longer in the input: may have been accepted" in capsys.readouterr().err
    again = ["batch", lakes, "--out", "out", "--resend-uncertain", "--retry-failed"]
    assert main(again) == 0
    assert api.books.charged == 3


def test_the_command_names_what_it_kept_aside(
    api: Emulator,
    lakes: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A retouched picture gets another name, which is printed; so is why one is not downloaded."""
    # The minute in which a fresh link is tried again passes a hundred times as fast.
    monkeypatch.setattr(_clock, "default", lambda: RealClock(100.0))
    assert main(["batch", lakes, "--out", "out"]) == 0
    first, *_ = sorted(Path("out").glob("*.png"))
    first.write_bytes(b"retouched")
    api.faults.add(not_found())
    assert main(["batch", lakes, "--out", "out"]) == 1
    printed = capsys.readouterr().err
    assert re.search(
        r"line 1: generated, not downloaded yet \(task .*the host answered 404", printed
    )
    assert first.read_bytes() == b"retouched"
    api.faults.clear()
    assert main(["batch", lakes, "--out", "out", "--json"]) == 0
    out, err = capsys.readouterr()
    (kept,) = json.loads(out)["kept"]
    assert Path(kept).read_bytes() == b"retouched"
    assert f"kept as {kept}" in err


def test_the_command_says_what_is_left_to_pay_for(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 at its own limit, 3 without credits; it prints what the rest would cost."""
    assert main(["batch", lakes, "--out", "out", "--max-credits", "1"]) == 1
    assert "2 not submitted, about 2 credits" in capsys.readouterr().err
    api.faults.add(faults.Status(402, route="submit"))
    assert main(["batch", lakes, "--out", "out"]) == 3
    err = capsys.readouterr().err
    assert "error: nothing is left to spend" in err
    assert "2 not submitted, about 2 credits" in err


def test_the_command_names_every_bad_line(
    api: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad lines are printed and end with exit code 2, unless they are to be skipped."""
    source = tmp_path / "p.jsonl"
    source.write_text('"a lake"\n{"prompt": ""}\n7\n')
    assert main(["batch", str(source), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "line 2: prompt=''" in err
    assert "line 3: 7 is neither" in err
    assert api.books.requests() == ()
    assert main(["batch", str(source), "--out", str(tmp_path / "out"), "--skip-invalid"]) == 0
    assert "bad lines skipped 2" in capsys.readouterr().out


def test_the_command_runs_without_key_or_money(
    lakes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--emulator starts an emulator; without it, and without a key, the key is asked for."""
    monkeypatch.setitem(console_module.EMULATED, "clock", ManualClock())
    monkeypatch.delitem(console_module.EMULATED, "time_scale")
    monkeypatch.setitem(console_module.EMULATED, "pictures", "tiny")
    assert main(["batch", lakes, "--out", "out", "--emulator"]) == 0
    assert len(list(Path("out").glob("*.png"))) == 3
    assert main(["batch", lakes, "--out", "out", "--emulator"]) == 0
    with contextlib.closing(sqlite3.connect(Path("out") / LEDGER)) as ledger:
        ledger.execute("UPDATE items SET state = 'submitted' WHERE number = 1")
        ledger.commit()
    assert "--emulator" not in capsys.readouterr().err
    assert main(["batch", lakes, "--out", "out", "--emulator"]) == 1
    assert "each run with --emulator has an emulator of its own" in capsys.readouterr().err
    again = ["batch", lakes, "--out", "out", "--emulator", "--resubmit-expired"]
    assert main(again) == 0
    assert main(["batch", lakes, "--out", "other"]) == 2
    assert "EVOLINK_API_KEY" in capsys.readouterr().err


def test_the_command_speaks_of_its_options(
    api: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What to do next is said with options of the command line, not with Python arguments."""
    source, out = tmp_path / "p.jsonl", tmp_path / "out"
    source.write_text('"a"\n{"prompt": "b", "n": 3}\n')
    assert main(["batch", str(source), "--out", str(out)]) == 2
    first = capsys.readouterr().err
    assert "--skip-invalid" in first
    assert '"validate": false' in first
    source.write_text("\n")
    assert main(["batch", str(source), "--out", str(out)]) == 2
    source.write_text('"a"\n')
    assert main(["batch", str(source), "--out", str(source)]) == 2
    assert main(["batch", str(source), "--out", str(out), "--max-credits", "nan"]) == 2
    assert main(["batch", str(out / "gallery.html"), "--out", str(out)]) == 2
    assert main(["batch", str(source), "--out", str(out)]) == 0
    printed = first + capsys.readouterr().err
    assert not re.search(
        r"skip_invalid|validate=|resubmit_expired|max_credits|out=|source=", printed
    )
    source.write_text('{"prompt": "b", "n": 3, "validate": false}\n')
    assert main(["batch", str(source), "--out", str(out)]) in {0, 1}
    assert [task.n for task in api.books.tasks(prompt="b")] in ([3], [])
    assert [record.prompt for record in api.books.submits()] == ["a", "b"]


def test_the_command_does_not_end_with_0_if_the_manifest_is_missing(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A manifest that cannot be written is an error with advice; the pictures are saved."""
    Path("out", "manifest.jsonl").mkdir(parents=True)
    assert main(["batch", lakes, "--out", "out"]) == 3
    out, err = capsys.readouterr()
    assert "saved             3" in out
    assert "error: " in err
    assert "manifest.jsonl cannot be written" in err
    assert "see to that, then run the same batch again" in err


async def test_a_log_gets_a_line_of_progress_even_while_nothing_changes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line every few seconds while prompts are read and later; the last state once."""
    monkeypatch.setattr(batch_cli, "_LINE_INTERVAL", 0.005)
    lines: list[str] = []

    def printed() -> list[str]:
        lines.extend(capsys.readouterr().err.splitlines())
        return lines

    running, done = BatchProgress(total=1, running=1), BatchProgress(total=1, saved=1)
    async with batch_cli._progress() as show:
        await until(lambda: printed().count("reading the prompts") >= 3)
        before = len(printed())
        show(running)
        assert printed()[before:] == [batch_cli._words(running)]
        await until(lambda: printed().count(batch_cli._words(running)) >= 3)
        show(done)
    assert printed().count(batch_cli._words(done)) == 1


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (
            BatchProgress(total=9, queued=9),
            "0 of 9 saved, 0 running, 0 to download, 9 queued, 0 credits",
        ),
        (
            BatchProgress(
                total=9,
                saved=4,
                running=3,
                failed=1,
                uncertain=1,
                credits=7,
                credits_uncertain=1.5,
                rate=0.5,
                seconds_left=600,
            ),
            (
                "4 of 9 saved, 3 running, 0 to download, 0 queued, 1 failed, 1 uncertain, "
                "7 credits, 1.5 uncertain, 0.5/s, about 10 min left"
            ),
        ),
        (
            BatchProgress(total=1, running=1, rate=12.4, seconds_left=9000),
            "0 of 1 saved, 1 running, 0 to download, 0 queued, 0 credits, 12/s, about 2.5 h left",
        ),
    ],
)
def test_progress_in_words(now: BatchProgress, words: str) -> None:
    """Failures are shown if there are some; rate and time left once they are known."""
    assert batch_cli._words(now) == words


def test_progress_fits_a_terminal_of_80_columns() -> None:
    """The least important facts are left out first: failures and the time left stay."""
    now = BatchProgress(
        total=20_000,
        saved=10_000,
        running=32,
        completed=8,
        queued=9_960,
        failed=11,
        uncertain=2,
        credits=10_051,
        credits_uncertain=2,
        rate=1.2,
        seconds_left=8_000,
    )
    words = batch_cli._words(now, 80 - 13)
    assert len(words) <= 80 - 13
    for part in ("10000 of 20000 saved", "11 failed", "2 uncertain", "about 2.2 h left"):
        assert part in words
    assert batch_cli._words(now, 1000) == batch_cli._words(now)


def test_of_many_failures_some_are_printed_and_the_rest_counted(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of many failed items only the first are printed; the manifest has them all."""
    Path(lakes).write_text("".join(f"lake {k}\n" for k in range(25)))
    api.faults.add(faults.Status(400, route="submit"))
    assert main(["batch", lakes, "--out", "out"]) == 1
    err = capsys.readouterr().err
    assert err.count(": failed, ") == 20
    assert "... and 5 more items: see the manifest" in err


def command(*argv: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "evolink_async", "batch", *argv], text=True, **options
    )


def test_interrupted_it_finishes_what_runs_and_says_how_to_go_on(api: Emulator, lakes: str) -> None:
    """The first signal stops submitting; the exit code says so; the next run does the rest."""
    Path(lakes).write_text("".join(f"lake {k}\n" for k in range(400)))
    process = command(
        lakes,
        "--out",
        "out",
        "--max-in-flight",
        "2",
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while api.books.accepted < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopping: no more is submitted" in err
    assert "run the same command again to go on" in err
    assert "error" not in err
    saved = dict(line.split(maxsplit=1) for line in out.splitlines())["saved"]
    assert int(saved) == api.books.accepted < 400


def test_a_terminal_that_is_closed_interrupts_it(api: Emulator, lakes: str) -> None:
    """Running generations are finished and recorded although nobody reads stderr."""
    Path(lakes).write_text("".join(f"lake {k}\n" for k in range(400)))
    terminal, end = os.openpty()
    process = command(
        lakes,
        "--out",
        "out",
        "--max-in-flight",
        "2",
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(end)
    while api.books.accepted < 3:
        assert os.read(terminal, 4096)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 130
    saved = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert Counter(item["state"] for item in saved)["saved"] == api.books.accepted < 400


def test_without_a_terminal_to_lose_it_goes_on(api: Emulator, lakes: str) -> None:
    """Under nohup the signal of a closed terminal stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as a child of nohup inherits it
    try:
        process = command(lakes, "--out", "out", stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, before)
    while not api.books.accepted:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0


def test_interrupted_twice_it_leaves_at_once(api: Emulator, lakes: str) -> None:
    """Running generations go on without it, and the next run picks them up."""
    api.faults.add(faults.TaskHangs(50))
    process = command(lakes, "--out", "out", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    while api.books.accepted < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    while "stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "left at once; run the same command again to go on" in err
    for task in api.books.tasks():
        api.complete(task.id)
    assert main(["batch", lakes, "--out", "out", "--resend-uncertain"]) == 0
    assert api.books.accepted == 3


def test_interrupted_while_it_reads_it_leaves_at_once(api: Emulator, tmp_path: Path) -> None:
    """It does not wait for the rest of a pipe that nobody writes to."""
    ledger_file = tmp_path / "out" / LEDGER
    process = command(
        "-", "--out", str(ledger_file.parent), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stderr is not None
    while not ledger_file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert "run the same command again" in process.stderr.read()
    process.stdin.close()
    process.stderr.close()
    assert api.books.requests() == ()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo terminals on this system")
def test_on_a_terminal_it_draws_a_bar_and_a_table(api: Emulator, lakes: str) -> None:
    """One live line while it runs, a drawn table at the end."""
    terminal, end = os.openpty()
    process = command(
        lakes,
        "--out",
        "out",
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert process.wait() == 0
    assert "┃" in shown.decode() or "│" in shown.decode()
    assert b"3 of 3 saved" in shown
    assert "…" not in shown.decode()
