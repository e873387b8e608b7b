"""Latent replay: eight bits per activation, and a forward pass that starts where the frozen part ends."""

from __future__ import annotations

import pytest
import torch

from featcl.adapters.trunk import TrunkState, run_trunk, trunk_end
from featcl.errors import FeatclError
from featcl.methods.latent import LatentReplay, dequantised, latent_nll, latent_record, load_record, quantised
from tests.methods.replaying import Bench, ask, forgotten, resumes, run


def test_no_activation_is_off_by_more_than_half_a_step() -> None:
    hidden = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    q, scale = quantised(hidden)
    assert q.dtype == torch.int8
    assert int(q.abs().max()) <= 127
    torch.testing.assert_close(scale, hidden.abs().amax(-1, keepdim=True) / 127)
    assert ((dequantised(q, scale) - hidden).abs() <= 0.5001 * scale).all()
    coarse = (hidden / (2 * scale)).round() * 2 * scale  # negative control: seven bits
    assert not ((coarse - hidden).abs() <= 0.5001 * scale).all()
    assert torch.equal(dequantised(*quantised(torch.zeros(2, 4))), torch.zeros(2, 4))
    with pytest.raises(FeatclError, match="not finite"):
        quantised(torch.tensor([[1.0, float("inf")]]))


def test_what_is_replayed_is_the_record_up_to_eight_bits() -> None:
    bench = Bench()
    bench.move_()
    [batch] = bench.encode(ask(3)).batches
    kept, state = load_record(latent_record(batch, bench.student))
    assert all(torch.equal(getattr(kept, name), getattr(batch, name)) for name in ("input_ids", "positions", "targets"))
    exact = bench.nll(ask(3)) * batch.tokens
    assert latent_nll(kept, state, bench.student).item() == pytest.approx(exact, rel=0.02)
    full = run_trunk(bench.student.scorer.causal, batch.input_ids, layer=state.layer)
    assert latent_nll(kept, full, bench.student).item() == pytest.approx(exact, rel=1e-6)
    assert state.hidden is not None
    nothing = TrunkState(state.layer, torch.zeros_like(state.hidden), state.inputs)  # negative control
    assert latent_nll(kept, nothing, bench.student).item() != pytest.approx(exact, rel=0.05)


def test_its_gradient_is_that_of_replay_up_to_eight_bits() -> None:
    bench = Bench()
    bench.move_()
    experience = bench.encode(ask(3))
    [batch] = experience.batches
    kept, state = load_record(latent_record(batch, bench.student))
    loss = latent_nll(kept, state, bench.student) / batch.tokens
    found = torch.cat([part.flatten() for part in torch.autograd.grad(loss, bench.adapter.parameters())])
    exact = torch.cat([part.flatten() for part in bench.gradient(experience).values()])
    other = torch.cat([part.flatten() for part in bench.gradient(bench.encode(ask(8, "no"))).values()])
    assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.99
    assert float(torch.cosine_similarity(other, exact, dim=0)) < 0.9  # negative control


def test_a_budget_of_bytes_bounds_the_activations() -> None:
    bench, method = Bench(), LatentReplay(budget_bytes=8000)
    run(bench, [ask(n) for n in range(8)], method)
    one = len(latent_record(bench.encode(ask(1)).batches[0], bench.student))
    assert one < method.cost().stored_bytes <= 8000
    assert 1 <= len(method.buffer) < 8


def test_latent_replay_keeps_what_the_plain_learner_forgets() -> None:
    plain = forgotten()
    assert plain > 1.0
    assert forgotten(LatentReplay(budget=50, count=2)) < 0.3 * plain


def test_an_adapter_at_the_bottom_leaves_nothing_to_keep() -> None:
    bench = Bench(layers=[0, 1, 2])
    assert trunk_end(bench.student.scorer.causal) == 0
    with pytest.raises(FeatclError, match="no frozen part"):
        bench.observe(ask(1), LatentReplay(budget=3))
    with pytest.raises(FeatclError, match="budget must be"):
        LatentReplay(budget=0)


def test_latent_replay_resumes_to_the_same_bits() -> None:
    assert resumes(lambda: LatentReplay(budget=3), [ask(n) for n in range(8)], cut=5)
