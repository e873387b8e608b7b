"""A model and trajectories that this project did not make."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featcl.adapters import constrain
from featcl.features import Directions
from featcl.learning import Learner
from featcl.models import load_model
from featcl.streams import Trajectory, read_trajectories

FILES = ("swe_agent.jsonl", "tau_bench_airline_trials_0_1.jsonl.gz", "reflexion_hotpotqa_early.jsonl.gz")


@pytest.mark.parametrize("objective", ["sft", {"name": "self_distillation", "max_turns": 2, "max_new_tokens": 8}])
def test_real_episodes_are_learned_from(real: Path, objective: object) -> None:
    model, tokenizer = load_model(real / "models/stories260K")
    vectors = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    adapter = constrain(model, Directions.from_vectors(vectors, layer=2))
    learner = Learner(model, tokenizer, adapter, objective=objective, max_windows=2)  # type: ignore[arg-type]
    for file in FILES:
        trajectory = next(read_trajectories(real / "trajectories" / file))
        first, second = learner.observe(trajectory), learner.observe(trajectory)
        assert first.tokens > 0
        assert first.source == trajectory.source
        assert 0 < first.kl < 1
        if objective == "sft":
            assert second.loss < first.loss
            assert first.tokens_left_out > 0, "two windows of 512 tokens do not hold it"
    assert learner.version == 6


def test_raw_text_lowers_its_own_loss(real: Path) -> None:
    model, tokenizer = load_model(real / "models/stories260K")
    vectors = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    adapter = constrain(model, Directions.from_vectors(vectors, layer=2))
    learner = Learner(model, tokenizer, adapter, lr=3e-3)
    text = "The Congress of the United States of America shall enact law by resolution."
    losses = [learner.observe(Trajectory("law", text=text)).loss for _ in range(5)]
    assert losses[0] == pytest.approx(5.0703, abs=2e-3), "the value of a separate numpy forward pass"
    assert losses == sorted(losses, reverse=True)
