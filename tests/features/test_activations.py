"""Capture: what hooks see equals the model's own forward, nothing past the hook runs, and memory does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from featcl.features import FeatureEncoder, select_features
from featcl.features.activations import capture, feature_rows, layer_activations
from featcl.features.activity import activity
from featcl.features.hooks import resolve
from featcl.features.tokens import token_batches, token_windows
from featcl.models import inner_model

TEXTS = ["a lamp", "the old green door of the garden is open", "music", "a kettle and a window"]
SITES = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.0.hook_resid_post")


def batch_of(tokenizer, texts=TEXTS, **options):
    [batch] = token_batches(token_windows(tokenizer, texts, context=64, **options), tokenizer)
    return batch


def by_hand(model, batch, hook) -> torch.Tensor:
    """Reference: a whole forward with the padding mask, recorded at the module."""
    kept = []
    module = inner_model(model).get_submodule(hook.module)
    if hook.side == "input":
        handle = module.register_forward_pre_hook(lambda _m, inputs: kept.append(inputs[0]))
    else:
        handle = module.register_forward_hook(
            lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
    try:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    return kept[0][batch.counted]


def test_equals_a_masked_full_forward_at_every_site(tiny, family):
    model, tokenizer = tiny(family)
    batch = batch_of(tokenizer, prepend_bos=True)
    assert not batch.attention_mask.all()
    hooks = [resolve(model, name) for name in SITES]
    found = capture(model, batch, hooks=hooks)
    for hook, rows in zip(hooks, found, strict=True):
        expected = by_hand(model, batch, hook)
        assert (rows - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(found[0], found[3])  # negative control: another block's stream


def test_padding_changes_nothing(tiny, family):
    """A text among longer ones gives what it gives alone, although no padding mask is passed."""
    model, tokenizer = tiny(family)
    hook = resolve(model, SITES[0])
    batch = batch_of(tokenizer)
    together = capture(model, batch, hooks=[hook])[0].split(batch.counted.sum(dim=1).tolist())
    for row, rows in enumerate(together):
        ids = batch.input_ids[row][batch.counted[row]].tolist()
        [alone] = token_batches([ids], tokenizer)
        assert torch.allclose(rows, capture(model, alone, hooks=[hook])[0], atol=1e-5)


def test_a_window_longer_than_gemmas_sliding_window(tiny):
    model, tokenizer = tiny("gemma2")  # slides over 64 tokens
    batch = next(token_batches(token_windows(tokenizer, ["a b c d e " * 20, "a"], context=200), tokenizer))
    hook = resolve(model, "blocks.2.hook_resid_post")
    expected = by_hand(model, batch, hook)
    assert (capture(model, batch, hooks=[hook])[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_nothing_past_the_hook_runs_and_nothing_is_left_behind(tiny):
    model, tokenizer = tiny()
    later = []
    modules = [model.model.layers[2], model.model.norm, model.lm_head, model.model.layers[1].mlp]
    handles = [module.register_forward_hook(lambda m, *_: later.append(m)) for module in modules]
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    capture(model, batch_of(tokenizer), hooks=[resolve(model, "blocks.1.attn.hook_z")])
    assert later == []
    capture(model, batch_of(tokenizer), hooks=[resolve(model, "blocks.1.hook_resid_post")])
    assert later == [model.model.layers[1].mlp]  # negative control: the recorder records
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before
    for handle in handles:
        handle.remove()


def test_the_models_dtype_and_no_gradient(tiny):
    model, tokenizer = tiny()
    model.requires_grad_(True)
    model.to(torch.bfloat16)
    [rows] = capture(model, batch_of(tokenizer), hooks=[resolve(model, SITES[0])])
    assert rows.dtype == torch.bfloat16
    assert not rows.requires_grad
    assert layer_activations(model, batch_of(tokenizer), layers=[1, 0]).dtype == torch.float32


def test_several_layers_cost_one_forward(tiny):
    model, tokenizer = tiny()
    calls = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    together = layer_activations(model, batch_of(tokenizer), layers=[2, 0, 1])
    assert len(calls) == 1
    for position, layer in enumerate((2, 0, 1)):
        assert torch.equal(together[:, position], layer_activations(model, batch_of(tokenizer), layers=[layer])[:, 0])
    handle.remove()


def test_feature_rows_name_their_tokens(tiny, sae):
    model, tokenizer = tiny()
    source = sae("jumprelu")
    encoder = FeatureEncoder.from_sae(source, (3, 17))
    hook = resolve(model, SITES[0])
    seen = 0
    for rows in feature_rows(encoder, model, tokenizer, TEXTS, hook=hook, prepend_bos=True, batch_tokens=32):
        hidden = by_hand(model, rows.batch, hook)
        expected = source.encode(hidden)[:, [3, 17]]
        assert (rows.feature_acts - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert rows.batch.counted[rows.owner, rows.position].all()
        assert (rows.position > 0).all()  # BOS is at 0
        seen += len(rows.owner)
    assert seen == sum(len(tokenizer(text).input_ids) for text in TEXTS)


# --- bounded memory ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation makes, and how many operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        self.operations += 1
        return found


def endless(count: int) -> Iterator[str]:
    words = ["lamp", "door", "music", "garden", "window", "kettle"]
    for i in range(count):
        yield " ".join(words[(i * j) % 6] for j in range(1, 40))


@pytest.mark.parametrize("architecture", ["jumprelu", "topk"])
def test_memory_does_not_grow_with_the_text(tiny, sae, architecture):
    """Ten times the tokens, ten times the operations, the same largest tensor."""
    model, tokenizer = tiny(n_layers=2)
    source = sae(architecture, d_sae=256, **({"k": 8} if architecture == "topk" else {}))
    found = []
    for count in (100, 1000):
        with Largest() as largest:
            seen = activity(source, model, tokenizer, endless(count), context=128)
        found.append((seen.tokens, largest.elements, largest.operations))
    (tokens, elements, operations), (more_tokens, more_elements, more_operations) = found
    assert more_tokens > 9 * tokens
    assert more_operations > 5 * operations
    assert more_elements <= elements * 1.01
    assert more_elements < more_tokens * 256 / 4  # an activation matrix would be four times as large at the least


def test_a_kept_matrix_would_be_seen(tiny, sae):
    """Negative control of the measure above."""
    model, tokenizer = tiny(n_layers=2)
    encoder = FeatureEncoder.from_sae(sae("jumprelu", d_sae=256), tuple(range(256)))
    found = []
    for count in (100, 1000):
        with Largest() as largest:
            rows = feature_rows(encoder, model, tokenizer, endless(count), hook=resolve(model, SITES[0]), context=128)
            torch.cat([part.feature_acts for part in rows])
        found.append(largest.elements)
    assert found[1] > 5 * found[0]


def resident(key: str) -> float:
    """A line of /proc/self/status, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
def test_selecting_over_a_million_tokens(tiny, sae):
    """The process' peak grows by less than 200 MB, where the activations alone would be 1 M × 512 × 4 bytes = 2 GB."""
    model, tokenizer = tiny(n_layers=2)
    source = sae("jumprelu", d_sae=512)
    sides = [list(endless(2300)), list(endless(4600))[2300:]]
    tokens = sum(len(tokenizer(text).input_ids) for side in sides for text in side)
    assert tokens >= 1_000_000
    select_features(source, model, tokenizer, selector="contrast", k=4, positive=sides[0][:99], negative=sides[1][:99])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    chosen = select_features(source, model, tokenizer, selector="contrast", k=4, positive=sides[0], negative=sides[1])
    assert chosen.k == 4
    assert resident("VmHWM") - before < 200


def test_topk_needs_all_columns_but_not_at_once(sae, monkeypatch):
    """Pre-activations of all features exist for a few rows at a time, however many rows are read."""
    encoder = FeatureEncoder.from_sae(sae("topk", d_sae=256, k=8), (3, 17))
    hidden = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    with Largest() as whole:
        expected = encoder(hidden)
    monkeypatch.setattr("featcl.features.encoder.CHUNK_BYTES", 4 * 256 * 50)
    with Largest() as chunked:
        found = encoder(hidden)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (found > 0).any()
    assert whole.elements == 1000 * 256
    assert chunked.elements <= 1000 * 32  # the input itself; 50 rows of 256 are fewer
