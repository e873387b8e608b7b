"""Bundles: named selectors that resolve per model, never ids; the shipped ones are what their generator makes."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import yaml

import featcl
from featcl.build import build
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.features import Bundle, bundle_names
from featcl.features.bundle import FOLDER, KEYS, model_names
from featcl.features.provenance import text_digests
from featcl.lab.factors import factor_pairs
from featcl.lab.streams import load_stream
from featcl.streams import Chat

pytest.importorskip("sae_lens", reason="sae-lens is not installed")

SUB_BUNDLES = {
    "coding-agent": ("design", "syntax-style", "engineering-behaviour"),
    "home-assistant": ("emotions", "relationships", "communication-style"),
}


@cache
def lab(family: str = "olmo2") -> tuple[Any, Any, Any]:
    return featcl.load_sae(f"lab/{family}/resid_post_3"), *featcl.load_model(f"lab/{family}")


def test_two_bundles_with_three_sub_bundles_for_lab_and_gemma() -> None:
    assert bundle_names() == sorted(SUB_BUNDLES)
    for name, parts in SUB_BUNDLES.items():
        bundle = Bundle.load(name)
        patterns = [pattern for patterns, _ in bundle.models for pattern in patterns]
        assert {"lab/*", "gemma2", "gemma3", "gemma3_text"} <= set(patterns)
        for _, found in bundle.models:
            assert tuple(found) == parts


def test_shipped_bundles_name_no_ids_and_balanced_texts() -> None:
    for name in bundle_names():
        for patterns, parts in Bundle.load(name).models:
            for entries in parts.values():
                for entry in entries:
                    assert set(entry) <= set(KEYS)
                    assert entry["selector"] not in ("ids", "hand")
                    if entry["selector"] == "contrast":
                        assert len(entry["positive"]) == len(entry["negative"]) >= 12
                if "lab/*" not in patterns:
                    assert {entry["selector"] for entry in entries} == {"explanations", "contrast"}


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
@pytest.mark.parametrize("name", sorted(SUB_BUNDLES))
def test_they_resolve_on_the_lab_models(family: str, name: str) -> None:
    sae, model, tokenizer = lab(family)
    found = Bundle.load(name).resolve(sae, model, tokenizer)
    assert tuple(found) == SUB_BUNDLES[name]
    for part, directions in found.items():
        assert directions.k == 8
        assert directions.selector == f"bundle({name}/{part})"
        assert directions.manifest["sae"] == f"lab/{family}/resid_post_3"
        [used] = directions.manifest["parts"]
        assert used["significant"] >= 8, "all eight pass the false discovery rate"
        assert max(used["scores"]["q_value"]) <= 0.05
    merged = Bundle.load(name).merged(sae, model, tokenizer)
    assert set(merged.feature_ids) == {feature for part in found.values() for feature in part.feature_ids}
    only = Bundle.load(f"{name}/{part}").merged(sae, model, tokenizer)
    assert only.feature_ids == found[part].feature_ids


def test_sub_bundles_are_about_different_things() -> None:
    sae, model, tokenizer = lab()
    found = [
        set(d.feature_ids) for name in SUB_BUNDLES for d in Bundle.load(name).resolve(sae, model, tokenizer).values()
    ]
    shared = [len(a & b) for i, a in enumerate(found) for b in found[:i]]
    assert max(shared) <= 2


def test_the_lab_texts_are_what_the_script_makes(root) -> None:
    spec = importlib.util.spec_from_file_location("bundle_texts", root / "scripts" / "lab" / "bundle_texts.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.content() == (FOLDER / "lab.yaml").read_text(encoding="utf-8")
    texts = yaml.safe_load((FOLDER / "lab.yaml").read_text(encoding="utf-8"))
    positive, _ = factor_pairs("emotions", script.COUNT, seed=1)
    assert list(texts["emotions"]["positive"][0].items()) == [(m["role"], m["content"]) for m in positive[0]]


def test_the_lab_texts_are_none_that_a_stream_teaches_or_asks() -> None:
    """The control: the stream's own conversations are found."""
    _, _, tokenizer = lab()
    chat = Chat(tokenizer)
    texts = yaml.safe_load((FOLDER / "lab.yaml").read_text(encoding="utf-8"))
    ours = [
        chat.encode([{"role": r, "content": c} for r, c in turns.items()], mask="none").input_ids
        for sides in texts.values() for side in sides.values() for turns in side
    ]  # fmt: skip
    for world in ("development", "unseen"):
        stream = load_stream(world=world)
        asked = [
            [*item.messages, {"role": "assistant", "content": item.answer}] for t in stream.tasks for item in t.items
        ]
        taught = [t.messages for task in stream.tasks for t in task.trajectories]
        theirs = [chat.encode(messages, mask="none").input_ids for messages in [*asked, *taught]]
        digests = text_digests(theirs, tokenizer)
        assert digests.isdisjoint(text_digests(ours, tokenizer))
        assert not digests.isdisjoint(text_digests([*ours, theirs[0]], tokenizer))


def test_gemma_gets_its_selectors_and_explanations_can_be_skipped(sae, tiny, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FEATCL_CACHE", str(tmp_path))
    model, tokenizer = tiny("gemma2")
    assert model_names(model)[1] == "gemma2"
    bundle = Bundle.load("home-assistant/emotions")
    with pytest.raises(FeatclError, match="no Neuronpedia id"):
        bundle.resolve(sae(), model, tokenizer)
    found = bundle.resolve(sae(), model, tokenizer, skip=("explanations",))
    assert found["emotions"].k == 8
    with pytest.raises(FeatclError, match="all selectors of emotions are skipped"):
        bundle.resolve(sae(), model, tokenizer, skip=("explanations", "contrast"))


def test_a_model_without_selectors_and_unknown_names(sae, tiny) -> None:
    with pytest.raises(FeatclError, match=r"no selectors for .* or olmo2: it is for lab/\*, gemma2"):
        Bundle.load("coding-agent").resolve(sae(), *tiny("olmo2"))
    with pytest.raises(FeatclError, match="'coding-agnt' does not exist, did you mean 'coding-agent'"):
        Bundle.load("coding-agnt")
    with pytest.raises(FeatclError, match="no sub-bundle 'emotion', did you mean 'emotions'"):
        Bundle.load("home-assistant/emotion")


def test_ones_own_bundle_and_its_faults(sae, tiny, tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "models: [{for: [olmo*], letters: [{selector: contrast, k: 2, positive: [zz, z z], negative: [aa, a a]}]}]"
    )
    assert Bundle.load(path).merged(sae("standard"), *tiny()).k == 2
    start = "models: [{for: [olmo2], letters: "
    for text, says in (
        (start + "[{selector: contrast, positive: [a]}]}]", "lacks its k"),
        (start + "[{selector: contrast, k: 2, postive: [a]}]}]", "did you mean 'positive'"),
        (start + "[{k: 2}]}]", "a mapping with `selector`"),
        (start + "[]}]", "a list of selectors"),
        (start + "[{selector: contrast, k: 2, texts: lab.yaml#x}]}]", "cannot read this bundle"),
        ("models: [{letters: []}]", "expected `for:`"),
        ("modles: []", "has the keys about and models"),
        ("models: [", "cannot read this bundle"),
    ):
        path = tmp_path / f"{abs(hash(text))}.yaml"
        path.write_text(text)
        with pytest.raises(FeatclError, match=says) as caught:
            Bundle.load(path)
        assert "\n" not in str(caught.value)


def test_a_run_takes_a_bundle_on_every_layer(tmp_path) -> None:
    (tmp_path / "arm.yaml").write_text(
        "stream: {name: lab/home, tasks: [home_style], limit: 2}\nevaluation: {suites: [], canaries: null}\n"
        "features: {sae: {1: lab/olmo2/resid_post_1, 3: lab/olmo2/resid_post_3}, bundle: home-assistant}\n"
    )
    sets = build(RunConfig.load(tmp_path / "arm.yaml")).directions
    assert isinstance(sets, dict)
    assert {layer: (d.layer, d.selector) for layer, d in sets.items()} == {
        1: (1, "bundle(home-assistant)"),
        3: (3, "bundle(home-assistant)"),
    }
    random = build(RunConfig.load(tmp_path / "arm.yaml", ["adapter.basis=random_features"])).directions
    assert isinstance(random, dict)
    assert random[3].k == sets[3].k
    assert not set(random[3].feature_ids) & set(sets[3].feature_ids)
