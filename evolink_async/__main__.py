"""``python -m evolink_async`` and the ``evolink-async`` command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments, without the program's name; default those of the process,
            which then ends here if it was interrupted.

    Returns:
        The exit code: 0 done, 1 a task failed, 2 usage, 3 API or network, 130 interrupted.
    """
    try:
        code = _run(argv)
    except KeyboardInterrupt:  # before a command has started
        code = 130
    if code == 130 and argv is None:
        # A thread may still be resolving a name, and the interpreter would wait for it.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        import click  # noqa: F401, PLC0415 - only to see whether it is installed
        import rich  # noqa: F401, PLC0415 - only to see whether it is installed
    except ImportError:
        sys.stderr.write(
            "error: the command line needs packages that are not installed: "
            "pip install 'evolink-async[cli]'\n"
        )
        return 2
    from evolink_async._cli.commands import run  # noqa: PLC0415 - needs the extra

    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
