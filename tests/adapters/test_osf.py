"""OSF through PEFT: what it preserves, the projection that its own hooks leave out, and the switch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.adapters.osf import OsfAdapter, constrain_osf
from featcl.errors import FeatclError
from tests.conftest import tiny_model

IDS = torch.arange(20)[None] % 7 + 60


def learn_(adapter: OsfAdapter, *, project: bool, steps: int = 10) -> None:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        adapter.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        if project:
            adapter.after_step_()


def inside(adapter: OsfAdapter, base: Any, preserved: int) -> float:
    """The largest ‖U_hᵀ ΔW‖ or ‖ΔW V_h‖ over ‖ΔW‖ of any module."""
    found = []
    for name in adapter.layers:
        u, _, vt = torch.linalg.svd(base.get_submodule(name).weight, full_matrices=False)
        delta = adapter.delta(name)
        found += [(u[:, :preserved].T @ delta).norm() / delta.norm(), (delta @ vt[:preserved].T).norm() / delta.norm()]
    return float(max(found))


def test_the_high_part_is_untouched_and_pefts_hooks_alone_leak() -> None:
    base = tiny_model(n_layers=2)
    held, leaking = (constrain_osf(tiny_model(n_layers=2), layers=[0, 1], preserved=6) for _ in range(2))
    learn_(held, project=True)
    learn_(leaking, project=False)
    assert held.delta_norm() > 0.1
    assert inside(held, base, 6) < 1e-5
    assert inside(leaking, base, 6) > 0.02  # negative control: AdamW leaves the subspace


def test_it_starts_at_the_base_and_switches_off_exactly() -> None:
    model = tiny_model(n_layers=2)
    base: Tensor = model(input_ids=IDS).logits.detach()
    adapter = constrain_osf(model, layers=[1], preserved=0.25)
    assert torch.allclose(adapter.model(input_ids=IDS).logits, base, atol=1e-4)
    learn_(adapter, project=True)
    assert not torch.allclose(adapter.model(input_ids=IDS).logits, base, atol=0.05)
    with adapter.disabled(), adapter.disabled():
        assert torch.equal(adapter.model(input_ids=IDS).logits, base)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    assert adapter.lowest_layer == adapter.top_layer == 1
    learned = adapter.model(input_ids=IDS).logits.detach()
    assert torch.allclose(adapter.merge()(input_ids=IDS).logits, learned, atol=1e-4)
    assert adapter.distance_squared().item() == pytest.approx(adapter.delta_norm() ** 2, rel=1e-4)
    plain = adapter.remove()
    assert torch.equal(plain(input_ids=IDS).logits, base)


def test_coordinates_restore_it() -> None:
    adapter = constrain_osf(tiny_model(n_layers=2), layers=[1], preserved=4)
    learn_(adapter, project=True, steps=2)
    here, logits = adapter.coordinates(), adapter.model(input_ids=IDS).logits.detach()
    learn_(adapter, project=True, steps=2)
    assert not torch.equal(adapter.model(input_ids=IDS).logits, logits)
    adapter.load_coordinates_(here)
    assert torch.equal(adapter.model(input_ids=IDS).logits, logits)


def test_what_it_cannot_do_is_refused() -> None:
    for preserved in (0, 16, 0.01):
        with pytest.raises(FeatclError, match="singular directions"):
            constrain_osf(tiny_model(n_layers=2), layers=[1], preserved=preserved)
    with pytest.raises(FeatclError, match="out of range"):
        constrain_osf(tiny_model(n_layers=2), layers=[2])
    adapter = constrain_osf(tiny_model(n_layers=2), layers=[1])
    with pytest.raises(FeatclError, match="other adapters"):
        constrain_osf(adapter.model, layers=[1])
    with pytest.raises(FeatclError, match="no features"):
        adapter.leak(IDS)
    with pytest.raises(FeatclError, match="no features"):
        adapter.report()
