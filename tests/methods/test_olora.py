"""O-LoRA: a new pair per task, pulled away from the rows of all pairs before; measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.fresh_lora import freeze_and_restart_
from featcl.methods.method import Method
from featcl.methods.olora import OLoRA
from tests.methods.coins import round_trip, same_tensors
from tests.methods.tiny_learner import Tiny

A, B = ("abcd abcd",), ("vwxyz vw",)


def overlap(rows: Tensor, others: Tensor) -> float:
    """‖cosines of the principal angles‖ / √n between two row spans: 1 the same, 0 orthogonal."""
    q, p = (torch.linalg.qr(x.double().T).Q for x in (rows, others))
    return float((q.T @ p).norm() / min(q.shape[1], p.shape[1]) ** 0.5)


def overlaps(tiny: Tiny, method: OLoRA) -> list[float]:
    """Of the present lora_A with the first task's, at every site that trains one."""
    found = []
    for site in tiny.adapter.sites:
        if "lora_A" in site.trained:
            past = method.past.rows[f"{site.name}.lora_A"][: tiny.k]
            found.append(overlap(site.trained["lora_A"].detach(), past))
    return found


def two_tasks(kind: str, strength: float, steps: int = 60) -> tuple[Tiny, OLoRA, list[float]]:
    tiny, method = Tiny(kind), OLoRA(strength=strength)
    tiny.learn_(method, "a", tiny.task(*A), steps=10)
    method.begin_task_("b", tiny.view)
    tiny.restart_()
    for _ in range(steps):
        tiny.step_(method, tiny.task(*B)[0])
    return tiny, method, overlaps(tiny, method)


def test_the_rows_become_orthogonal_to_the_first_tasks() -> None:
    _, _, held = two_tasks("none", 100.0, steps=150)
    _, _, free = two_tasks("none", 1e-9, steps=150)
    assert max(held) < 0.05
    assert min(free) > 0.2  # negative control


def test_on_writers_too() -> None:
    held, free = (two_tasks("write", strength)[2] for strength in (100.0, 1e-9))
    assert max(held) < 0.3 * min(free)


def test_the_penalty_is_the_one_computed_by_hand() -> None:
    tiny, method = Tiny("none"), OLoRA()
    method.past.rows = {}
    names = [name for name in tiny.view.parameters if name.endswith(".lora_A")]
    width = {name: tiny.view.parameters[name].shape[1] for name in names}
    for name in names:  # two earlier tasks of one row each
        method.past.add_({name: torch.eye(width[name])[:1]})
        method.past.add_({name: 2.0 * torch.eye(width[name])[1:2]})
    expected = sum(
        (tiny.view.parameters[n][:, 0].square().sum() + 4.0 * tiny.view.parameters[n][:, 1].square().sum()).item()
        for n in names
    )
    assert method.past.penalty(tiny.student).item() == pytest.approx(expected, rel=1e-5)
    method.past.penalty(tiny.student).backward()
    name = names[0]
    factor, gradient = tiny.view.parameters[name].detach(), tiny.view.parameters[name].grad
    assert torch.allclose(gradient[:, 0], 2.0 * factor[:, 0])
    assert torch.allclose(gradient[:, 1], 8.0 * factor[:, 1])
    assert not gradient[:, 2:].any()


def test_in_the_first_task_it_is_plain_lora() -> None:
    found = []
    for method in (OLoRA(strength=100.0), Method()):
        tiny = Tiny("none")
        tiny.learn_(method, "a", tiny.task(*A))
        found.append(tiny.adapter.coordinates())
    assert same_tensors(*found)


@pytest.mark.parametrize("kind", ["none", "write", "both", "read"])
def test_freezing_and_starting_anew_leaves_the_logits(kind: str) -> None:
    tiny = Tiny(kind, constraint={"alpha": 8} if kind == "none" else {})
    tiny.shake_()
    here = tiny.task(*A, *B)
    before, base = tiny.logits(here), tiny.deltas()
    for number in (1, 2):  # also on top of what was frozen before
        bytes_ = freeze_and_restart_(tiny.adapter, torch.Generator().manual_seed(number), "test")
        assert float((tiny.logits(here) - before).abs().max()) < 1e-4
        assert all(
            not site.moving_factors()[1].any() or not site.moving_factors()[0].any() for site in tiny.adapter.sites
        )
        assert bytes_ == sum(t.nbytes for site in tiny.adapter.sites for t in site.kept.values()) > 0
        assert all(torch.allclose(delta, base[name], atol=1e-5) for name, delta in tiny.deltas().items())
    start = tiny.adapter.coordinates()
    tiny.shake_(seed=5)
    assert float((tiny.logits(here) - before).abs().max()) > 1e-3  # and it goes on learning
    tiny.adapter.load_coordinates_(start)
    assert float((tiny.logits(here) - before).abs().max()) < 1e-4


def test_a_fresh_pair_starts_as_pefts_does() -> None:
    tiny = Tiny("none")
    own = {site.name: site.trained["lora_A"].detach().clone() for site in tiny.adapter.sites}
    freeze_and_restart_(tiny.adapter, torch.Generator().manual_seed(0), "test")
    for site in tiny.adapter.sites:
        new = site.trained["lora_A"].detach()
        bound = new.shape[1] ** -0.5
        assert 0.9 * bound < float(new.abs().max()) <= bound
        assert 0.9 * bound < float(own[site.name].abs().max()) <= bound
        assert not torch.equal(new, own[site.name])


def test_state_goes_through_a_checkpoint() -> None:
    found = []
    for resumed in (False, True):
        tiny, method = Tiny("none"), OLoRA(strength=1.0)
        tiny.learn_(method, "a", tiny.task(*A))
        if resumed:
            method = round_trip(method, lambda: OLoRA(strength=1.0))
        tiny.learn_(method, "b", tiny.task(*B))
        found.append((tiny.adapter.coordinates(), method.tensors(), method.cost()))
    assert same_tensors(found[0][0], found[1][0])
    assert same_tensors(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert all(len(rows) == 2 * 4 for rows in found[0][1].values())


@pytest.mark.parametrize("kind", ["read", "residual"])
def test_kinds_that_read_the_same_in_every_task_are_refused(kind: str) -> None:
    with pytest.raises(FeatclError, match=r"trains no lora_A|is no LoRA"):
        OLoRA().begin_task_("a", Tiny(kind).view)
