"""A file of prompts in, a folder of pictures out, whatever happens in between.

::

    async with Session() as session:
        report = await run_batch(session, "prompts.jsonl", "out/")

The folder holds the pictures, the ledger (what has been paid for, and what became of it),
``manifest.jsonl`` and ``gallery.html``. Running the same batch again goes on where it ended:
nothing is submitted twice, and nothing that was paid for is forgotten.
"""

from evolink_async.batch._ledger import Invalid
from evolink_async.batch._progress import BatchCounts, BatchProgress, Stop
from evolink_async.batch._report import BatchReport, Problem
from evolink_async.batch._run import run_batch

__all__ = [
    "BatchCounts",
    "BatchProgress",
    "BatchReport",
    "Invalid",
    "Problem",
    "Stop",
    "run_batch",
]
