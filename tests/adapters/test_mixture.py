"""The mixture of experts: gates by hand, the switch, what learning changes, and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featcl.adapters import constrain
from featcl.adapters.mixture import WEIGHTS, MixtureAdapter, constrain_mixture, load_mixture
from featcl.adapters.trunk import trunk_end
from featcl.errors import FeatclError
from tests.conftest import tiny_model
from tests.objectives.conftest import directions

IDS = torch.arange(20)[None] % 7 + 60
OTHERS = torch.arange(20)[None] % 7 + 90


def made(family: str = "olmo2", **options: Any) -> MixtureAdapter:
    return constrain_mixture(tiny_model(family, n_layers=2), **{"layers": [1], "rank": 2, **options})


def learn_(adapter: MixtureAdapter, ids: Tensor = IDS, *, steps: int = 5) -> MixtureAdapter:
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        adapter.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return adapter


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_gates_and_update_are_those_computed_by_hand() -> None:
    site = made(experts=3, modules=["down_proj"]).sites[0].requires_grad_(False)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    site.B.normal_(generator=torch.Generator().manual_seed(2))
    for row in range(2):
        for token in range(5):
            here = x[row, token]
            scores = [float(site.G[expert] @ here) for expert in range(3)]
            first, second = sorted(range(3), key=lambda expert: -scores[expert])[:2]
            share = 1.0 / (1.0 + torch.tensor(scores[second] - scores[first]).exp())
            expected = share * (site.B[first] @ site.A[first] @ here)
            expected = expected + (1.0 - share) * (site.B[second] @ site.A[second] @ here)
            assert torch.allclose(site(x)[row, token], expected, atol=1e-5)
            assert torch.allclose(site.gates(x)[row, token, first], share, atol=1e-6)
            assert float(site.gates(x)[row, token].sum()) == pytest.approx(1.0)
            assert int((site.gates(x)[row, token] > 0).sum()) == 2


def test_one_expert_is_a_lora() -> None:
    adapter, plain = learn_(made(experts=1, top=1)), tiny_model(n_layers=2)
    with torch.no_grad():
        for site in adapter.sites:
            plain.get_submodule(site.name).weight += site.B[0] @ site.A[0]
    assert torch.allclose(logits(adapter.model), logits(plain), atol=1e-4)
    squares = [(site.B[0] @ site.A[0]).detach().square().sum() for site in adapter.sites]
    assert adapter.delta_norm() == pytest.approx(float(torch.stack(squares).sum()) ** 0.5, rel=1e-4)
    assert adapter.distance_squared().item() == pytest.approx(adapter.delta_norm() ** 2, rel=1e-4)


def test_it_starts_at_the_base_and_switches_off_exactly(family: str) -> None:
    base = logits(tiny_model(family, n_layers=2))
    adapter = made(family)
    assert torch.equal(logits(adapter.model), base)
    assert adapter.delta_norm() == 0.0
    learn_(adapter)
    own = logits(adapter.model)
    assert not torch.allclose(own, base, atol=0.05)
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(logits(adapter.model), base)
        assert torch.equal(logits(adapter.model), base)
    assert torch.equal(logits(adapter.model), own)
    assert adapter.lowest_layer == adapter.top_layer == trunk_end(adapter.model) == 1
    plain = adapter.remove()
    assert torch.equal(logits(plain), base)
    assert trunk_end(plain) == 2


def test_all_three_are_trained_and_the_base_is_not() -> None:
    adapter, fresh = learn_(made()), made()
    before = fresh.coordinates()
    moved = {name for name, tensor in adapter.coordinates().items() if not torch.equal(tensor, before[name])}
    assert moved == set(before)
    assert {name.rsplit(".", 1)[1] for name in moved} == {"A", "B", "G"}
    weights = zip(adapter.model.parameters(), fresh.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


class Routes(nn.Module):
    """Which experts tokens take at one site."""

    def __init__(self, adapter: MixtureAdapter, name: str) -> None:
        super().__init__()
        self.site = next(site for site in adapter.sites if site.name.endswith(name))
        self.adapter = adapter

    def of(self, ids: Tensor) -> Tensor:
        seen: list[Tensor] = []
        linear = self.adapter.model.get_submodule(self.site.name)
        handle = linear.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            self.adapter.model(input_ids=ids)
        handle.remove()
        return self.site.gates(seen[0])[0]


def test_a_task_leaves_the_experts_alone_that_its_tokens_do_not_take() -> None:
    def moved(top: int) -> list[float]:
        adapter = made(experts=8, top=top)
        routes = Routes(adapter, "down_proj")
        before, unused = routes.site.B.detach().clone(), (routes.of(IDS) == 0).all(0)
        learn_(adapter, steps=1)
        change = (routes.site.B.detach() - before).flatten(1).norm(dim=1)
        assert (change[~unused] > 0).all()
        return change[unused].tolist()

    assert len(moved(1)) > 0
    assert set(moved(1)) == {0.0}
    assert moved(8) == []  # negative control: with all experts on, none is left alone


def test_tokens_that_differ_take_different_experts() -> None:
    routes = Routes(made(experts=8, top=1), "down_proj")
    assert len(set(routes.of(IDS).argmax(-1).tolist())) > 1
    routes.site.G.data.zero_()  # negative control: without a gate all tokens take the same
    assert len(set(routes.of(IDS).argmax(-1).tolist())) == 1


def test_coordinates_and_folder_restore_it(tmp_path: Path) -> None:
    adapter = learn_(made(modules=["down_proj", "q_proj"]))
    here, own = adapter.coordinates(), logits(adapter.model)
    adapter.save(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    learn_(adapter)
    assert not torch.equal(logits(adapter.model), own)
    adapter.load_coordinates_(here)
    assert torch.equal(logits(adapter.model), own)
    loaded = load_mixture(tmp_path, tiny_model(n_layers=2))
    assert torch.equal(logits(loaded.model), own)
    loaded.save(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == data
    with pytest.raises(FeatclError, match="does not fit the model"):
        load_mixture(tmp_path, tiny_model(n_layers=2, d_model=48))
    with pytest.raises(FeatclError, match="no linear"):
        load_mixture(tmp_path, tiny_model(n_layers=1))
    with pytest.raises(FeatclError, match="saved mixture"):
        load_mixture(tmp_path / "elsewhere", tiny_model(n_layers=2))


def test_the_seed_decides_where_it_starts() -> None:
    one, same, other = (made(seed=seed).coordinates() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.layers.1.mlp.down_proj.A"], other["model.layers.1.mlp.down_proj.A"])


def test_what_it_cannot_do_is_refused() -> None:
    for options, message in (
        ({"top": 5}, "between 1 and experts 4"),
        ({"rank": 0}, "rank 0 is below 1"),
        ({"rank": 17}, "above 16"),
        ({"layers": [2]}, "out of range"),
        ({"layers": []}, "the list is empty"),
        ({"modules": ["down"]}, "no module 'down'"),
    ):
        with pytest.raises(FeatclError, match=message):
            made(**options)
    adapter = made()
    with pytest.raises(FeatclError, match="other adapters"):
        constrain_mixture(adapter.model, layers=[1])
    with pytest.raises(FeatclError, match="other adapters"):
        constrain_mixture(constrain(tiny_model(n_layers=2), directions(2), kind="write").model, layers=[1])
    for refused, message in ((adapter.report, "no features"), (adapter.merge, "depends on the token")):
        with pytest.raises(FeatclError, match=message):
            refused()
    with pytest.raises(FeatclError, match="no features"):
        adapter.leak(IDS)
