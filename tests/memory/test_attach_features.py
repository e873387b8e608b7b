"""A memory confined to features, attached where its SAE is valid: what it adds stays in their span."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from featcl.errors import FeatclError
from featcl.memory.attach import AttachedMemory, attach_memory
from featcl.memory.features import FeatureMemory
from featcl.memory.saved import load_memory
from featcl.models import residual_stream
from featcl.subspace import Subspace
from tests.adapters.conftest import batch, build_directions, build_model, loss_of
from tests.adapters.gates import directions_for
from tests.memory.attaching import logits, open_, padded, positions, step_by_step, text

LAYER = 2
ZOO = SimpleNamespace(batch=batch, directions=build_directions)


def features_on(family="olmo2", *, seed=0, shut=False, **settings) -> AttachedMemory:
    """A feature memory whose features fire on a third of the tokens, with an open gate unless it is to stay shut."""
    model = build_model(family)
    memory = FeatureMemory(
        directions_for(ZOO, model, fires=0.3, layer=LAYER, seed=seed), **({"chunk_size": 4} | settings)
    )
    attached = attach_memory(model, memory, layer=LAYER)
    return attached if shut else open_(attached, scale=3.0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_conditional", "llama"])
def test_untrained_it_changes_no_bit_and_cached_decoding_is_one_pass(family):
    base = logits(build_model(family), *batch())
    attached = features_on(family, shut=True)
    assert torch.equal(logits(attached.model, *batch()), base)
    open_(attached, scale=3.0)
    assert not torch.equal(logits(attached.model, *batch()), base)
    ids, mask = padded([text(length=length, seed=length)[0] for length in (20, 13)])
    whole = logits(attached.model, ids, mask, position_ids=positions(mask))
    stepped = step_by_step(attached.model, ids, mask, splits=(7,))
    torch.testing.assert_close(stepped[mask.bool()], whole[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_it_adds_lies_in_the_span_after_training(depth):
    attached = features_on("gemma2", depth=depth)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(attached.model, *batch()).backward()
        optimizer.step()
    added = []
    handle = attached.branch.register_forward_hook(lambda _m, _i, output: added.append(output[0].detach()))
    changed = residual_stream(attached.model, text(2, 16), layer=LAYER)
    handle.remove()
    with attached.disabled():
        base = residual_stream(attached.model, text(2, 16), layer=LAYER)
    torch.testing.assert_close(changed - base, added[0], rtol=1e-3, atol=1e-5)
    outside = Subspace.from_vectors(attached.memory.directions.vectors).reject(added[0])
    assert float(outside.norm()) <= 1e-6 * float(added[0].norm())
    with torch.no_grad():  # negative control: a gate per coordinate would leave the span
        bent = added[0] * torch.linspace(0.5, 1.5, added[0].shape[-1])
    assert float(Subspace.from_vectors(attached.memory.directions.vectors).reject(bent).norm()) > 0.01


def test_it_reads_the_stream_where_its_sae_was_trained():
    attached = features_on("olmo2", chunk_size=1)
    with attached.disabled():
        stream = residual_stream(attached.model, text(2, 16), layer=LAYER)
    with torch.no_grad():
        expected = stream + attached.branch.gate * attached.memory(stream)[0]
    torch.testing.assert_close(residual_stream(attached.model, text(2, 16), layer=LAYER), expected)


def test_its_content_is_read_from_the_kept_state():
    attached = features_on("olmo2")
    assert attached.memory.content(attached.memory.initial_state(1)).links == ()
    with attached.writing():
        logits(attached.model, text(1, 24))
    assert attached.memory.content(attached.state).links


def test_it_comes_back_from_its_folder(tmp_path):
    attached = features_on("llama", depth=2)
    with attached.writing():
        logits(attached.model, text(1, 24))
    attached.save(tmp_path)
    model, directions = build_model("llama"), attached.memory.directions
    for memory in (None, FeatureMemory(directions, **attached.memory.settings())):
        again = load_memory(tmp_path, model, memory=memory)
        assert torch.equal(logits(model, text(seed=1)), logits(attached.model, text(seed=1)))
        again.detach()
    others = directions_for(ZOO, model, fires=0.3, layer=LAYER, seed=1)
    for memory in (FeatureMemory(others, **attached.memory.settings()), FeatureMemory(directions, depth=1)):
        with pytest.raises(FeatclError, match="another FeatureMemory was saved: settings or directions differ"):
            load_memory(tmp_path, model, memory=memory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 1}, "its features live at the output of block 2, not of block 1"),
        ({"form": "layer"}, "form 'layer' would leave the span"),
        ({"form": "context"}, "form 'context' would leave the span"),
    ],
)
def test_bad_places_are_refused(change, message):
    model = build_model("llama")
    memory = FeatureMemory(directions_for(ZOO, model))
    with pytest.raises(FeatclError, match=message):
        attach_memory(model, memory, **({"layer": LAYER} | change))
