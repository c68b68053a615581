"""``python -m evolink_async.emulator``: serve the emulator until interrupted."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import NoReturn

from evolink_async.emulator._rules import FEATURES
from evolink_async.emulator._server import Emulator, serve


class _Parser(argparse.ArgumentParser):
    """Refuses a wrong option in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command's options: those settings of an `Emulator` that a command line can express."""
    options = _Parser(
        prog="python -m evolink_async.emulator",
        description="Serve an emulated EvoLink API until interrupted.",
    )
    add = options.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8765, help="port; 0 for any free one (%(default)s)")
    add("--api-key", default="emulator-key", help="the key it accepts (%(default)s)")
    add("--credits", type=float, default=1000.0, help="credits to start with (%(default)s)")
    add("--price", type=float, default=1.0, help="credits a result costs (%(default)s)")
    more = "an image model it knows besides the documented ones; may be repeated"
    add("--model", dest="models", metavar="NAME", action="append", default=[], help=more)
    codes = "errors carry words, not numbers, as codes"
    add("--string-codes", action="store_true", help=codes)
    without = f"an undocumented feature it does not have; may be repeated: {', '.join(FEATURES)}"
    add("--without", action="append", default=[], metavar="FEATURE", help=without)
    origin = (
        "where all callbacks go, whatever host they name, such as http://127.0.0.1:8080; "
        "without it none is sent"
    )
    add("--callback-origin", metavar="URL", help=origin)
    most = "bytes of a request; more is a 413 (%(default)s)"
    add("--max-body", type=int, default=1 << 20, help=most)
    bounds, seconds = ("LEAST", "MOST"), "seconds a generation takes (4 9)"
    add("--duration", type=float, nargs=2, default=(4.0, 9.0), metavar=bounds, help=seconds)
    scale = "emulated seconds per real second (%(default)s)"
    add("--time-scale", type=float, default=1.0, help=scale)
    estimate = "estimated seconds in the answer to a submit; else from --duration"
    add("--estimate", type=float, help=estimate)
    pictures = "full: drawn from the prompt, with pillow; tiny: of one colour"
    add("--pictures", choices=("full", "tiny"), default="full", help=pictures)
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted.

    Returns:
        The exit code: 0 when interrupted, 3 when the port is taken, 2 for a wrong value.

    Raises:
        SystemExit: 2 for a wrong option, 0 after ``--help``.
    """
    options = vars(parser().parse_args(argv))
    for name in ("duration", "models", "without"):
        options[name] = tuple(options[name])
    try:
        emulator = Emulator(**options)
    except (ImportError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        asyncio.run(serve(emulator))
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        sys.stderr.write(f"error: cannot listen on {emulator.host} port {emulator.port}: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
