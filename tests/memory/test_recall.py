"""Forgetting inside the memory: curves that fall with what came after and rise with size, and chance as a control."""

from __future__ import annotations

from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.memory import NeuralMemory, capacity, recall_curve


def build(head_dim: int = 32, **settings: Any) -> NeuralMemory:
    return NeuralMemory(64, **{"heads": 2, "head_dim": head_dim, "chunk_size": 16, **settings})


def test_recall_falls_with_what_was_stored_after() -> None:
    curve = recall_curve(build(), items=256, after=(4, 16, 32, 64, 128))
    shares = curve.recalled.tolist()
    assert shares[0] > 0.9
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.2
    assert curve.cosine[0] > 0.6 > 0.3 > curve.cosine[-1]
    assert curve.items == (24, 72, 136, 264, 520)  # streams · heads of the items within n ± n / 4
    assert "recalled" in str(curve)


def test_asked_under_other_keys_recall_is_at_chance() -> None:
    curve = recall_curve(build(), items=256, after=(4, 16, 64), shuffled=True)
    assert curve.chance == 1 / 256
    assert float(curve.recalled.max()) < 0.05
    assert float(curve.cosine.abs().max()) < 0.1
    assert float(recall_curve(build(), items=256, after=(4, 16, 64)).recalled[:2].min()) > 0.8


def test_an_empty_memory_recalls_nothing() -> None:
    """Negative control: the same stream with steps of zero."""
    curve = recall_curve(build(), items=64, after=(1, 8), gates=(0.0, 0.5, 0.0))
    assert float(curve.recalled.max()) <= 0.1
    assert float(curve.cosine.abs().max()) == 0.0


def test_faster_decay_forgets_sooner() -> None:
    slow, fast = (
        recall_curve(build(64), items=128, after=(64,), gates=(0.12, 0.5, decay)).cosine.item()
        for decay in (0.001, 0.1)
    )
    assert slow > 0.3
    assert fast < 0.5 * slow


def test_capacity_grows_with_the_state() -> None:
    found = [capacity(build(width), stored=(4, 8, 16, 32, 64)) for width in (8, 16, 32)]
    assert [one.nbytes for one in found] == sorted(one.nbytes for one in found)
    held = [one.held(0.8) for one in found]
    assert held[0] < held[1] < held[2]
    for one in found:
        assert list(one.recalled) == sorted(one.recalled, reverse=True)
    assert found[0].held(1.1) == 0


def test_a_deeper_memory_of_the_same_width_holds_more() -> None:
    linear, deep = (
        capacity(build(depth=depth, expansion=8.0), stored=(128,), gates=(0.1, 0.5, 0.0)) for depth in (1, 2)
    )
    assert deep.nbytes > 4 * linear.nbytes
    assert deep.recalled[0] > linear.recalled[0] + 0.05


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(FeatclError, match="from 0 to 15"):
        recall_curve(build(), items=16, after=(16,))
    with pytest.raises(FeatclError, match="from 0 to 15"):
        recall_curve(build(), items=16, after=())
    with pytest.raises(FeatclError, match="2 or more items"):
        capacity(build(), stored=(1,))
