"""How many heads have their keys and values at once."""

BUDGET = 128 * 2**20  # bytes


def heads_per_group(
    tokens: int, H: int, dk: int, dv: int, itemsize: int, budget: int = BUDGET
) -> int:
    """The size of groups of H heads whose expanded keys and values fit in a budget, in bytes.

    A head has tokens * (dk + dv) numbers; `tokens` are those of the whole batch, B * T. Groups
    are made as equal as they can be: ceil(H / size) of them, all but the last of that size. At
    least one head, whatever the budget.
    """
    head = max(1, tokens * (dk + dv) * itemsize)
    most = min(max(H, 1), max(1, budget // head))
    count = -(-H // most)
    return max(1, -(-H // max(1, count)))
