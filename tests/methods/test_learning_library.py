"""Every method of the library through a learner: it learns, and is saved, resumed and rolled back to the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.learning.methods import Methods
from featcl.methods.build import METHODS
from tests.methods.library import LIBRARY, ask, differing, everything, first_task, learner_with, second_task

ALL = sorted(LIBRARY)
STILL = {"cartridge", "notes"}  # the weights stand still by then, so that no version is made
REMEMBER = ["ewc", "si", "mas", "lwf", "gpm", "replay", "der", "olora", "retrieval", "sparse_memory", "cartridge"]


def made(name: str, **options: Any) -> Learner:
    case = LIBRARY[name]
    return learner_with(case.make(), kind=case.kind, **options)


def test_every_method_of_a_config_is_tried_here() -> None:
    assert set(METHODS) == set(LIBRARY)


@pytest.mark.parametrize("name", ALL)
def test_a_method_learns_and_goes_on_from_a_folder_to_the_same_bits(name: str, tmp_path: Path) -> None:
    learner = first_task(made(name))
    assert learner.methods.task == "b"
    learner.save(tmp_path)
    expected = everything(second_task(learner))
    cost = learner.cost()[name]
    assert min(cost.stored_bytes, cost.forward_tokens, cost.backward_tokens) >= 0
    assert math.isfinite(learner.adapter.delta_norm())

    fresh = made(name)
    fresh.restore_(tmp_path)
    assert differing(expected, everything(fresh))  # negative control
    assert differing(expected, everything(second_task(fresh))) == []
    assert fresh.cost() == learner.cost()


@pytest.mark.parametrize("name", sorted(set(ALL) - STILL))
def test_a_rollback_returns_to_the_same_bits(name: str) -> None:
    learner = first_task(made(name))
    version, again = learner.version, iter([ask(50), ask(51)])
    while learner.version == version:  # baking collects first
        trajectory, before = next(again), everything(learner)
        learner.observe(trajectory)
    learner.observe(ask(52))
    after = everything(learner)
    learner.rollback(version)
    assert differing(before, everything(learner)) == []
    assert differing(before, after)  # negative control
    learner.observe(trajectory)
    learner.observe(ask(52))
    assert differing(after, everything(learner)) == []


@pytest.mark.parametrize("name", REMEMBER)
def test_without_its_state_it_ends_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: what the two tests above compare depends on the method's own state."""
    learner = first_task(made(name))
    learner.save(tmp_path)
    expected = everything(second_task(learner))
    fresh = made(name)
    with monkeypatch.context() as patch:
        patch.setattr(Methods, "load_state_", lambda self, state: setattr(self, "task", state["task"]))
        patch.setattr(Methods, "load_tensors_", lambda *_: None)
        fresh.restore_(tmp_path)
    try:
        second_task(fresh)
    except (FeatclError, KeyError):  # a method may miss its memory
        return
    found = differing(expected, everything(fresh))
    assert any(key.startswith("tensors" if name == "cartridge" else "coordinates") for key in found)
