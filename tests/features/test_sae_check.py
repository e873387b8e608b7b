"""SAEHealth against numbers known beforehand: a perfect SAE, a useless one, and one by hand."""

from __future__ import annotations

import pytest
import torch

import featcl
from featcl.errors import FeatclError
from featcl.features import check_sae, hooks, load_sae
from featcl.features.activations import capture
from featcl.features.diagnosis import TEXTS as PROSE
from featcl.features.diagnosis import fit, quick_check
from featcl.features.tokens import token_batches, token_windows
from featcl.models import residual_stream

TEXTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen liquor jugs!"] * 4


def perfect(sae, d_model: int = 32):
    """x = relu(x) − relu(−x): a ReLU SAE that reconstructs everything, one of each pair of features active."""
    source = sae("standard", d_sae=2 * d_model)
    eye = torch.eye(d_model)
    source.W_enc.data, source.W_dec.data = torch.cat([eye, -eye], dim=1), torch.cat([eye, -eye])
    source.b_enc.data.zero_()
    source.b_dec.data.zero_()
    return source


def test_perfect_sae(sae, tiny):
    health = check_sae(perfect(sae), *tiny(), TEXTS)
    assert health.fvu < 1e-10
    assert health.l0 == pytest.approx(32)
    assert health.dead_fraction < 0.05  # a coordinate that never changes sign leaves one of its pair dead
    assert health.loss_recovered == pytest.approx(1, abs=1e-5)
    assert health.nll_zero != pytest.approx(health.nll, abs=1e-2)
    assert health.tokens == sum(map(len, TEXTS))


def test_useless_sae(sae, tiny):
    """Features that never fire: x̂ is b_dec; all dead, and zeros at b_dec = 0 recover nothing."""
    source = perfect(sae)
    source.b_enc.data.fill_(-1e6)
    health = check_sae(source, *tiny(), TEXTS, strict=False)
    assert (health.l0, health.dead_fraction) == (0, 1)
    assert health.fvu >= 1
    assert health.loss_recovered == pytest.approx(0, abs=1e-6)
    with pytest.raises(
        FeatclError, match=r"does not fit the model at blocks.1.hook_resid_post = model.layers.1.output"
    ):
        check_sae(source, *tiny(), TEXTS)


def test_by_hand(sae, tiny, family):
    model, tokenizer = tiny(family)
    source = sae("jumprelu")
    bos = tokenizer.bos_token_id
    ids = torch.tensor([[bos, *tokenizer(TEXTS[0]).input_ids]])
    x = residual_stream(model, ids, torch.ones_like(ids), layer=1)[0, 1:]  # without BOS
    feature_acts = source.encode(x)
    error = (source.decode(feature_acts) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    health = check_sae(source, model, tokenizer, TEXTS[:1], strict=False)
    assert health.fvu == pytest.approx(float(error), rel=1e-4)
    assert health.l0 == pytest.approx(float((feature_acts > 0).sum(-1).float().mean()))
    assert health.dead_fraction == pytest.approx(float((feature_acts == 0).all(0).float().mean()))
    logits = model(ids).logits[0, 1:-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 2:])
    assert health.nll == pytest.approx(float(nll), rel=1e-5)


def test_padding_changes_nothing(sae, tiny):
    model, tokenizer = tiny()
    source = sae("jumprelu")
    short, long = TEXTS[0][:9], TEXTS[1]
    both = check_sae(source, model, tokenizer, [short, long], strict=False)
    alone = [check_sae(source, model, tokenizer, [text], strict=False) for text in (short, long)]
    assert both.l0 == pytest.approx(sum(h.l0 * h.tokens for h in alone) / both.tokens, rel=1e-5)
    expected = sum(h.nll_spliced * (h.tokens - 1) for h in alone) / (both.tokens - 2)
    assert both.nll_spliced == pytest.approx(expected, rel=1e-4)


def test_stops_early_and_leaves_no_hooks(sae, tiny):
    model, tokenizer = tiny()
    health = check_sae(sae(), model, tokenizer, TEXTS * 100, max_tokens=500, strict=False)
    assert 500 <= health.tokens < 5000
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_input(sae, tiny):
    model, tokenizer = tiny(d_model=64)
    with pytest.raises(FeatclError, match="width 32"):
        check_sae(sae(), model, tokenizer, TEXTS)
    model, tokenizer = tiny(n_layers=1)
    with pytest.raises(FeatclError, match="blocks 0 to 0"):
        check_sae(sae(), model, tokenizer, TEXTS)
    model, tokenizer = tiny()
    with pytest.raises(FeatclError, match="at least two tokens"):
        check_sae(sae(), model, tokenizer, [])


# --- what does not fit is refused, and the cause is named -------------------------------------------------------------


def fitted(sae, model, tokenizer, hook_name: str, *, prepend_bos: bool = True, kept: int = 20, scale: float = 1.0):
    """A ReLU SAE that reconstructs the first principal components at a hook: x̂ = m + P Pᵀ(x − m), of scaled x."""
    hook = hooks.resolve(model, hook_name)
    windows = token_windows(tokenizer, TRAINING, context=64, prepend_bos=prepend_bos)
    rows = scale * torch.cat([capture(model, batch, hooks=[hook])[0] for batch in token_batches(windows, tokenizer)])
    mean = rows.mean(0)
    P = torch.linalg.svd(rows - mean, full_matrices=False)[2][:kept].T
    source = sae("standard", d_model=rows.shape[1], d_sae=2 * kept,
                 metadata={"hook_name": hook_name, "prepend_bos": prepend_bos, "source": "fitted"})  # fmt: skip
    source.W_enc.data, source.W_dec.data = torch.cat([P, -P], dim=1), torch.cat([P.T, -P.T])
    source.b_enc.data.zero_()
    source.b_dec.data = mean
    return source


TRAINING = [chr(97 + i % 26) * (i % 5 + 1) + " " + text[i % 11 :] for i in range(40) for text in TEXTS[:2]]
SITES = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "model.layers.1.mlp.output")


@pytest.mark.parametrize("hook_name", SITES)
def test_every_site_is_measured_and_a_right_sae_passes(sae, tiny, family, hook_name):
    model, tokenizer = tiny(family)
    health = check_sae(fitted(sae, model, tokenizer, hook_name), model, tokenizer, TEXTS)
    assert health.fvu < 0.2
    assert 0 < health.l0 <= 20
    assert health.hook_name == hooks.resolve(model, hook_name).hook_name
    perfect_there = fitted(sae, model, tokenizer, hook_name, kept=32)
    health = check_sae(perfect_there, model, tokenizer, TEXTS)
    assert health.fvu < 1e-6
    assert health.loss_recovered == pytest.approx(1, abs=1e-3)
    assert health.nll_zero != pytest.approx(health.nll, abs=1e-3)  # the splice does reach the output


@pytest.mark.parametrize("hook_name", SITES)
def test_the_sae_of_another_layer_is_refused_with_the_right_one_named(sae, tiny, hook_name):
    model, tokenizer = tiny("gemma2")
    source = fitted(sae, model, tokenizer, hook_name.replace(".1.", ".0."), kept=24)
    assert check_sae(source, model, tokenizer, TEXTS).fvu < 0.2
    source.cfg.metadata["hook_name"] = hook_name
    right = hooks.resolve(model, hook_name.replace(".1.", ".0.")).hook_name
    for check in (lambda: check_sae(source, model, tokenizer, TEXTS), lambda: quick_check(source, model, tokenizer)):
        with pytest.raises(FeatclError, match=f"likely cause: wrong hook, at {right} it would be 0.") as caught:
            check()
        assert "\n" not in str(caught.value)
    there = check_sae(source, model, tokenizer, TEXTS, hook_name=right)
    assert check_sae(source, model, tokenizer, TEXTS, strict=False).fvu > 1.5 * there.fvu


@pytest.mark.parametrize("usual", ["mean norm √d_model", "unit root mean square norm"])
def test_an_sae_of_scaled_activations_is_refused_until_the_scale_is_said(tmp_path, usual):
    """The laboratory's SAE, turned into one that expects activations times c, as before its scaling was folded."""
    model, tokenizer = featcl.load_model("lab/olmo2")
    source = load_sae("lab/olmo2/resid_post_3")
    before = quick_check(source, model, tokenizer)
    hook = hooks.resolve(model, source)
    windows = token_windows(tokenizer, PROSE, context=128, prepend_bos=False)
    rows = torch.cat([capture(model, batch, hooks=[hook])[0] for batch in token_batches(windows, tokenizer)])
    norms = rows.norm(dim=-1)
    d_model = rows.shape[1]
    scale = d_model**0.5 / float(norms.mean()) if "√" in usual else 1 / float(norms.square().mean().sqrt())
    source.fold_activation_norm_scaling_factor(1 / scale)
    source.save_model(tmp_path)
    with pytest.raises(FeatclError, match=rf"likely cause: wrong scaling, on activations times {scale:.2g}.*"
                       r"load_sae\(…, activation_scale="):  # fmt: skip
        load_sae(tmp_path, model=model, tokenizer=tokenizer)
    with pytest.raises(FeatclError, match="likely cause: wrong scaling"):
        check_sae(source, model, tokenizer, PROSE)
    folded = load_sae(tmp_path, activation_scale=scale, model=model, tokenizer=tokenizer)
    assert quick_check(folded, model, tokenizer).fvu == pytest.approx(before.fvu, rel=1e-3)


def with_sink(model):
    """An OLMo-2 whose BOS has so large a value vector that it makes up what every later token's attention writes."""
    embed = model.model.embed_tokens.weight.data
    embed[256] = 40 * embed[256] / embed[256].norm()
    return model


def test_a_missing_bos_is_named(sae, tiny):
    model, tokenizer = tiny("olmo2")
    model = with_sink(model)
    source = fitted(sae, model, tokenizer, "blocks.1.hook_resid_post", kept=12)
    assert check_sae(source, model, tokenizer, TEXTS).fvu < 0.4
    source.cfg.metadata["prepend_bos"] = False
    with pytest.raises(FeatclError, match=r"missing BOS, with BOS before the texts it would be 0\..*prepend_bos=True"):
        check_sae(source, model, tokenizer, TEXTS)
    source = fitted(sae, model, tokenizer, "blocks.1.hook_resid_post", kept=12, prepend_bos=False)
    assert check_sae(source, model, tokenizer, TEXTS).fvu < 0.4
    source.cfg.metadata["prepend_bos"] = True
    with pytest.raises(FeatclError, match=r"BOS that it was not trained with"):
        check_sae(source, model, tokenizer, TEXTS)


def test_an_sae_of_another_model_is_refused(sae, tiny):
    model, tokenizer = tiny("olmo2")
    other, _ = tiny("olmo2", seed=5)
    source = fitted(sae, other, tokenizer, "blocks.1.hook_resid_post", kept=8)
    with pytest.raises(FeatclError, match=r"none of the usual causes .* was it trained on this model"):
        check_sae(source, model, tokenizer, TEXTS)


def test_loading_with_a_model_checks_and_prints_the_resolution(sae, tiny, tmp_path, capsys):
    model, tokenizer = tiny("gemma2")
    source = fitted(sae, model, tokenizer, "blocks.0.hook_resid_post")
    source.save_model(tmp_path / "right")
    source.cfg.metadata["hook_name"] = "blocks.1.hook_resid_post"
    source.save_model(tmp_path / "wrong")
    loaded = load_sae(tmp_path / "right", model=model, tokenizer=tokenizer)
    assert "blocks.0.hook_resid_post = model.layers.0.output" in capsys.readouterr().err
    assert loaded.cfg.metadata["hf_hook_name"] == "model.layers.0.output"
    with pytest.raises(FeatclError, match=r"likely cause: wrong hook, at blocks.0.hook_resid_post"):
        load_sae(tmp_path / "wrong", model=model, tokenizer=tokenizer)
    load_sae(tmp_path / "wrong", model=model, tokenizer=tokenizer, check=False)
    load_sae(tmp_path / "wrong", model=model)  # no tokenizer, nothing to read
    with pytest.raises(FeatclError, match="blocks 0 to 0"):
        load_sae(tmp_path / "wrong", model=tiny("gemma2", n_layers=1)[0])


@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_the_laboratorys_saes_pass_on_any_text_and_fail_at_the_next_layer(name):
    """Right SAEs off their own distribution (FVU 0.13 to 0.26 on prose) are not refused; the neighbour's is."""
    model, tokenizer = featcl.load_model(f"lab/{name}")
    for layer in (1, 3):
        source = load_sae(f"lab/{name}/resid_post_{layer}", model=model, tokenizer=tokenizer)
        assert quick_check(source, model, tokenizer).fvu < 0.3
        for wrong in (layer - 1, layer + 1):
            source.cfg.metadata["hook_name"] = f"blocks.{wrong}.hook_resid_post"
            source.cfg.metadata["hf_hook_name"] = None
            with pytest.raises(FeatclError, match=f"wrong hook, at blocks.{layer}.hook_resid_post"):
                quick_check(source, model, tokenizer)


def test_fit_by_hand(sae):
    source, rows, scale = sae("jumprelu"), torch.randn(50, 32), 0.7
    recons = source.decode(source.encode(scale * rows)) / scale
    expected = float((rows - recons).square().sum() / (rows - rows.mean(0)).square().sum())
    found = fit(source, rows, scale=scale)
    assert found.fvu == pytest.approx(expected, rel=1e-5)
    assert found.l0 == pytest.approx(float((source.encode(scale * rows) > 0).sum() / 50))


def test_the_command_line_refuses_an_sae_that_does_not_fit_unless_told_not_to_look(sae, tiny_folder, tmp_path, capsys):
    from featcl import cli

    sae("jumprelu").save_model(tmp_path / "sae")
    (tmp_path / "text.txt").write_text(" ".join(TEXTS))
    given = ["--sae", str(tmp_path / "sae"), "--model", str(tiny_folder("olmo2"))]
    select = ["features", "select", *given, "--selector", "ids", "--ids", "3,5", "--out", str(tmp_path / "out")]
    assert cli.invoke(select) == 2
    said = capsys.readouterr().err
    assert "blocks.1.hook_resid_post = model.layers.1.output (the residual stream after block 1)" in said
    assert "does not fit the model" in said
    assert cli.invoke([*select, "--no-check"]) == 0
    assert cli.invoke(["features", "check", *given, "--text", str(tmp_path / "text.txt")]) == 2


def test_a_handful_of_tokens_condemns_nothing(sae, tiny):
    model, tokenizer = tiny()
    assert check_sae(sae(), model, tokenizer, ["few"]).tokens == 3
