"""``python -m evolink_async.emulator``: serve the emulator until interrupted."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import NoReturn

from evolink_async.emulator._server import Emulator, serve
from evolink_async.emulator._settings import FEATURES

_DEFAULT = " (%(default)s)"


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
    _add_service(options)
    _add_behaviour(options)
    return options


def _add_service(options: argparse.ArgumentParser) -> None:
    options.add_argument("--host", default="127.0.0.1", help="address to listen on" + _DEFAULT)
    options.add_argument(
        "--port", type=int, default=8765, help="port; 0 for any free one" + _DEFAULT
    )
    options.add_argument("--api-key", default="emulator-key", help="the key it accepts" + _DEFAULT)
    options.add_argument(
        "--credits", type=float, default=1000.0, help="credits to start with" + _DEFAULT
    )
    options.add_argument(
        "--price", type=float, default=1.0, help="credits a result costs" + _DEFAULT
    )
    options.add_argument(
        "--model",
        dest="models",
        metavar="NAME",
        action="append",
        default=[],
        help="an image model it knows besides the documented ones; may be repeated",
    )
    options.add_argument(
        "--string-codes", action="store_true", help="errors carry words, not numbers, as codes"
    )
    options.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="FEATURE",
        help="an undocumented feature it does not have; may be repeated: " + ", ".join(FEATURES),
    )
    options.add_argument(
        "--callback-origin",
        metavar="URL",
        help="where all callbacks go, whatever host they name, such as http://127.0.0.1:8080; "
        "without it none is sent",
    )
    options.add_argument(
        "--max-body", type=int, default=1 << 20, help="bytes of a request; more is a 413" + _DEFAULT
    )


def _add_behaviour(options: argparse.ArgumentParser) -> None:
    options.add_argument(
        "--duration",
        type=float,
        nargs=2,
        default=(4.0, 9.0),
        metavar=("LEAST", "MOST"),
        help="seconds a generation takes (4 9)",
    )
    options.add_argument(
        "--time-scale", type=float, default=1.0, help="emulated seconds per real second" + _DEFAULT
    )
    options.add_argument(
        "--estimate",
        type=float,
        help="estimated seconds in the answer to a submit; else from --duration",
    )
    options.add_argument(
        "--pictures",
        choices=("full", "tiny"),
        default="full",
        help="full: drawn from the prompt, with pillow; tiny: of one colour",
    )
    options.add_argument("--seed", type=int, default=0, help="of everything random" + _DEFAULT)


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
