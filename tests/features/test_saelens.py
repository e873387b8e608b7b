"""Loading SAEs: what SAELens saved comes back, and every fault is one clear line."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from featcl.errors import FeatclError
from featcl.features import load_sae
from featcl.features.saelens import require_width, sae_hook

WEIGHTS = "sae_weights.safetensors"


def test_loads_what_saelens_saved(sae, sae_folder):
    saved, loaded = sae(), load_sae(sae_folder())
    hidden = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode(hidden), saved.encode(hidden))
    assert sae_hook(loaded) == "blocks.1.hook_resid_post"
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training


def test_bfloat16_storage_is_computed_in_float32(sae_folder):
    folder = sae_folder()
    save_file({name: t.bfloat16() for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert load_sae(folder).W_dec.dtype == torch.float32


def change(folder, **tensors):
    save_file({**load_file(folder / WEIGHTS), **tensors}, folder / WEIGHTS)


def drop(folder, name):
    save_file({key: t for key, t in load_file(folder / WEIGHTS).items() if key != name}, folder / WEIGHTS)


def configure(folder, **values):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **values}))


FAULTS = {
    "transposed decoder": (lambda f: change(f, W_dec=torch.ones(32, 48)), r"W_dec has shape \[32, 48\].*\[48, 32\]"),
    "not a number": (lambda f: change(f, b_enc=torch.full((48,), float("nan"))), "b_enc holds NaN"),
    "no threshold": (lambda f: drop(f, "threshold"), "lacks threshold"),
    "unknown architecture": (lambda f: configure(f, architecture="cubist"), "cubist"),
    "wrong width": (lambda f: configure(f, d_sae=64), "shape"),
    "no hook": (lambda f: configure(f, metadata={"sae_lens_version": "6.54.12"}), "names no hook_name"),
    "scaling not folded": (lambda f: configure(f, normalize_activations="expected_average_only_in"), "not folded"),
    "no config": (lambda f: (f / "cfg.json").unlink(), "holds no cfg.json"),
    "broken config": (lambda f: (f / "cfg.json").write_text("{"), "not JSON"),
    "empty config": (lambda f: (f / "cfg.json").write_text("{}"), "d_in"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no sae_weights.safetensors"),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "sae_weights.pt"), "sae_weights.pt is a pickle"),
    "a pickle by another name": (lambda f: torch.save({}, f / WEIGHTS), "not a safetensors file"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]), "not a safetensors file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(sae_folder, fault):
    folder = sae_folder()
    damage, says = FAULTS[fault]
    damage(folder)
    with pytest.raises(FeatclError, match=says) as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)


def test_a_known_activation_scaling_is_folded(sae, sae_folder):
    """An SAE saved with its scaling outside: what it does to c x, on x."""
    folder, scale = sae_folder(), 0.25
    configure(folder, normalize_activations="expected_average_only_in")
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    folded = load_sae(folder, activation_scale=scale)
    assert torch.allclose(folded.encode(x), sae().encode(scale * x), atol=1e-5)
    assert torch.allclose(folded(x), sae()(scale * x) / scale, atol=1e-4)
    assert folded.cfg.normalize_activations == "none"
    configure(folder, normalize_activations="layer_norm")
    with pytest.raises(FeatclError, match="processes its input itself"):
        load_sae(folder, activation_scale=scale)


def test_a_file_of_the_folder_stands_for_it(sae_folder):
    folder = sae_folder()
    assert torch.equal(load_sae(folder / WEIGHTS).W_dec, load_sae(folder).W_dec)
    assert torch.equal(load_sae(folder / "cfg.json").W_dec, load_sae(folder).W_dec)


def test_one_spelling_of_the_hook_fills_in_the_other(sae_folder):
    folder = sae_folder()
    assert load_sae(folder).cfg.metadata["hf_hook_name"] == "model.layers.1.output"
    configure(folder, metadata={"sae_lens_version": "6.54.12", "hf_hook_name": "model.layers.4.self_attn.o_proj.input"})
    assert sae_hook(load_sae(folder)) == "blocks.4.attn.hook_z"


def test_missing(tmp_path):
    with pytest.raises(FeatclError, match="not a folder on this machine"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(FeatclError, match="lab/none/resid_post_9"):
        load_sae("lab/none/resid_post_9")
    (tmp_path / "sae.pt").write_bytes(b"")
    with pytest.raises(FeatclError, match="pickle"):
        load_sae(tmp_path / "sae.pt")
    with pytest.raises(FeatclError, match="no-such-release"):
        load_sae("no-such-release", "layer_0")


def test_without_sae_lens(monkeypatch, sae_folder):
    folder = sae_folder()
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(FeatclError, match="sae_lens, which is not installed: pip install sae-lens"):
        load_sae(folder)


def test_width_must_match(sae):
    with pytest.raises(FeatclError, match=r"width 32.*has 64"):
        require_width(sae(), 64)
