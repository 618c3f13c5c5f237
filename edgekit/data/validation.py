"""``validation:SHARE:SPEC``: the training split of another data set, ``SHARE`` of it held out, to choose among models by.

The other's own held-out split is never read, so it can still judge what was chosen: the digest is the other's, by which
`edgekit.evaluation.evaluation_split` knows that the rest of it was trained on.
"""

from __future__ import annotations

import dataclasses

from edgekit.errors import DataError

from . import load as load_other
from .dataset import Dataset

__all__ = ["load"]


def load(path: str) -> Dataset:
    """``path`` is ``SHARE:SPEC``, checked by `edgekit.data.find`. Raises `DataError` where the share holds no sample."""
    share, _, spec = path.partition(":")
    other = load_other(spec)
    rest, aside = other.train.part(float(share))
    if not len(aside):
        raise DataError(f"{share} of the {len(other.train)} training samples of {spec} is none", "give a larger share")
    return dataclasses.replace(other, spec=f"validation:{path}", train=rest, test=aside, all=other.train)
