"""Merging as a method: snapshots per task, and what the adapter can hold of their merge."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.merging import Merging
from tests.methods.coins import round_trip, same_tensors
from tests.methods.tiny_learner import Tiny

A, B = ("abcd abcd",), ("vwxyz vw",)
KINDS = (("write", {}), ("read", {}), ("both", {}), ("write", {"rank": 2}), ("read", {"rank": 2}))


def separate(kind: str, constraint: dict, texts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """ΔW of one task, learned from the start."""
    tiny = Tiny(kind, constraint=constraint)
    for _ in range(5):
        tiny.step_(Merging(method="average"), tiny.task(*texts)[0])
    return tiny.deltas()


@pytest.mark.parametrize(("kind", "constraint"), KINDS)
def test_the_average_of_a_constrained_kind_is_exact(kind: str, constraint: dict) -> None:
    tiny, method = Tiny(kind, constraint=constraint), Merging(method="average")
    for task, texts in (("a", A), ("b", B)):
        tiny.learn_(method, task, tiny.task(*texts))
    one, two = separate(kind, constraint, A), separate(kind, constraint, B)
    for name, delta in tiny.deltas().items():
        assert torch.allclose(delta, (one[name] + two[name]) / 2, atol=1e-5)
        assert not torch.allclose(delta, two[name], atol=1e-3)  # negative control: not just the last task
    assert max(method.lost) < 1e-5


def test_plain_lora_gets_the_nearest_of_its_rank() -> None:
    tiny, method = Tiny("none"), Merging(method="average")
    for task, texts in (("a", A), ("b", B)):
        tiny.learn_(method, task, tiny.task(*texts))
    one, two = separate("none", {}, A), separate("none", {}, B)
    squares = [0.0, 0.0]
    for name, delta in tiny.deltas().items():
        mean = (one[name] + two[name]) / 2
        u, s, vt = torch.linalg.svd(mean)
        nearest = (u[:, :4] * s[:4]) @ vt[:4]
        assert torch.allclose(delta, nearest, atol=1e-5)
        squares = [squares[0] + float((mean - nearest).square().sum()), squares[1] + float(mean.square().sum())]
    assert method.lost[0] < 1e-5  # one task has the adapter's own rank
    assert method.lost[1] == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-3)
    assert method.lost[1] > 0.05


def test_alpha_is_part_of_the_update() -> None:
    tiny, method = Tiny("none", constraint={"alpha": 12}), Merging(method="average")
    tiny.shake_()
    method.begin_task_("a", tiny.view)
    tiny.shake_(seed=1)
    before = tiny.deltas()
    method.end_task_("a", [], tiny.view)
    assert all(torch.allclose(before[name], delta, atol=1e-5) for name, delta in tiny.deltas().items())


def test_every_task_starts_from_the_same_place() -> None:
    tiny, method = Tiny("none"), Merging(method="ties", density=0.5)
    start = tiny.adapter.coordinates()
    tiny.learn_(method, "a", tiny.task(*A))
    assert not same_tensors(start, tiny.adapter.coordinates())
    method.begin_task_("b", tiny.view)
    assert same_tensors(start, tiny.adapter.coordinates())


@pytest.mark.parametrize("merge", ["ties", "dare", "dare_ties"])
def test_what_a_span_cannot_hold_is_counted(merge: str) -> None:
    tiny, method = Tiny("write"), Merging(method=merge, density=0.3)
    for task, texts in (("a", A), ("b", B)):
        tiny.learn_(method, task, tiny.task(*texts))
    assert 0.01 < method.lost[-1] < 1.0
    for site in tiny.adapter.sites:  # the adapter stays in its span all the same
        basis, delta = site.plan.fold.basis.float(), tiny.deltas()[site.name]
        assert float((delta - basis @ (basis.T @ delta)).norm()) < 1e-5 * float(delta.norm())


def test_state_goes_through_a_checkpoint() -> None:
    make, found = lambda: Merging(method="dare", density=0.5), []
    for resumed in (False, True):
        tiny, method = Tiny("none"), make()
        tiny.learn_(method, "a", tiny.task(*A))
        method = round_trip(method, make) if resumed else method
        tiny.learn_(method, "b", tiny.task(*B))
        found.append((tiny.adapter.coordinates(), method.tensors(), method.state(), method.cost()))
    assert same_tensors(found[0][0], found[1][0])
    assert same_tensors(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(FeatclError, match="is no LoRA"):
        Merging().begin_task_("a", Tiny("residual").view)
    for wrong in ({"method": "mean"}, {"density": 0.0}, {"scale": -1.0}):
        with pytest.raises(FeatclError, match=next(iter(wrong))):
            Merging(**wrong)  # type: ignore[arg-type]
    tiny, method = Tiny("write"), Merging()
    tiny.learn_(method, "a", tiny.task(*A))
    tiny.adapter.changes += 1
    with pytest.raises(FeatclError, match="directions were changed"):
        method.begin_task_("b", tiny.view)
