"""What a user can get wrong, said once and clearly."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input. The message names the values and a way out; programs print it without a traceback.

    Form: ``name (value) must RELATION other (value): WHY. FIX.``
    """


def one_of(values: Sequence[int]) -> str:
    """``1, 2 or 4``, for the way out."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last
