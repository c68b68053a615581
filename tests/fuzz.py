"""Properties of everything that reads what others sent, and a way to try them for long.

``python tests/fuzz.py --seconds 1800`` tries new examples until the time is over, prints
how many there were and each failure with the smallest example of it; exit code 1 if any.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import strategies
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from evolink_async import EvolinkError
from evolink_async._http.protocol import decipher


def decipher_gives_a_value_or_our_error(
    status: int, headers: Mapping[str, str], body: bytes
) -> None:
    """`decipher` of anything: JSON for a success, else an error the table has a row for."""
    try:
        decipher(status, headers, body)
    except EvolinkError as error:
        _assert_one_fate(error)
        _assert_presentable(error)
    else:
        assert 200 <= status < 300, status


def _assert_one_fate(error: EvolinkError) -> None:
    assert not (error.resendable and error.may_have_been_accepted)


def from_json_gives_a_value_or_our_error(reader: strategies.Reader, value: object) -> None:
    """A ``from_json`` of anything: a value whose every property can be read, or our error."""
    try:
        read = reader.read(value)
    except EvolinkError as error:
        _assert_presentable(error)
    else:
        repr(read)
        for name in dir(type(read)):
            if not name.startswith("_"):
                getattr(read, name)
        read.to_json()


def values_survive_json(value: Any) -> None:
    """``from_json(to_json(x)) == x``, the hash included."""
    again = type(value).from_json(value.to_json())
    assert again == value
    assert again.to_json() == value.to_json()
    assert hash(again) == hash(value)


def _assert_presentable(error: EvolinkError) -> None:
    """One line of bounded length without anything a terminal would obey."""
    text = str(error)
    obeyed = [c for c in text if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
    assert not obeyed, obeyed
    assert len(text) < 1500, len(text)


Property = Callable[[], None]


def _counted(seen: Counter[str], name: str, check: Callable[..., None]) -> Callable[..., None]:
    def count(args: tuple[Any, ...]) -> None:
        seen[name] += 1
        check(*args)

    return count


def properties(seen: Counter[str]) -> dict[str, Property]:
    """Every property as a function that tries some hundred examples, counted in *seen*."""
    long = settings(
        max_examples=500,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    found: dict[str, Property] = {}

    def add(name: str, check: Callable[..., None], *inputs: st.SearchStrategy[Any]) -> None:
        found[name] = long(given(st.tuples(*inputs))(_counted(seen, name, check)))

    add(
        "decipher",
        decipher_gives_a_value_or_our_error,
        strategies.statuses,
        strategies.headers,
        strategies.bodies,
    )
    for reader in strategies.READERS:
        add(
            f"{reader.name}.from_json",
            from_json_gives_a_value_or_our_error,
            st.just(reader),
            strategies.values_for(reader.name),
        )
    add("to_json", values_survive_json, strategies.values)
    return found


def fuzz(seconds: float, *, clock: Callable[[], float] = time.monotonic) -> tuple[int, list[str]]:
    """(examples tried, failures as text); a property that has failed is not tried again."""
    seen: Counter[str] = Counter()
    left = properties(seen)
    failures: list[str] = []
    end = clock() + seconds
    while left:
        for name, attempt in list(left.items()):
            try:
                attempt()
            except BaseException as exc:  # what it finds may be anything, exception groups too
                if isinstance(exc, KeyboardInterrupt):
                    raise
                failures.append(f"{name}: {''.join(traceback.format_exception(exc))}")
                del left[name]
            if clock() >= end:
                return sum(seen.values()), failures
    return sum(seen.values()), failures


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz for as long as the command line says."""
    parser = argparse.ArgumentParser(description="Try hostile answers until the time is over.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default 60)")
    given_args = parser.parse_args(argv)
    count, failures = fuzz(given_args.seconds)
    sys.stdout.write("".join(f"FAILED {failure}\n" for failure in failures))
    sys.stdout.write(f"{count} examples, {len(failures)} properties failed\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
