"""What was learned apart, used together; and what one task gives another. Pure functions of scores, in any shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from featcl.errors import FeatclError


def composition_gap(whole: ArrayLike, parts: Sequence[ArrayLike]) -> np.ndarray:
    """acc(a∘b) - acc(a)·acc(b): 0 where parts fail independently and putting them together costs nothing.

    Negative: the parts are there but do not come together. Positive: they come together more often than chance has
    it, as when the same items fail in both.

    Args:
        whole: Share of right answers to questions that need all parts.
        parts: Shares of right answers to questions of each part alone.

    Raises:
        FeatclError: If fewer than two parts are given.

    Source: after the compositionality gap of Press et al. 2022, arXiv:2210.03350, with independent parts as the
    expectation, since here parts and wholes are asked about different arguments.
    """
    if len(parts) < 2:
        raise FeatclError(f"a composition has at least two parts, not {len(parts)}")
    return np.asarray(whole, dtype=float) - np.prod(np.stack([np.asarray(part, dtype=float) for part in parts]), axis=0)


def ratio_to(own: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """own / reference; NaN where the reference is not positive."""
    whole = np.asarray(reference, dtype=float)
    positive = whole > 0
    return np.where(positive, np.asarray(own, dtype=float) / np.where(positive, whole, 1.0), np.nan)


def naming_gain(named: ArrayLike, unnamed: ArrayLike) -> np.ndarray:
    """acc(sources named) - acc(sources not named): what is lost because the sources have to be found."""
    return np.asarray(named, dtype=float) - np.asarray(unnamed, dtype=float)


def cross_task_discrimination(across: ArrayLike, within: Sequence[ArrayLike]) -> np.ndarray:
    """acc(choices across tasks) - mean of acc(choices within each task).

    Negative: each task is known, but not which task something belongs to.

    Args:
        across: Share of right answers to questions whose choices come from several tasks, never asked in learning.
        within: Shares of right answers to questions within each of the tasks.

    Raises:
        FeatclError: If no task is given.

    Source: after Guo, Hu, Zhao & Liu 2023 (CVPR), "Dealing with cross-task class discrimination in online continual
    learning"; here as the difference to what is known within tasks.
    """
    if not len(within):
        raise FeatclError("cross-task discrimination needs the scores within the tasks")
    return np.asarray(across, dtype=float) - np.mean(np.stack([np.asarray(w, dtype=float) for w in within]), axis=0)


def gain_share(final: ArrayLike, base: ArrayLike, reference: ArrayLike) -> np.ndarray:
    """(final - base) / (reference - base): the share of the reference's gain that was reached; 1 is all of it.

    For tasks that help each other the reference is joint training. NaN where the reference gained nothing.

    Source: a normalised score as in Mnih et al. 2015, Nature 518, with base and reference in the places of a random
    player and a person.
    """
    start = np.asarray(base, dtype=float)
    return ratio_to(np.asarray(final, dtype=float) - start, np.asarray(reference, dtype=float) - start)
