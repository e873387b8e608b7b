"""Sparse updates: which slots are chosen, by hand, and that no other moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.sparse_memory import SparseMemory, slot_norms, tf_idf
from featcl.streams import Trajectory
from tests.methods.replaying import Bench, ask, resumes

BACKGROUND = [Trajectory(f"b{n}", text=f"background text number {n} about nothing") for n in range(4)]


def test_tf_idf_by_hand() -> None:
    scores = tf_idf(torch.tensor([3.0, 1.0, 0.0, 4.0]), torch.tensor([0, 0, 0, 3]), texts=3)
    assert scores.tolist() == pytest.approx([3 / 8 * math.log(4), 1 / 8 * math.log(4), 0.0, 0.0])
    assert tf_idf(torch.zeros(2), torch.zeros(2, dtype=torch.int), texts=3).tolist() == [0.0, 0.0]


def test_the_norm_of_a_slot() -> None:
    gradient = torch.tensor([[3.0, 0.0], [4.0, 2.0]])
    assert slot_norms(gradient, 0).tolist() == pytest.approx([3.0, 20**0.5])
    assert slot_norms(gradient, 1).tolist() == pytest.approx([5.0, 2.0])
    assert slot_norms(torch.tensor([-2.0, 1.0]), 0).tolist() == [2.0, 1.0]


def moved_slots(bench: Bench, method: SparseMemory, before: dict[str, torch.Tensor]) -> int:
    after = bench.adapter.named_parameters()
    moves = {name: after[name].detach() - before[name] for name in before}
    return sum(int((slot_norms(move, method._axis(name, move)) > 0).sum()) for name, move in moves.items())


@pytest.mark.parametrize("slots", ["rank", "free"])
@pytest.mark.parametrize("kind", ["none", "write", "read", "both", "residual", "shift"])
def test_no_more_slots_move_than_are_allowed(kind: str, slots: str) -> None:
    bench = Bench(kind=kind)
    bench.optimizer = torch.optim.AdamW(bench.adapter.parameters(), lr=1e-2, weight_decay=0.1)
    bench.move_()
    method = SparseMemory(background=BACKGROUND, top=3, slots=slots)
    method.begin_task_("a", bench.view())
    for number in range(4):  # after the first, momentum and decay pull at the slots of earlier updates
        before = bench.adapter.coordinates()
        bench.observe(ask(number), method)
        assert 1 <= moved_slots(bench, method, before) <= 3
    bench.observe(ask(9))
    assert moved_slots(bench, method, before) > 3  # negative control: without the method


def test_slots_that_the_background_uses_are_left_alone() -> None:
    bench = Bench()
    bench.move_()
    own = bench.encode(ask(3))
    method = SparseMemory(background=[ask(3)], top=4, used=0.02)  # the background is about what is learned here
    method.begin_task_("a", bench.view())
    uses = method._joined(bench.gradient(own))
    chosen = torch.cat(list(method._choose(bench.gradient(own)).values()))
    most = uses.topk(max(1, round(0.02 * len(uses)))).indices
    assert not chosen[most].any()
    assert chosen.sum() == 4
    free = SparseMemory(background=BACKGROUND, top=4, used=0.02)  # negative control: nothing of it in the background
    free._documents = torch.zeros_like(method._documents)  # type: ignore[arg-type]
    assert torch.cat(list(free._choose(bench.gradient(own)).values()))[uses.topk(4).indices].all()


def test_sparse_memory_resumes_to_the_same_bits() -> None:
    make = lambda: SparseMemory(background=BACKGROUND, top=5)  # noqa: E731
    assert resumes(make, [ask(n) for n in range(6)], cut=3, task=True)


def test_bad_settings_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"background": []}, "no background"),
        ({"background": BACKGROUND, "top": 0}, "top must be"),
        ({"background": BACKGROUND, "used": 1.0}, "used must be"),
        ({"background": BACKGROUND, "slots": "rows"}, "slots 'rows'"),
    ]
    for given, message in cases:
        with pytest.raises(FeatclError, match=message):
            SparseMemory(**given)
    bench = Bench()
    with pytest.raises(FeatclError, match="there are only"):
        SparseMemory(background=BACKGROUND, top=10**6).begin_task_("a", bench.view())
    with pytest.raises(FeatclError, match="begin_task_ comes before"):
        bench.observe(ask(1), SparseMemory(background=BACKGROUND))
