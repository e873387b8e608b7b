"""Weight files and releases: encodings equal SAELens' own for each form, offline, and every fault is one clear line."""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featcl.errors import FeatclError
from featcl.features import load_sae
from featcl.features.saelens import sae_hook

D_MODEL, D_SAE = 16, 40
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SCOPE_1 = ("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
SCOPE_2 = ("gemma-scope-2-1b-pt-res", "layer_13_width_16k_l0_medium")


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_MODEL, D_SAE), "W_dec": (D_SAE, D_MODEL), "b_enc": (D_SAE,), "b_dec": (D_MODEL,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"threshold": torch.rand(D_SAE, generator=generator)}


def inputs() -> torch.Tensor:
    return 2 * torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(9))


def jumprelu(weights: dict[str, torch.Tensor], *, subtract: bool) -> torch.Tensor:
    """The formula, by hand."""
    x = inputs() - weights["b_dec"] if subtract else inputs()
    hidden_pre = x @ weights["W_enc"] + weights["b_enc"]
    return hidden_pre.relu() * (hidden_pre > weights["threshold"])


def put(folder: Path, name: str, tensors: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.suffix == ".npz":
        np.savez(path, **{key: t.numpy() for key, t in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def lower(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("W_", "w_"): tensor for name, tensor in weights.items()}


# --- releases from a warm cache ---------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """`cache("google/repo", "folder/file", tensors or text)` puts a file into a faked cache; no socket opens."""
    from huggingface_hub import constants

    hub = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)

    def fill(repo: str, file: str, content: Any, *, commit: str = COMMIT, main: bool = True) -> Path:
        root = hub / f"models--{repo.replace('/', '--')}"
        path = root / "snapshots" / commit / file
        if isinstance(content, str):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        else:
            put(path.parent, path.name, content)
        if main:
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / "main").write_text(commit)
        return path

    return fill


def scopes(cache) -> dict[str, dict[str, torch.Tensor]]:
    one, two = random_weights(1), random_weights(2)
    cache("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71/params.npz", one)
    folder = "resid_post/layer_13_width_16k_l0_medium"
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": "model.layers.13.output"}
    cache("google/gemma-scope-2-1b-pt", f"{folder}/params.safetensors", lower(two))
    cache("google/gemma-scope-2-1b-pt", f"{folder}/config.json", json.dumps(config))
    return {"1": one, "2": two}


def test_both_gemma_scopes_load_offline(cache):
    weights = scopes(cache)
    one, two = load_sae(*SCOPE_1), load_sae(*SCOPE_2, revision=COMMIT)
    assert torch.allclose(one.encode(inputs()), jumprelu(weights["1"], subtract=False), atol=1e-5)
    assert torch.allclose(two.encode(inputs()), jumprelu(weights["2"], subtract=False), atol=1e-5)
    assert not torch.allclose(one.encode(inputs()), jumprelu(weights["1"], subtract=True), atol=1e-2)  # control
    hooks = [(sae_hook(sae), sae.cfg.metadata["hf_hook_name"]) for sae in (one, two)]
    assert hooks == [("blocks.20.hook_resid_post", "model.layers.20.output"),
                     ("blocks.13.hook_resid_post", "model.layers.13.output")]  # fmt: skip
    for sae, source in ((one, SCOPE_1), (two, SCOPE_2)):
        assert sae.cfg.metadata["source"] == "/".join(source)
        assert sae.cfg.metadata["prepend_bos"] is True
        assert sae.cfg.metadata["revision"] == COMMIT
        assert sae.cfg.normalize_activations == "none"
    assert one.cfg.metadata["neuronpedia_id"] == "gemma-2-2b/20-gemmascope-res-16k"
    assert two.cfg.metadata["neuronpedia_id"] == "gemma-3-1b/13-gemmascope-2-res-16k"
    assert one.cfg.metadata["model_name"] == "gemma-2-2b"
    assert two.cfg.metadata["model_name"] == "google/gemma-3-1b-pt"


def test_gemma_scope_equals_saelens_own_loaders(cache, monkeypatch):
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    scopes(cache)

    def sized(loader):
        """SAELens takes Gemma Scope's widths from the repository's name; these are smaller."""
        return lambda **given: loader(
            **given | {"cfg_overrides": {**given["cfg_overrides"], "d_in": D_MODEL, "d_sae": D_SAE}}
        )

    theirs = SAE.from_pretrained(*SCOPE_1, converter=sized(loaders.gemma_2_sae_huggingface_loader))
    ours = load_sae(*SCOPE_1)
    assert torch.allclose(ours.encode(inputs()), theirs.encode(inputs()), atol=1e-5)
    assert torch.allclose(ours(inputs()), theirs(inputs()), atol=1e-5)
    for name in ("hook_name", "prepend_bos", "neuronpedia_id", "model_name"):
        assert ours.cfg.metadata[name] == theirs.cfg.metadata[name], name

    with pytest.raises((AssertionError, OSError)):  # control: why a converter is needed
        SAE.from_pretrained(*SCOPE_2)
    shapes = {"w_enc": [D_MODEL, D_SAE], "w_dec": [D_SAE, D_MODEL]}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    theirs, ours = SAE.from_pretrained(*SCOPE_2), load_sae(*SCOPE_2)
    assert torch.allclose(ours.encode(inputs()), theirs.encode(inputs()), atol=1e-5)
    assert torch.allclose(ours(inputs()), theirs(inputs()), atol=1e-5)
    for name in ("hook_name", "hf_hook_name", "prepend_bos", "neuronpedia_id", "model_name"):
        assert ours.cfg.metadata[name] == theirs.cfg.metadata[name], name


def test_a_fresh_process_without_network(cache, tmp_path):
    """HF_HUB_OFFLINE=1 and the cache's place from the environment, sockets blocked before anything is imported."""
    scopes(cache)
    code = f"""
import socket
def refuse(*a, **k): raise AssertionError("a socket was opened")
socket.socket.connect = refuse
import featcl
for source in ({SCOPE_1!r}, {SCOPE_2!r}):
    print(featcl.load_sae(*source).cfg.metadata["hook_name"])
"""
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["blocks.20.hook_resid_post", "blocks.13.hook_resid_post"]


def test_without_the_environment_variable_the_cache_still_serves(cache, monkeypatch):
    """No network, and nobody said so: what is cached is used."""
    from huggingface_hub import constants

    scopes(cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def no_network(*_arguments: Any, **_named: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert load_sae(*SCOPE_1, offline=True).cfg.d_sae == D_SAE
    assert load_sae(*SCOPE_1, revision=COMMIT).cfg.d_sae == D_SAE


def test_a_release_and_its_id_in_one_string(cache):
    scopes(cache)
    assert load_sae("/".join(SCOPE_1)).cfg.metadata["source"] == "/".join(SCOPE_1)
    assert load_sae("/".join(SCOPE_2) + "@" + COMMIT).cfg.metadata["revision"] == COMMIT
    with pytest.raises(FeatclError, match="at revision v9 is not in the cache"):
        load_sae("/".join(SCOPE_2) + "@v9")


def test_a_pinned_revision_is_the_one_that_loads(cache):
    other, path = "f" * 40, "layer_20/width_16k/average_l0_71/params.npz"
    cache("google/gemma-scope-2b-pt-res", path, random_weights(1))
    cache("google/gemma-scope-2b-pt-res", path, random_weights(5), commit=other, main=False)
    assert torch.equal(load_sae(*SCOPE_1).W_dec, random_weights(1)["W_dec"])
    assert torch.equal(load_sae(*SCOPE_1, revision=other).W_dec, random_weights(5)["W_dec"])


@pytest.mark.parametrize(("kind", "point", "hf"), [
    ("mlp", "hook_mlp_out", "model.layers.20.post_feedforward_layernorm.output"),
    ("att", "attn.hook_z", "model.layers.20.self_attn.o_proj.input"),
])  # fmt: skip
def test_gemma_scope_of_other_sites(cache, kind, point, hf):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release, sae_id = f"gemma-scope-2b-pt-{kind}-canonical", "layer_20/width_16k/canonical"
    folder = get_pretrained_saes_directory()[release].saes_map[sae_id]
    cache(f"google/gemma-scope-2b-pt-{kind}", f"{folder}/params.npz", random_weights())
    sae = load_sae(release, sae_id)
    assert (sae_hook(sae), sae.cfg.metadata["hf_hook_name"]) == (f"blocks.20.{point}", hf)
    # an attention SAE reads heads side by side: no reshaping is left on
    assert torch.allclose(sae.encode(inputs()), jumprelu(random_weights(), subtract=False), atol=1e-5)


def test_any_repository_in_saelens_form(cache, sae, tmp_path):
    saved = sae("jumprelu")
    saved.save_model(tmp_path / "made")
    cache("someone/saes", "layer_1/cfg.json", (tmp_path / "made" / "cfg.json").read_text())
    cache("someone/saes", "layer_1/sae_weights.safetensors", load_file(tmp_path / "made" / "sae_weights.safetensors"))
    loaded = load_sae("someone/saes", "layer_1", revision=COMMIT)
    x = torch.randn(9, 32)
    assert torch.equal(loaded.encode(x), saved.encode(x))
    assert loaded.cfg.metadata["revision"] == COMMIT
    assert sae_hook(loaded) == "blocks.1.hook_resid_post"


def test_release_faults(cache):
    with pytest.raises(FeatclError, match=r"params.npz at revision main is not in the cache .*hf download google"):
        load_sae(*SCOPE_1)
    with pytest.raises(FeatclError, match="nearest: gemma-scope-2b-pt-res"):
        load_sae("gemma-scope-2b-pt-ress", "layer_20/width_16k/canonical")
    with pytest.raises(FeatclError, match=r"has no id layer_99.*nearest"):
        load_sae("gemma-scope-2b-pt-res-canonical", "layer_99/width_16k/canonical")
    with pytest.raises(FeatclError, match="needs an id as well: layer_0/width_16k/canonical"):
        load_sae("gemma-scope-2b-pt-res-canonical")
    with pytest.raises(FeatclError, match="transcoder"):
        load_sae("gemma-scope-2-1b-pt-transcoders", "transcoder/layer_13_width_16k_l0_medium")
    with pytest.raises(FeatclError, match="takes no revision"):
        load_sae("llama_scope_lxr_8x", "l0r_8x", revision=COMMIT)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params.npz", "params.safetensors"])
def test_gemma_scope_files(tmp_path, name):
    weights = random_weights()
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    path = put(folder, name, lower(weights) if name.endswith("safetensors") else weights)
    for source in (path, folder):  # the folder that holds it works too
        sae = load_sae(source)
        assert torch.allclose(sae.encode(inputs()), jumprelu(weights, subtract=False), atol=1e-5)
        expected = jumprelu(weights, subtract=False) @ weights["W_dec"] + weights["b_dec"]
        assert torch.allclose(sae(inputs()), expected, atol=1e-4)
        assert sae_hook(sae) == "blocks.20.hook_resid_post"
        assert sae.cfg.metadata["source"] == str(source)


@pytest.mark.parametrize(("place", "hook"), [
    ("models--google--gemma-scope-2b-pt-att/snapshots/abc/layer_3/width_16k/average_l0_9", "blocks.3.attn.hook_z"),
    ("gemma-scope-9b-pt-mlp/layer_7/width_131k/average_l0_9", "blocks.7.hook_mlp_out"),
    ("layer_12/width_65k/average_l0_9", "blocks.12.hook_resid_post"),
    ("gemma-scope-2-4b-it/attn_out/layer_9_width_16k_l0_big", "blocks.9.attn.hook_z"),
    ("mlp_out_all/layer_2_width_16k_l0_small", "blocks.2.hook_mlp_out"),
    ("resid_post_layer_8/trainer_0", "blocks.8.hook_resid_post"),
])  # fmt: skip
def test_the_hook_is_read_off_the_path(tmp_path, place, hook):
    assert sae_hook(load_sae(put(tmp_path / place, "params.npz", random_weights()))) == hook


def test_without_a_hook_the_file_loads_but_says_what_it_needs(tmp_path, capsys):
    path = put(tmp_path, "params.npz", random_weights())
    sae = load_sae(path)
    assert "hook_name= tells" in capsys.readouterr().err
    with pytest.raises(FeatclError, match="names no hook_name: load it with hook_name="):
        sae_hook(sae)
    for name in ("blocks.5.hook_resid_post", "model.layers.5.output", "model.layers.5"):
        assert sae_hook(load_sae(path, hook_name=name)) == "blocks.5.hook_resid_post"
    assert load_sae(path, hook_name="blocks.5.hook_resid_post", prepend_bos=True).cfg.metadata["prepend_bos"] is True
    with pytest.raises(FeatclError, match=r"'blocks.5.hook_resid_mid' is none that SAEs are read at"):
        load_sae(path, hook_name="blocks.5.hook_resid_mid")


def test_scaling_factor_multiplies_features_before_decoding(tmp_path):
    weights = random_weights()
    factor = torch.rand(D_SAE) + 0.5
    ones = load_sae(put(tmp_path / "ones", "params.npz", weights | {"scaling_factor": torch.ones(D_SAE)}))
    load_sae(put(tmp_path / "one", "params.npz", weights | {"scaling_factor": torch.ones(1)}))
    scaled = load_sae(put(tmp_path / "scaled", "params.npz", weights | {"scaling_factor": factor}))
    feature_acts = jumprelu(weights, subtract=False)
    assert torch.equal(ones.W_dec, weights["W_dec"])
    assert torch.allclose(scaled.encode(inputs()), feature_acts, atol=1e-5)
    expected = (factor * feature_acts) @ weights["W_dec"] + weights["b_dec"]
    assert torch.allclose(scaled.decode(feature_acts), expected, atol=1e-4)
    with pytest.raises(FeatclError, match=r"scaling_factor has shape \[1\], expected \[d_sae\] = \[40\]"):
        load_sae(put(tmp_path, "params.npz", weights | {"scaling_factor": torch.tensor([2.0])}))


def test_activation_scale_is_folded(tmp_path):
    """An SAE of activations times c, on raw activations: encode(c x), decode / c."""
    path, c = put(tmp_path, "params.npz", random_weights()), 0.3
    plain, folded = load_sae(path), load_sae(path, activation_scale=c)
    assert torch.allclose(folded.encode(inputs()), plain.encode(c * inputs()), atol=1e-5)
    assert torch.allclose(folded(inputs()), plain(c * inputs()) / c, atol=1e-4)


def square(transposed: bool) -> dict[str, torch.Tensor]:
    W_enc = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0))
    biases = {name: torch.zeros(D_MODEL) for name in ("b_enc", "b_dec", "threshold")}
    return {"W_enc": W_enc, "W_dec": W_enc.clone() if transposed else W_enc.T.contiguous(), **biases}


FAULTS = {
    "transposed decoder": (lambda w: w | {"W_dec": w["W_dec"].T}, r"W_dec has shape \[16, 40\].*\[40, 16\]: it is tr"),
    "transposed encoder": (lambda w: w | {"W_enc": w["W_enc"].T}, r"W_enc has shape \[40, 16\].*transposed"),
    "wrong shape": (lambda w: w | {"threshold": torch.ones(7)}, r"threshold has shape \[7\], expected .* = \[40\]"),
    "matrix for a bias": (lambda w: w | {"b_enc": torch.ones(2, 20)}, "b_enc has shape .* expected a vector"),
    "NaN": (lambda w: w | {"b_enc": torch.full((D_SAE,), float("nan"))}, "b_enc holds NaN"),
    "infinite": (lambda w: w | {"W_dec": w["W_dec"] * float("inf")}, "W_dec holds NaN or infinite"),
    "no threshold": (lambda w: {k: t for k, t in w.items() if k != "threshold"}, "lacks threshold, expected"),
    "no bias": (lambda w: {k: t for k, t in w.items() if k != "b_dec"}, "lacks b_dec"),
    "unknown tensor": (lambda w: w | {"W_gate": w["W_enc"].clone()}, "holds W_gate, which no known SAE form has"),
    "a transcoder": (lambda w: w | {"affine_skip_connection": torch.ones(16, 16)}, "transcoder"),
    "empty": (lambda w: {}, "holds no tensors"),
    "transposed square decoder": (lambda w: square(transposed=True), "decoder is transposed"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["params.npz", "params.safetensors"])
def test_faults(tmp_path, fault, name):
    damage, says = FAULTS[fault]
    with pytest.raises(FeatclError, match=says) as caught:
        load_sae(put(tmp_path, name, damage(random_weights())))
    assert "\n" not in str(caught.value)


def test_a_square_sae_that_is_right_is_not_refused(tmp_path):
    assert load_sae(put(tmp_path, "params.npz", square(transposed=False))).cfg.d_sae == D_MODEL


class _Runs:
    """Unpickling it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.target, "ran"))


def test_files_that_carry_code_are_refused_and_do_not_run(tmp_path):
    victim = tmp_path / "victim"
    torch.save({"encoder.weight": _Runs(victim)}, tmp_path / "ae.pt")
    with pytest.raises(FeatclError, match="could run code"):
        load_sae(tmp_path / "ae.pt")
    np.savez(tmp_path / "params.npz", W_enc=np.array([_Runs(victim)], dtype=object))
    with pytest.raises(FeatclError, match="can run code"):
        load_sae(tmp_path / "params.npz")
    (tmp_path / "params.npz").write_bytes(pickle.dumps(_Runs(victim)))
    with pytest.raises(FeatclError, match="can run code"):
        load_sae(tmp_path / "params.npz")
    (tmp_path / "params.safetensors").write_bytes(pickle.dumps(_Runs(victim)))
    with pytest.raises(FeatclError, match="not a safetensors file"):
        load_sae(tmp_path / "params.safetensors")
    assert not victim.exists()
    torch.load(tmp_path / "ae.pt", weights_only=False)  # control: it would have run
    assert victim.read_text() == "ran"


def test_damaged_and_foreign_files(tmp_path):
    path = put(tmp_path, "params.npz", random_weights())
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(FeatclError, match=r"not a complete .npz"):
        load_sae(path)
    path = put(tmp_path, "ae.pt", {"encoder.weight": torch.ones(3)})
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FeatclError, match="not a complete pickle of tensors"):
        load_sae(path)
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(FeatclError, match="holds a list, not a state dict"):
        load_sae(tmp_path / "list.pt")
    torch.save({"model": {"a": torch.ones(3)}}, tmp_path / "nested.pt")
    with pytest.raises(FeatclError, match="model is a dict, not a tensor"):
        load_sae(tmp_path / "nested.pt")
    (tmp_path / "sae.txt").write_text("hello")
    with pytest.raises(FeatclError, match=r"is no SAE file: .npz, .safetensors, .pt"):
        load_sae(tmp_path / "sae.txt")


# --- dictionary_learning ----------------------------------------------------------------------------------------------


def dictionary(kind: str) -> dict[str, torch.Tensor]:
    """A state dict as dictionary_learning saves it."""
    w = random_weights(3)
    linear = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"],
              "decoder.weight": w["W_dec"].T.contiguous()}  # fmt: skip
    k, threshold = torch.tensor(5, dtype=torch.int), torch.tensor(0.4)
    gate = {name: torch.randn(D_SAE, generator=torch.Generator().manual_seed(i)) for i, name in
            enumerate(("r_mag", "gate_bias", "mag_bias"))}  # fmt: skip
    return {
        "AutoEncoder": linear | {"bias": w["b_dec"]},
        "AutoEncoderNew": linear | {"decoder.bias": w["b_dec"]},
        "AutoEncoderTopK": linear | {"b_dec": w["b_dec"], "k": k, "threshold": threshold},
        "BatchTopKSAE": linear | {"b_dec": w["b_dec"], "k": k, "threshold": threshold},
        "MatryoshkaBatchTopKSAE": {n: w[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")}
        | {"k": k, "threshold": threshold, "group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": w,
        "GatedAutoEncoder": {"encoder.weight": linear["encoder.weight"], "decoder.weight": linear["decoder.weight"],
                             "decoder_bias": w["b_dec"], **gate},
    }[kind]  # fmt: skip


KINDS = ("AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder",
         "GatedAutoEncoder")  # fmt: skip


def trainer_config(kind: str) -> str:
    trainer = {"dict_class": kind, "layer": 8, "lm_name": "EleutherAI/pythia-70m-deduped", "activation_dim": D_MODEL,
               "dict_size": D_SAE, "k": 5, "submodule_name": "resid_post_layer_8"}  # fmt: skip
    return json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}})


@pytest.mark.parametrize("kind", KINDS)
def test_dictionary_learning_equals_saelens_own_loader(cache, tmp_path, kind):
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import dictionary_learning_sae_huggingface_loader_1

    repo, folder = "someone/dictionaries", "resid_post_layer_8/trainer_0"
    path = cache(repo, f"{folder}/ae.pt", dictionary(kind))
    cache(repo, f"{folder}/config.json", trainer_config(kind))
    theirs = SAE.from_pretrained(repo, folder, converter=dictionary_learning_sae_huggingface_loader_1)
    ours = load_sae(path)
    assert ours.cfg.architecture() == theirs.cfg.architecture()
    assert torch.allclose(ours.encode(inputs()), theirs.encode(inputs()), atol=1e-5)
    assert torch.allclose(ours(inputs()), theirs(inputs()), atol=1e-4)
    assert (ours.encode(inputs()) > 0).any()
    assert sae_hook(ours) == "blocks.8.hook_resid_post"
    assert ours.cfg.metadata["revision"] == COMMIT
    assert torch.equal(load_sae(path.parent).W_dec, ours.W_dec)  # its folder stands for the file


def test_dictionary_learning_by_formula(tmp_path):
    """relu(W (x − b) + c), the variant whose bias is in the decoder alone, and converted BatchTopK."""
    w, x = random_weights(3), inputs()
    plain = load_sae(put(tmp_path / "a", "ae.pt", dictionary("AutoEncoder")))
    assert torch.allclose(plain.encode(x), ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu(), atol=1e-5)
    new = load_sae(put(tmp_path / "b", "ae.pt", dictionary("AutoEncoderNew")))
    assert torch.allclose(new.encode(x), (x @ w["W_enc"] + w["b_enc"]).relu(), atol=1e-5)
    batch = load_sae(put(tmp_path / "c", "ae.pt", dictionary("BatchTopKSAE")), architecture="batchtopk")
    weights = w | {"threshold": torch.tensor(0.4)}
    assert torch.allclose(batch.encode(x), jumprelu(weights, subtract=True), atol=1e-5)
    topk = load_sae(put(tmp_path / "d", "ae.pt", dictionary("AutoEncoderTopK")), architecture="topk")
    assert (topk.encode(x) > 0).sum(-1).max() == 5
    alone = {name: tensor for name, tensor in dictionary("AutoEncoderTopK").items() if name != "threshold"}
    assert torch.equal(load_sae(put(tmp_path / "e", "ae.pt", alone)).encode(x), topk.encode(x))


def test_dictionary_learning_faults(tmp_path):
    def load(says: str, tensors: dict[str, torch.Tensor], **options: Any) -> None:
        with pytest.raises(FeatclError, match=says) as caught:
            load_sae(put(tmp_path, "ae.pt", tensors), **options)
        assert "\n" not in str(caught.value)

    both = dictionary("BatchTopKSAE")
    load("holds both k and threshold.*say architecture=", both)
    load("training never set", both | {"threshold": torch.tensor(-1.0)}, architecture="batchtopk")
    load("which is topk or batchtopk, not gated", both, architecture="gated")
    load("architecture 'cubist' is unknown", both, architecture="cubist")
    load(r"decoder.weight has shape \[40, 16\], expected \[d_model, d_sae\] = \[16, 40\]: it is transposed",
         both | {"decoder.weight": both["decoder.weight"].T.contiguous()}, architecture="topk")  # fmt: skip
    load("b_enc holds NaN", dictionary("JumpReluAutoEncoder") | {"b_enc": torch.full((D_SAE,), float("nan"))})
    load("lacks threshold", {k: t for k, t in dictionary("JumpReluAutoEncoder").items() if k != "threshold"})
    load("decoder bias", {k: t for k, t in dictionary("AutoEncoder").items() if k != "bias"})
    load("holds extra", dictionary("AutoEncoder") | {"extra": torch.ones(2)})
    load("k is 0.0", dictionary("AutoEncoderTopK") | {"k": torch.tensor(0)}, architecture="topk")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    load("config.json calls it CrossCoder", dictionary("AutoEncoder"))
