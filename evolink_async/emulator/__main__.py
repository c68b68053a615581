"""``python -m evolink_async.emulator``: serve the emulator until interrupted."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from evolink_async.emulator._server import Emulator, serve


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    options = argparse.ArgumentParser(
        prog="python -m evolink_async.emulator",
        description="Serve an emulated EvoLink API until interrupted.",
    )
    options.add_argument("--host", default="127.0.0.1", help="address to listen on")
    options.add_argument("--port", type=int, default=8765, help="port; 0 for any free one")
    options.add_argument("--api-key", default="emulator-key", help="the key it accepts")
    options.add_argument("--credits", type=float, default=1000.0, help="credits to start with")
    options.add_argument(
        "--duration",
        type=float,
        nargs=2,
        default=(4.0, 9.0),
        metavar=("LEAST", "MOST"),
        help="seconds a generation takes",
    )
    options.add_argument(
        "--time-scale", type=float, default=1.0, help="emulated seconds per real second"
    )
    options.add_argument("--pictures", choices=("full", "tiny"), default="full")
    options.add_argument("--seed", type=int, default=0, help="of everything drawn by chance")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted.

    Returns:
        The exit code: 0 when interrupted, 3 when the port is taken, 2 for a wrong option.
    """
    options = parser().parse_args(argv)
    try:
        emulator = Emulator(
            host=options.host,
            port=options.port,
            api_key=options.api_key,
            credits=options.credits,
            duration=(options.duration[0], options.duration[1]),
            time_scale=options.time_scale,
            pictures=options.pictures,
            seed=options.seed,
        )
    except (ImportError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    try:
        asyncio.run(serve(emulator))
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        sys.stderr.write(f"error: cannot listen on port {options.port}: {error}\n")
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
