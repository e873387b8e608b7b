"""Merges of task adapters on ΔW: by hand, against PEFT's functions where those are right, and where they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.merge_utils import ties
from torch import Tensor, nn

from featcl.adapters.export import PlainLora
from featcl.adapters.merging import merge_adapters
from featcl.errors import FeatclError


def factors(**deltas: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of given matrices: A is the identity."""
    return {name: (torch.eye(len(rows[0])), torch.tensor(rows)) for name, rows in deltas.items()}


def random_factors(seed: int, rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, width, generator=draw), size * torch.randn(6, rank, generator=draw))
        for name, width, size in (("first", 8, 1.0), ("second", 7, 0.1))
    }


def whole(parts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {name: b @ a for name, (a, b) in parts.items()}


# --- by hand


ONE = factors(w=[[4.0, -3.0, 1.0, 0.5]])
TWO = factors(w=[[-2.0, -5.0, 0.5, 3.0]])


def test_the_average_by_hand() -> None:
    assert merge_adapters([ONE, TWO], method="average").deltas["w"].tolist() == [[1.0, -4.0, 0.75, 1.75]]
    summed = merge_adapters([ONE, TWO], method="average", scale=2.0)
    assert summed.deltas["w"].tolist() == [[2.0, -8.0, 1.5, 3.5]]


def test_ties_by_hand() -> None:
    # density 1/2 leaves (4, -3, 0, 0) and (0, -5, 0, 3); signs of the sums: +, -, 0, +; means of those that agree
    assert merge_adapters([ONE, TWO], method="ties", density=0.5).deltas["w"].tolist() == [[4.0, -4.0, 0.0, 3.0]]
    # all kept: the first sum is 2 > 0, so -2 is left out of the mean; the third mean is that of 1 and 0.5
    assert merge_adapters([ONE, TWO], method="ties", density=1.0).deltas["w"].tolist() == [[4.0, -4.0, 0.75, 1.75]]
    assert merge_adapters([ONE, TWO], method="ties", density=0.5, scale=0.5).deltas["w"].tolist() == [
        [2.0, -2.0, 0.0, 1.5]
    ]


def test_ties_trims_over_all_modules_together() -> None:
    big, small = [[8.0, 7.0, 6.0, 5.0]], [[0.4, 0.3, 0.2, 0.1]]
    merged = merge_adapters([factors(big=big, small=small)], method="ties", density=0.5)
    assert merged.deltas["big"].tolist() == big
    assert not merged.deltas["small"].any()
    # negative control: module by module, as PEFT trims, half of each would stay
    assert ties([torch.tensor(small)], torch.ones(1), 0.5).count_nonzero() == 2


def test_dare_drops_at_random_and_keeps_the_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    delta = {"w": (torch.eye(200), torch.randn(100, 200, generator=draw))}
    once = merge_adapters([delta], method="dare", density=0.25, seed=3).deltas["w"]
    kept = once != 0
    assert float(kept.float().mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 20_000) ** 0.5)
    assert torch.allclose(once[kept], 4.0 * delta["w"][1][kept])
    many = torch.stack([merge_adapters([delta], method="dare", density=0.25, seed=s).deltas["w"] for s in range(200)])
    error = (many.mean(0) - delta["w"][1]) / ((3.0 / 200) ** 0.5 * delta["w"][1].abs())  # standard normal where right
    assert float(error.std()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(once, merge_adapters([delta], method="dare", density=0.25, seed=3).deltas["w"])
    assert not torch.equal(once, merge_adapters([delta], method="dare", density=0.25, seed=4).deltas["w"])
    two = merge_adapters([delta, delta], method="dare", density=0.25, seed=3).deltas["w"]
    assert (two != 0).float().mean() > 0.4  # each task has a mask of its own


def test_dare_ties_elects_after_dropping() -> None:
    # density 1 drops nothing: what is left is TIES without trimming
    same = merge_adapters([ONE, TWO], method="dare_ties", density=1.0).deltas["w"]
    assert torch.equal(same, merge_adapters([ONE, TWO], method="ties", density=1.0).deltas["w"])


# --- on ΔW, whatever the factors


@pytest.mark.parametrize("method", ["average", "ties"])
def test_the_merge_does_not_depend_on_how_an_update_is_factored(method: str) -> None:
    one, two = random_factors(0), random_factors(1)
    turn = torch.tensor([[3.0, 1.0], [-2.0, 0.5]])
    turned = {name: (turn @ a, b @ torch.linalg.inv(turn)) for name, (a, b) in one.items()}
    plain, other = (merge_adapters([first, two], method=method, density=0.5) for first in (one, turned))
    assert all(torch.allclose(plain.deltas[name], other.deltas[name], atol=1e-5) for name in plain.deltas)


def test_one_module_is_merged_as_peft_does_on_dense_tensors() -> None:
    one, two = ({"first": random_factors(seed)["first"]} for seed in (0, 1))
    dense = [b @ a for a, b in (one["first"], two["first"])]
    for density in (0.25, 0.5):
        ours = merge_adapters([one, two], method="ties", density=density).deltas["first"]
        assert torch.allclose(ours, ties(dense, torch.ones(2), density), atol=1e-6)


def test_the_nearest_lora_says_what_it_leaves_out() -> None:
    one, two = random_factors(0), random_factors(1)
    merged = merge_adapters([one, two], method="average")
    exact, lost = merged.factors(4)
    assert lost < 1e-6
    assert all(torch.allclose(delta, merged.deltas[name], atol=1e-5) for name, delta in whole(dict(exact)).items())
    _, lost = merged.factors(2)
    rest = sum(float(torch.linalg.svdvals(delta)[2:].square().sum()) for delta in merged.deltas.values())
    assert lost == pytest.approx(rest**0.5 / merged.norm(), rel=1e-4)
    assert lost > 0.1


# --- PEFT's own merge, on ΔW


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6, bias=False), nn.Linear(7, 6, bias=False)


def pefts(kind: str, **options: Any) -> dict[str, Tensor]:
    """ΔW of `add_weighted_adapter` on the two random adapters, with weights of one half."""
    names, model = ("one", "two"), None
    for seed, name in enumerate(names):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"])
        model = get_peft_model(Two(), config, adapter_name=name) if model is None else model
        if name not in model.peft_config:
            model.add_adapter(name, config)
        for module, (a, b) in random_factors(seed).items():
            layer: Any = getattr(model.get_base_model(), module)
            layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = a, b
    assert model is not None
    model.base_model.add_weighted_adapter(list(names), [0.5, 0.5], "merged", combination_type=kind, **options)
    return {
        name: getattr(model.get_base_model(), name).get_delta_weight("merged").detach() for name in ("first", "second")
    }


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """‖difference‖ / ‖other‖."""
    squares = [sum(float(x.square().sum()) for x in xs) for xs in ([one[n] - other[n] for n in one], other.values())]
    return (squares[0] / squares[1]) ** 0.5


def test_pefts_cat_is_right_and_its_linear_is_not() -> None:
    right = dict(merge_adapters([random_factors(0), random_factors(1)], method="average").deltas)
    assert apart(pefts("cat"), right) < 1e-6
    assert apart(pefts("svd", svd_rank=4), right) < 1e-5
    assert apart(pefts("svd"), right) > 0.1  # cut to rank 2, in silence
    assert apart(pefts("linear"), right) > 0.5  # (B₁ + B₂)(A₁ + A₂) has terms across tasks


def test_pefts_ties_works_on_factors_and_trims_by_module() -> None:
    parts = [random_factors(0), random_factors(1)]
    right = {name: delta / 2 for name, delta in merge_adapters(parts, method="ties", density=0.5).deltas.items()}
    assert apart(pefts("ties", density=0.5), right) > 0.5
    assert apart(pefts("ties_svd", density=0.5, svd_rank=6), right) > 0.02
    by_module = {
        name: merge_adapters([{name: part[name]} for part in parts], method="ties", density=0.5).deltas[name] / 2
        for name in right
    }
    assert apart(pefts("ties_svd", density=0.5, svd_rank=6), by_module) < 1e-5  # so that is the whole difference
    assert apart(pefts("ties_svd", density=0.5), by_module) > 0.1  # cut to rank 2, in silence


# --- errors


def test_what_does_not_belong_together_is_refused() -> None:
    one = random_factors(0)
    with pytest.raises(FeatclError, match="different bases"):
        merge_adapters([PlainLora(2, "base-a", one), PlainLora(2, "base-b", one)], method="average")
    with pytest.raises(FeatclError, match="targets must agree"):
        merge_adapters([one, {"first": one["first"]}], method="average")
    with pytest.raises(FeatclError, match=r"first is \[6, 8\] in adapter 0 and \[6, 7\]"):
        merge_adapters([{"first": one["first"]}, {"first": one["second"]}], method="average")
    with pytest.raises(FeatclError, match="no adapters"):
        merge_adapters([], method="average")
    with pytest.raises(FeatclError, match="not available"):
        merge_adapters([one], method="mean")
    with pytest.raises(FeatclError, match="density"):
        merge_adapters([one], method="ties", density=0.0)


def test_saved_adapters_are_merged(tmp_path: Path) -> None:
    from featcl.adapters import constrain
    from featcl.adapters.export import load_peft
    from tests.conftest import tiny_model
    from tests.objectives.conftest import directions

    deltas = []
    for seed in (0, 1):
        adapter = constrain(tiny_model(n_layers=2), directions(), kind="none", seed=seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += 0.1
        adapter.save(tmp_path / str(seed))
        deltas.append({site.name: site.factors()[1] @ site.factors()[0] for site in adapter.sites})  # type: ignore[attr-defined]
    merged = merge_adapters([load_peft(tmp_path / str(seed)) for seed in (0, 1)], method="average")
    for name, delta in merged.deltas.items():
        assert torch.allclose(delta, (deltas[0][name] + deltas[1][name]) / 2, atol=1e-6)
