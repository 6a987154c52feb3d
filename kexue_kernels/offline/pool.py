"""Make cards in several processes, none of which runs Triton's interpreter."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from kexue_kernels.offline.card import Card

Job = tuple[Callable[..., list[Card]], tuple[Any, ...]]


def run(jobs: list[Job]) -> Iterator[list[Card]]:
    """Each job's cards, in the jobs' order, as they are made."""
    if not jobs:
        return
    workers = min(os.cpu_count() or 1, len(jobs))
    fresh = multiprocessing.get_context("spawn")
    with _not_interpreting(), ProcessPoolExecutor(workers, mp_context=fresh) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in jobs]
        try:
            for future in futures:
                yield future.result()
        finally:  # what is not begun stays so when the reader stops
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _not_interpreting() -> Iterator[None]:
    """Children start with the environment as it is now; Triton reads this at import."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
