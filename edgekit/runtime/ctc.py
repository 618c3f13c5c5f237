"""Reading a line: CTC's per-step probabilities -> characters (Graves et al., ICML 2006). Pure numpy, for the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLANK", "read_line"]

BLANK = 0
_UNLIKELY = 1e-4  # a beam does not follow characters less likely than this at a step


def read_line(scores: NDArray[np.float32], beam: int = 1) -> tuple[list[int], float]:
    """Probabilities (steps, alphabet) -> (indices of the characters read, their mean probability; 0 for an empty line).

    ``beam`` 1 takes the best character of each step; above, it sums over all alignments of the ``beam`` best readings
    (prefix beam search, Hannun et al., arXiv:1408.2873), without a language model.
    """
    path = scores.argmax(1)
    starts = np.flatnonzero((path != BLANK) & (path != np.concatenate([[BLANK], path[:-1]])))
    greedy = [int(path[i]) for i in starts]
    if beam == 1 or (read := _beam(scores, beam)) == greedy:
        return greedy, float(scores[starts, path[starts]].mean()) if len(starts) else 0.0
    return read, float(scores[_aligned(scores, read), read].mean()) if read else 0.0


def _aligned(scores: NDArray[np.float32], read: list[int]) -> list[int]:
    """A step for each character of ``read``, in order, such that their summed probability is highest."""
    best = np.zeros((len(read) + 1, len(scores) + 1))
    best[1:, 0] = -np.inf
    for i, c in enumerate(read, 1):
        for t in range(1, len(scores) + 1):
            best[i, t] = max(best[i, t - 1], best[i - 1, t - 1] + scores[t - 1, c])
    steps, t = [], len(scores)
    for i in range(len(read), 0, -1):
        while best[i, t] == best[i, t - 1]:
            t -= 1
        t -= 1
        steps.append(t)
    return steps[::-1]


def _beam(scores: NDArray[np.float32], width: int) -> list[int]:
    """The reading with the highest probability. Each prefix has two: its last step was blank, or was not."""
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (1.0, 0.0)}
    for step in scores.astype(np.float64):
        likely = [int(c) for c in np.flatnonzero(step > _UNLIKELY) if c != BLANK]
        grown: dict[tuple[int, ...], tuple[float, float]] = {}

        def add(prefix: tuple[int, ...], blank: float, other: float, grown: dict[tuple[int, ...], tuple[float, float]]) -> None:
            before = grown.get(prefix, (0.0, 0.0))
            grown[prefix] = (before[0] + blank, before[1] + other)

        for prefix, (blank, other) in beams.items():
            last = prefix[-1] if prefix else BLANK
            add(prefix, (blank + other) * step[BLANK], other * step[last] if prefix else 0.0, grown)
            for c in likely:  # a doubled character needs a blank between
                add((*prefix, c), 0.0, (blank if c == last else blank + other) * step[c], grown)
        best = sorted(grown.items(), key=lambda item: -(item[1][0] + item[1][1]))[:width]
        total = sum(blank + other for _, (blank, other) in best) or 1.0  # rescaled, so that long lines do not underflow
        beams = {prefix: (blank / total, other / total) for prefix, (blank, other) in best}
    return list(max(beams.items(), key=lambda item: item[1][0] + item[1][1])[0])
