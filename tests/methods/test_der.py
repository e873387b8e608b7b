"""Dark experience replay on given logits, and through updates of a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from featcl.errors import FeatclError
from featcl.learning.gradient import accumulate_gradient_
from featcl.methods.der import DarkBatch, DarkReplay, kept_logits, pack_dark, squared_distance, unpack_dark
from featcl.methods.lwf import LwF
from featcl.methods.method import Method
from featcl.objectives.build import Term
from tests.methods.replaying import Bench, ask, forgotten, resumes, run


def test_the_loss_on_given_logits() -> None:
    z, h = torch.tensor([[1.0, 2.0, -1.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0, 0.0]])
    everything = torch.zeros(1, 0, dtype=torch.long)
    assert squared_distance(h, z, everything).tolist() == [(1 + 0 + 4 + 0) / 4]
    # the two largest of z, and ln(e^-1 + e^0) against ln(e^1 + e^0)
    places = torch.tensor([[1, 0]])
    tails = math.log(math.exp(-1) + 1), math.log(math.exp(1) + 1)
    found = squared_distance(h, kept_logits(z, places), places)
    assert found.tolist() == pytest.approx([(0 + 1 + (tails[0] - tails[1]) ** 2) / 3], rel=1e-6)
    assert squared_distance(z, kept_logits(z, places), places).tolist() == [0.0]


def test_what_lies_outside_the_largest_is_seen_through_the_tail() -> None:
    z, places = torch.tensor([[3.0, 0.0, 0.0, 0.0]]), torch.tensor([[0]])
    h = torch.tensor([[3.0, 5.0, 0.0, 0.0]])
    assert float(squared_distance(h, kept_logits(z, places), places)) > 1.0
    assert float((h.gather(-1, places) - z.gather(-1, places)).square().mean()) == 0.0  # negative control: no tail


@pytest.mark.parametrize("top_k", [None, 8])
def test_unchanged_logits_cost_nothing_and_pull_nowhere(top_k: int | None) -> None:
    bench = Bench()
    bench.move_()
    method = DarkReplay(budget=3, beta=0.0, top_k=top_k)
    experience = bench.encode(ask(3))
    [batch] = unpack_dark(pack_dark(experience.batches, bench.student, top_k=top_k), bench.student)
    objective = method.terms()[0].objective

    def loss_of(batch: DarkBatch) -> torch.Tensor:
        return objective.loss(bench.student.scorer.hidden(batch), batch, bench.student)

    at_rest = float(loss_of(batch).detach())
    bench.move_(seed=1)
    moved = loss_of(batch)
    assert at_rest < 1e-5 * float(moved.detach())  # float16's rounding
    assert any(float(part.abs().max()) > 0 for part in torch.autograd.grad(moved, bench.adapter.parameters()))


def test_the_loss_is_the_mean_square_over_the_replayed_tokens() -> None:
    bench, method = Bench(), DarkReplay(budget=3, alpha=2.0, beta=0.25, top_k=None)
    bench.move_()
    experience = bench.encode(ask(3))
    with torch.no_grad():
        before = [bench.student.scorer.head(bench.student.scorer.hidden(b)).half().float() for b in experience.batches]
    bench.observe(ask(3), method)
    bench.move_(seed=1)
    with torch.no_grad():
        after = [bench.student.scorer.head(bench.student.scorer.hidden(b)) for b in experience.batches]
    expected = float((torch.cat(before) - torch.cat(after)).square().mean())
    values = {}
    for term in method.terms():
        batches = list(term.objective.read(bench.encode(ask(4)), bench.student))
        count = sum(batch.tokens for batch in batches)
        losses = [term.objective.loss(bench.student.scorer.hidden(b), b, bench.student) for b in batches]
        values[term.name] = (term.weight, sum(loss.item() for loss in losses) / count)
    assert values["der"] == (2.0, pytest.approx(expected, rel=1e-4))
    assert values["der++"] == (0.25, pytest.approx(bench.nll(ask(3)), rel=1e-5))


def test_logits_are_those_before_the_step() -> None:
    bench, method = Bench(lr=0.1), DarkReplay(budget=3, beta=0.0, top_k=None)
    before = pack_dark(bench.encode(ask(3)).batches, bench.student, top_k=None)
    bench.observe(ask(3), method)
    kept = method.buffer.read(method.buffer.entries[0])
    assert kept == before
    assert kept != pack_dark(bench.encode(ask(3)).batches, bench.student, top_k=None)  # negative control: after it


def test_dark_replay_keeps_what_the_plain_learner_forgets() -> None:
    plain = forgotten()
    assert plain > 1.0
    assert forgotten(DarkReplay(budget=50, beta=1.0, count=2)) < 0.3 * plain
    assert forgotten(DarkReplay(budget=50, alpha=2.0, beta=0.0, count=2)) < 0.7 * plain


def test_the_budget_of_bytes_is_kept() -> None:
    bench, method = Bench(), DarkReplay(budget_bytes=6000, top_k=8)
    run(bench, [ask(n) for n in range(12)], method)
    assert 0 < method.cost().stored_bytes <= 6000
    assert len(method.buffer) < 12
    large = DarkReplay(budget=50, top_k=None)
    run(Bench(), [ask(1)], large)
    [batch] = bench.encode(ask(1)).batches
    assert large.cost().stored_bytes > 2 * 262 * batch.tokens  # all logits, two bytes each


def test_bad_settings_are_refused() -> None:
    for given, message in (
        ({"budget": 0}, "budget must be"),
        ({"budget": 3, "alpha": 0.0}, "alpha must be above 0"),
        ({"budget": 3, "top_k": 0}, "top_k must be"),
    ):
        with pytest.raises(FeatclError, match=message):
            DarkReplay(**given)


def test_dark_replay_resumes_to_the_same_bits() -> None:
    assert resumes(lambda: DarkReplay(budget=3), [ask(n) for n in range(8)], cut=5)


def test_a_record_that_waits_for_its_step_is_part_of_the_state() -> None:
    bench, method, other = Bench(), DarkReplay(budget=3), DarkReplay(budget=3)
    method.beside(bench.encode(ask(3)), bench.view())
    other.load_state_(method.state())
    other.load_tensors_(method.tensors())
    other.after_update_(bench.encode(ask(3)), bench.view())
    method.after_update_(bench.encode(ask(3)), bench.view())
    assert other.buffer.read(other.buffer.entries[0]) == method.buffer.read(method.buffer.entries[0])


@pytest.mark.parametrize("make", [lambda: DarkReplay(budget=3, alpha=2.0), lambda: LwF(strength=2.0)])
def test_what_methods_add_counts_the_same_however_far_the_new_experience_is_trusted(
    make: Callable[[], Method],
) -> None:
    """loss = w L(new) + what is added: as with replayed experiences, whose weights are their own."""
    bench, method = Bench(), make()
    bench.move_(0.05)
    method.begin_task_("a", bench.view())
    bench.observe(ask(3), method)
    bench.move_(seed=1)
    new = bench.encode(ask(4))

    def gradient(weight: float, *added: Term) -> list[torch.Tensor]:
        bench.optimizer.zero_grad()
        accumulate_gradient_(bench.terms, replace(new, weight=weight), bench.student, added=added)
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in bench.adapter.parameters()]

    none, half, own = gradient(0.0, *method.terms()), gradient(0.5, *method.terms()), gradient(1.0)
    assert max(float(part.abs().max()) for part in none) > 1e-4
    assert all(not part.any() for part in gradient(0.0)), "negative control: of the experience itself nothing is left"
    for added, both, alone in zip(none, half, own, strict=True):
        torch.testing.assert_close(both, added + 0.5 * alone, atol=1e-6, rtol=1e-4)
