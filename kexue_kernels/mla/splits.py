"""Into how many parts a decode kernel cuts each sequence: from shapes alone, known on the host."""

MAX_SPLITS = 256  # of which joining one query reads all
FULL = 0.85  # of the best share of the device that any number of splits keeps busy


def choose_splits(programs: int, blocks: int, multiprocessors: int) -> int:
    """How many splits keep the device busy, of `blocks` of rows in the longest sequence.

    The fewest whose last wave is about as full as that of any other number.
    """
    most = max(1, min(MAX_SPLITS, blocks, 4 * multiprocessors))

    def busy(splits: int) -> float:
        waves = programs * splits / multiprocessors
        return waves / -(-programs * splits // multiprocessors)

    best = max(map(busy, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= FULL * best)
