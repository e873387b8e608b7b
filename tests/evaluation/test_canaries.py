"""Canaries: nothing at the base model, and the truth once it has changed."""

from __future__ import annotations

import math

import pytest
import torch

from featcl.errors import FeatclError
from featcl.evaluation.canaries import Canaries
from featcl.evaluation.scoring import encode_item
from tests.evaluation import toys


def build(network) -> Canaries:
    chat = toys.chat()
    items = [toys.item(f"t{i}", f"w{i} w1", "w2 w3", task="alpha" if i % 2 else "beta") for i in range(6)]
    suite = [toys.item(f"g{i}", f"w{i} w9 w8", "w4", task="facts") for i in range(4)]
    return Canaries(network, chat, items, suites={"facts": suite})


def disturbed(network, scale: float = 0.2):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += scale * torch.randn_like(parameter)
    return network


def test_the_base_model_has_no_distance_to_itself() -> None:
    network = toys.model()
    reading = build(network).score(network)
    assert reading.kl_to_base == {"tasks": 0.0, "general": 0.0}
    assert reading.forgetting == {"beta": 0.0, "alpha": 0.0}
    assert reading.right_to_wrong == reading.wrong_to_right == ()
    assert set(reading.record()) == {
        "canary/loss_tasks", "canary/loss_general", "canary/kl_tasks", "canary/kl_general", "score/alpha",
        "score/beta", "forgetting/alpha", "forgetting/beta", "general/facts", "canary/right_to_wrong",
        "canary/wrong_to_right",
    }  # fmt: skip


def test_loss_and_kl_of_a_changed_model_equal_a_plain_loop() -> None:
    chat, network = toys.chat(), toys.model()
    items = [toys.item(f"t{i}", " ".join(["w1"] * (i + 1)), "w2 w3") for i in range(5)]
    canaries = Canaries(network, chat, items, batch_tokens=40)
    changed = disturbed(toys.model())
    reading = canaries.score(changed)
    loss = kl = tokens = 0.0
    for item in items:
        ids = encode_item(chat, item).input_ids
        with torch.no_grad():
            base = network(torch.tensor([ids])).logits[0, -4:-1].double().log_softmax(-1)
            now = changed(torch.tensor([ids])).logits[0, -4:-1].double().log_softmax(-1)
        loss -= now.gather(1, torch.tensor(ids[-3:])[:, None]).sum().item()
        kl += (base.exp() * (base - now)).sum().item()
        tokens += 3
    assert reading.loss["tasks"] == pytest.approx(loss / tokens, abs=1e-5)
    assert reading.kl_to_base["tasks"] == pytest.approx(kl / tokens, abs=1e-5)
    assert kl / tokens > 0.01


def test_forgetting_is_measured_from_the_best_score_so_far_and_flips_are_named() -> None:
    """One task goes 0 -> 1 -> 0."""
    chat, network = toys.chat(), toys.model()
    items = [toys.item("t", "w1", "w2")]
    canaries = Canaries(network, chat, items)
    learned = toys.teach(toys.model(), chat, items)
    first = canaries.score(learned)
    assert (first.score["toy"], first.forgetting["toy"], first.wrong_to_right) == (1.0, 0.0, ("t",))
    kept = canaries.state_dict()
    second = canaries.score(network)
    assert (second.forgetting["toy"], second.wrong_to_right, second.kl_to_base["tasks"]) == (1.0, (), 0.0)
    resumed = Canaries(network, chat, items)
    assert resumed.score(network).forgetting["toy"] == 0.0
    resumed.load_state_dict(kept)
    assert resumed.score(network).forgetting["toy"] == 1.0
    with pytest.raises(FeatclError, match="these canaries have"):
        resumed.load_state_dict({"other": 1.0})


def test_windows_of_text_count_in_nats() -> None:
    chat, network = toys.chat(), toys.model()
    windows = {"source": [chat.encode_text("w1 w2 w3"), chat.encode_text("w5 w6 w7 w8")]}
    canaries = Canaries(network, chat, windows=windows, background={"plain": [chat.encode_text("w1 w9 w9")]})
    before, after = canaries.score(network), canaries.score(disturbed(toys.model()))
    assert before.score["source"] == pytest.approx(-before.loss["tasks"])
    assert after.forgetting["source"] == pytest.approx(after.loss["tasks"] - before.loss["tasks"], abs=1e-6) or (
        after.forgetting["source"] == 0 and after.loss["tasks"] < before.loss["tasks"]
    )
    assert after.right_to_wrong == ()
    assert not math.isnan(after.record()["general/plain"])


def test_nothing_to_score_and_double_ids_are_refused() -> None:
    chat, network = toys.chat(), toys.model()
    with pytest.raises(FeatclError, match="none was given"):
        Canaries(network, chat)
    with pytest.raises(FeatclError, match="item id 'a' twice"):
        Canaries(network, chat, [toys.item("a", "w1", "w2"), toys.item("a", "w3", "w2")])
    with pytest.raises(FeatclError, match="'facts' are empty"):
        Canaries(network, chat, suites={"facts": []})
