"""How datasets are mixed and divided. No torch here: every program checks it before anything else."""

import re
from collections.abc import Sequence

from gqa_parallel.errors import UserError

_SHARE = r"\s*(\d+\.?\d*|\.\d+)\s*"


def check_weights(paths: Sequence[str], weights: Sequence[float] | None) -> None:
    """
    Raises:
        UserError: the weights are not one positive number per dataset.
    """
    if weights is not None and (len(weights) != len(paths) or min(weights) <= 0):
        raise UserError(
            f"data.weights ({list(weights)}) must be one positive number per entry of data.paths "
            f"({list(paths)}): each is a share of the samples. Use data.weights=null to weigh by size."
        )


def split_shares(split: str) -> list[float]:
    """Proportions of training, validation and test documents, from text such as ``95,5,0``; what is left out is 0.

    Raises:
        UserError: the text is no such list.
    """
    if not re.fullmatch(f"{_SHARE}(,{_SHARE}){{0,2}}", split) or not float(split.split(",")[0]):
        raise UserError(
            f"data.split ({split}) must be up to three numbers, the first > 0: they are the shares of "
            f"training, validation and test documents. Use \"data.split='95,5,0'\"."
        )
    shares = [float(share) for share in split.split(",")]
    return shares + [0.0] * (3 - len(shares))
