"""What benchmarks share that run this library and a baseline in turn, each in its own process."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec

Row = dict[str, float]


def machine() -> str:
    """What a measurement was made on."""
    parts = (
        f"{platform.machine()} {os.cpu_count()} cores",
        platform.system(),
        f"Python {platform.python_version()}",
        f"aiohttp {version('aiohttp')}",
        f"evolink-async {version('evolink-async')}",
        "with msgspec" if find_spec("msgspec") else "without msgspec",
    )
    return ", ".join(parts)


@contextmanager
def server(*command: str) -> Iterator[list[str]]:
    """Run a Python *command* meanwhile; what it prints on its first two lines."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield [process.stdout.readline().strip(), process.stdout.readline().strip()]
    finally:
        process.terminate()
        process.wait()


def client(*command: str) -> Row:
    """Run a Python *command* to its end; the JSON object it prints."""
    run = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE)
    row: Row = json.loads(run.stdout)
    return row


def interleaved(
    names: Sequence[str], rounds: int, measure: Callable[[str], Row]
) -> dict[str, list[Row]]:
    """The rows of each client; every other round runs them in the opposite order."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            rows[name].append(measure(name))
            print(f"round {number + 1} {name}: {rows[name][-1]}", file=sys.stderr)
    return rows


def print_table(rows: Mapping[str, Sequence[Row]]) -> None:
    """One line a client, the median of its rounds in each column."""
    columns = list(next(iter(rows.values()))[0])
    print(f"{'client':<10}" + "".join(f"{column:>15}" for column in columns))
    for name, values in rows.items():
        cells = [statistics.median(row[column] for row in values) for column in columns]
        print(f"{name:<10}" + "".join(f"{cell:>15.2f}" for cell in cells))


def print_ratio(rows: Mapping[str, Sequence[Row]], column: str, ours: str, theirs: str) -> None:
    """How often *column* of *ours* holds that of *theirs*, compared within each round."""
    ratios = sorted(
        one[column] / other[column] for one, other in zip(rows[ours], rows[theirs], strict=True)
    )
    print(
        f"{column}, {ours} / {theirs}, round by round: median {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
