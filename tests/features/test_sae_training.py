"""Training through SAELens: it learns, repeats itself, records what it did, and refuses what it must."""

from __future__ import annotations

import json
import random

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import check_sae, load_sae, read_texts, train_from_files, train_saes
from featcl.features import training as training_module
from featcl.features.training import SAESettings, shuffled_activations
from featcl.models import load_model, model_digest

WORDS = ["the", "lamp", "door", "music", "garden", "window", "kettle", "is", "open", "closed", "green", "old", "but"]


def texts(count: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=12)) for _ in range(count)]


OPTIONS = {"tokens": 40_000, "batch_size": 256, "d_sae": 128}


_TRAINED: list[tuple] = []


@pytest.fixture
def trained(tiny, tmp_path_factory):
    """Two layers in one pass on a tiny random model, once for all tests."""
    if not _TRAINED:
        out = tmp_path_factory.mktemp("saes")
        _TRAINED.append((*tiny(), out, train_saes(*tiny(), texts(), layers=[0, 2], out=out, **OPTIONS)))
    return _TRAINED[0]


def test_several_layers_in_one_pass(trained):
    _, _, out, results = trained
    assert sorted(results) == [0, 2]
    for layer, result in results.items():
        assert result.folder == out / f"resid_post_{layer}"
        assert result.health.hook_name == f"blocks.{layer}.hook_resid_post"
        assert result.health.fvu < 0.3
        assert result.health.l0 == pytest.approx(32 / 5, rel=0.25)
        assert result.health.loss_recovered > 0.7


def test_wrong_layer_is_much_worse(trained):
    """Negative control: the SAE of layer 0 on layer 2."""
    model, tokenizer, _, results = trained
    sae = load_sae(results[0].folder)
    elsewhere = check_sae(sae, model, tokenizer, texts(20, seed=1), hook_name="blocks.2.hook_resid_post")
    here = check_sae(sae, model, tokenizer, texts(20, seed=1))
    assert elsewhere.fvu > 2 * here.fvu
    assert elsewhere.loss_recovered < here.loss_recovered


def test_manifest(trained):
    model, _, _, results = trained
    manifest = json.loads((results[2].folder / "featcl.json").read_text())
    assert manifest["model_digest"] == model_digest(model)
    assert manifest["config"]["d_sae"] == 128
    assert manifest["config"]["l0"] == pytest.approx(6.4)
    assert manifest["hook_name"] == "blocks.2.hook_resid_post"
    assert manifest["held_out"]["fvu"] == results[2].health.fvu
    assert {"torch", "sae-lens"} <= manifest["versions"].keys()


def test_the_same_seed_gives_the_same_files(trained, tmp_path):
    model, tokenizer, out, _ = trained
    train_saes(model, tokenizer, texts(), layers=[0, 2], out=tmp_path, **OPTIONS)
    train_saes(model, tokenizer, texts(), layers=[2], out=tmp_path / "other", seed=1, **OPTIONS)
    for name in ("cfg.json", "sae_weights.safetensors", "featcl.json"):
        first = (out / "resid_post_2" / name).read_bytes()
        assert (tmp_path / "resid_post_2" / name).read_bytes() == first
        if name != "cfg.json":
            assert (tmp_path / "other" / name).read_bytes() != first


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "matryoshka_batchtopk"])
def test_other_architectures_train_and_load(tiny, tmp_path, architecture):
    model, tokenizer = tiny(n_layers=2)
    options = OPTIONS | {"tokens": 20_000, "storage": "bfloat16"}
    result = train_saes(
        model, tokenizer, texts(), layers=[1], out=tmp_path / "sae", architecture=architecture, **options
    )
    assert result[1].folder == tmp_path / "sae"  # one layer: the folder itself
    assert result[1].health.fvu < 0.7
    assert load_sae(tmp_path / "sae").cfg.architecture() == ("topk" if architecture == "topk" else "jumprelu")


def test_streamed_and_cached_activations_hold_the_same_rows(tiny, monkeypatch):
    model, tokenizer = tiny()
    windows = [tokenizer(text).input_ids for text in texts(40)]
    settings = SAESettings(batch_size=64, tokens=2560)

    def mean_of(batches: int) -> torch.Tensor:
        stream = shuffled_activations(model, tokenizer, windows, layers=[2, 0], settings=settings)
        rows = torch.cat([next(stream) for _ in range(batches)])
        assert rows.shape[1:] == (2, 32)
        return rows.mean(0)

    cached = mean_of(60)
    monkeypatch.setattr(training_module, "CACHE_BYTES", 1)
    assert torch.allclose(mean_of(60), cached, atol=0.1 * float(cached.abs().max()))


def test_bad_input(tiny, tmp_path, sae_folder):
    model, tokenizer = tiny()

    def train(says: str, *, layers=(1,), out=tmp_path / "new", from_texts=None, **options):
        with pytest.raises(FeatclError, match=says):
            train_saes(
                model, tokenizer, texts(2) if from_texts is None else from_texts, layers=layers, out=out, **options
            )
        assert not (tmp_path / "new").exists()

    train("no option 'width'", width=3)
    train("blocks 0 to 2", layers=[3])
    train("each once", layers=[1, 1])
    train("at least one layer", layers=[])
    train("too few to train", from_texts=["hello"])
    train("too few to train", from_texts=[])
    train("architecture 'cubist' is unknown", architecture="cubist")
    train("l0 = 300", l0=300)
    train("holds an SAE already", out=sae_folder())
    with pytest.raises(FeatclError, match="at least one text file"):
        train_from_files("lab/olmo2", [], [1], tmp_path / "new")


def test_real_model(real, tmp_path):
    """A trained Llama-class model and a real text: a minute's worth of training cut to seconds, with looser limits."""
    folder, text = real / "models" / "stories260K", real / "text" / "genesis_english-web.txt.gz"
    result = train_from_files(str(folder), [text], [2], tmp_path / "sae", tokens=150_000)[2]
    assert result.health.fvu <= 0.15
    assert result.health.l0 <= 16
    assert result.health.dead_fraction <= 0.10
    assert result.health.loss_recovered >= 0.85
    model, tokenizer = load_model(folder)
    sample = [read_texts(real / "text" / "inaugural.txt.gz")[0]]
    sae = load_sae(tmp_path / "sae")
    here = check_sae(sae, model, tokenizer, sample, max_tokens=2000)
    elsewhere = check_sae(sae, model, tokenizer, sample, max_tokens=2000, hook_name="model.layers.4")
    assert elsewhere.fvu > 3 * here.fvu
