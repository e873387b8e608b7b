"""Full fine-tuning behind the adapter protocol: what is trained, the switch, and what it is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.adapters import adapters_of, constrain
from featcl.adapters.full import FullAdapter, constrain_full
from featcl.adapters.trunk import trunk_end
from featcl.errors import FeatclError
from featcl.models import blocks
from featcl.objectives.divergence import token_divergence
from featcl.objectives.scoring import Scorer, TokenBatch
from tests.conftest import tiny_model
from tests.objectives.conftest import directions

IDS = torch.arange(20)[None] % 7 + 60


def learn_(model: Any, parameters: list[torch.nn.Parameter], *, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def learned(family: str = "olmo2", **options: Any) -> FullAdapter:
    adapter = constrain_full(tiny_model(family, n_layers=2), **options)
    learn_(adapter.model, adapter.parameters())
    return adapter


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_it_is_ordinary_fine_tuning(family: str) -> None:
    adapter, plain = learned(family), tiny_model(family, n_layers=2)
    assert torch.equal(logits(tiny_model(family, n_layers=2)), logits(plain))
    names = set(adapter.coordinates())
    learn_(plain, [p.requires_grad_(True) for name, p in plain.named_parameters() if name in names])
    assert torch.equal(logits(adapter.model), logits(plain))
    with adapter.disabled():
        assert not torch.allclose(logits(adapter.model), logits(plain), atol=0.1)  # negative control


def test_the_switch_is_exact_and_copies_nothing(family: str) -> None:
    base = logits(tiny_model(family, n_layers=2))
    adapter = learned(family)
    own = logits(adapter.model)
    held = {t.data_ptr() for site in adapter.sites for t in (site.parameter, site.aside)}
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(logits(adapter.model), base)
        assert torch.equal(logits(adapter.model), base)
        assert not adapter.model(input_ids=IDS).logits.requires_grad
        assert held == {t.data_ptr() for site in adapter.sites for t in (site.parameter, site.aside)}
    assert torch.equal(logits(adapter.model), own)
    assert not torch.allclose(own, base, atol=0.1)
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    aside = sum(site.aside.nbytes for site in adapter.sites)
    assert aside == sum(parameter.nbytes for parameter in adapter.parameters())  # one copy of what is trained


def test_what_is_asked_of_it_within_the_switch_is_about_the_trained_weights() -> None:
    adapter = learned()
    here, norm, square = adapter.coordinates(), adapter.delta_norm(), adapter.distance_squared().item()
    other = {name: tensor + 1.0 for name, tensor in here.items()}
    with adapter.disabled():
        inside = adapter.coordinates()
        assert all(torch.equal(inside[name], tensor) for name, tensor in here.items())
        assert (adapter.delta_norm(), adapter.distance_squared().item()) == (norm, square)
        adapter.load_coordinates_(other)
        assert torch.equal(logits(adapter.model), logits(tiny_model(n_layers=2)))
    assert all(torch.equal(tensor, other[name]) for name, tensor in adapter.coordinates().items())
    assert square == pytest.approx(norm**2, rel=1e-4)
    expected = sum(
        float((here[name] - p).double().square().sum())
        for name, p in tiny_model(n_layers=2).named_parameters()
        if name in here
    )
    assert norm == pytest.approx(expected**0.5, rel=1e-6)


def test_only_the_chosen_blocks_move() -> None:
    base = dict(tiny_model(n_layers=2).named_parameters())
    for layers, still in (([1], ("embed_tokens", "layers.0.", "model.norm", "lm_head")), (None, ("lm_head",))):
        adapter = learned(layers=layers)
        moved = {name for name, p in adapter.model.named_parameters() if not torch.equal(p, base[name])}
        assert moved == {name for name in base if not any(part in name for part in still)} == set(adapter.coordinates())
        assert adapter.lowest_layer == (0 if layers is None else 1)
        assert adapter.top_layer == 1


@pytest.mark.parametrize(("family", "embeds"), [("olmo2", True), ("gemma2", False)])
def test_the_head_stands_still_and_embeddings_tied_to_it(family: str, embeds: bool) -> None:
    adapter, base = learned(family), tiny_model(family, n_layers=2)
    assert ("model.embed_tokens.weight" in adapter.coordinates()) is embeds
    assert torch.equal(adapter.model.get_output_embeddings().weight, base.get_output_embeddings().weight)
    same = torch.equal(adapter.model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert same is not embeds


def test_a_comparison_with_the_base_has_the_gradient_of_two_models() -> None:
    """The base is asked between the student's forward and backward pass, as anchors and distillation do."""

    def gradients(adapter: FullAdapter, base: Any) -> list[Tensor]:
        own = adapter.model(input_ids=IDS).logits
        if base is None:
            with adapter.disabled(), torch.no_grad():
                other = adapter.model(input_ids=IDS).logits
        else:
            other = logits(base)
        token_divergence(own.flatten(0, 1), other.flatten(0, 1), alpha=1.0, top_k=None).sum().backward()
        return [parameter.grad for parameter in adapter.parameters()]

    one, two = gradients(learned(), None), gradients(learned(), tiny_model(n_layers=2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert max(float(gradient.abs().max()) for gradient in one) > 1e-3


@pytest.mark.parametrize("layers", [None, [1]])
def test_what_lies_below_is_cached_no_further_than_it_stands_still(layers: list[int] | None) -> None:
    adapter = constrain_full(tiny_model(n_layers=3), layers=layers)
    handle = blocks(adapter.model)[2].register_forward_hook(lambda *_: None)  # somebody else's, further up
    assert trunk_end(adapter.model) == adapter.lowest_layer
    batch = TokenBatch(IDS, torch.arange(19), IDS[0, 1:])

    def seen() -> Tensor:
        scorer = Scorer(adapter.model)
        with scorer.trunks_kept():
            scorer.hidden(batch)
            learn_(adapter.model, adapter.parameters(), steps=1)
            return scorer.hidden(batch)

    assert torch.equal(seen(), Scorer(adapter.model).hidden(batch))
    adapter._mark.remove()  # negative control: the trunk would end at the other hook
    assert not torch.equal(seen(), Scorer(adapter.model).hidden(batch))
    handle.remove()


def test_it_can_be_saved_merged_and_taken_off(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    adapter, base = learned(family), tiny_model(family, n_layers=2)
    own = logits(adapter.model)
    with adapter.disabled():
        adapter.save(tmp_path)
        merged = adapter.merge()
        assert torch.equal(logits(adapter.model), logits(base))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), own)
    assert torch.equal(logits(merged), own)
    assert not adapters_of(merged)
    assert trunk_end(merged) == 2
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    merged.model.norm.weight.zero_()
    assert torch.equal(logits(adapter.model), own)  # nothing is shared
    plain = adapter.remove()
    assert torch.equal(logits(plain), logits(base))
    assert not adapters_of(plain)
    assert trunk_end(plain) == 2
    assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_coordinates_restore_it_and_updates_add() -> None:
    adapter = learned()
    before, logits_before = adapter.coordinates(), logits(adapter.model)
    learn_(adapter.model, adapter.parameters())
    after = adapter.coordinates()
    assert not torch.equal(logits(adapter.model), logits_before)
    assert adapter.add_(before, after, scale=-1.0) == "exact"
    assert torch.allclose(logits(adapter.model), logits_before, atol=1e-5)
    adapter.load_coordinates_(before)
    assert torch.equal(logits(adapter.model), logits_before)
    with pytest.raises(FeatclError, match="lack"):
        adapter.load_coordinates_({name: before[name] for name in list(before)[1:]})


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(FeatclError, match=r"bfloat16.*load the model in float32"):
        constrain_full(tiny_model(n_layers=2).to(torch.bfloat16))
    for layers, message in (([2], "out of range"), ([], "empty")):
        with pytest.raises(FeatclError, match=message):
            constrain_full(tiny_model(n_layers=2), layers=layers)
    adapter = constrain_full(tiny_model(n_layers=2))
    with pytest.raises(FeatclError, match="other adapters"):
        constrain_full(adapter.model)
    with pytest.raises(FeatclError, match="other adapters"):
        constrain_full(constrain(tiny_model(n_layers=2), directions(2), kind="write").model)
    with pytest.raises(FeatclError, match="no features"):
        adapter.leak(IDS)
    with pytest.raises(FeatclError, match="no features"):
        adapter.report()
