"""Make cards in several processes, none of which runs Triton's interpreter."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any

from kexue_kernels.offline.card import Card

Job = tuple[Callable[..., list[Card]], tuple[Any, ...]]


def run(jobs: list[Job], progress: Callable[[], None]) -> list[Card]:
    """The jobs' cards, in the jobs' order; `progress` is called as each job ends."""
    if not jobs:
        return []
    workers = min(os.cpu_count() or 1, len(jobs))
    fresh = multiprocessing.get_context("spawn")
    with _not_interpreting(), ProcessPoolExecutor(workers, mp_context=fresh) as pool:
        futures: list[Future[list[Card]]] = [pool.submit(f, *arguments) for f, arguments in jobs]
        for _ in as_completed(futures):
            progress()
        return [card for future in futures for card in future.result()]


@contextlib.contextmanager
def _not_interpreting() -> Iterator[None]:
    """Children start with the environment as it is now; Triton reads this at import."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
