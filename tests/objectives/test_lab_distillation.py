"""Self-distillation in the laboratory: what the teacher was told is known afterwards without being told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from featcl.adapters import constrain
from featcl.evaluation.scoring import ItemScorer
from featcl.features import load_sae, select_features
from featcl.lab.streams import load_stream
from featcl.lab.suites import load_suite
from featcl.learning import Learner
from featcl.models import load_model

TOLD: dict[str, Any] = {"name": "self_distillation", "alpha": 0.5}
UNTOLD: dict[str, Any] = {"name": "distillation", "alpha": 0.5, "teacher": "base"}
BRAKE: dict[str, Any] = {"name": "recover", "weight": 1.0}  # on what the base writes itself


@dataclass(frozen=True)
class Outcome:
    """Share of right answers to unseen questions of the task, asked without context, and to the general suite."""

    before: float
    after: float
    general_before: float
    general_after: float


def run(objective: list[dict[str, Any]]) -> Outcome:
    """Facts about people of a household, one update for each of 96 conversations, along 32 features."""
    model, tokenizer = load_model("lab/olmo2")
    stream = load_stream("lab/home", tasks=("home_facts",))
    (task,) = stream.tasks
    assert task.kind == "latent"
    positive, negative = (
        [message["content"] for talk in side[:128] for message in talk] for side in (stream.positive, stream.negative)
    )
    sae = load_sae("lab/olmo2/resid_post_3")
    directions = select_features(sae, model, tokenizer, selector="contrast", positive=positive, negative=negative, k=32)
    learner = Learner(model, tokenizer, constrain(model, directions), objective=objective, lr=2e-3)
    scorers = [ItemScorer(learner.student.chat, items) for items in (task.items, load_suite(items=16))]

    def shares() -> list[float]:
        return [sum(scorer.score(model)) / len(scorer.items) for scorer in scorers]

    before, general = shares()
    for trajectory in task.trajectories:
        learner.observe(trajectory)
    after, kept = shares()
    return Outcome(before, after, general, kept)


@pytest.mark.slow
def test_a_latent_task_is_raised_with_the_context_removed() -> None:
    """Measured: 0.00 to 0.79 of the questions, the general suite from 0.995 to 0.964."""
    told, untold = run([TOLD, BRAKE]), run([UNTOLD, BRAKE])
    print(f"with context for the teacher: {told}; without: {untold}")
    assert told.before == untold.before <= 0.05
    assert told.after >= 0.5
    assert told.general_after >= told.general_before - 0.1
    assert untold.after <= 0.05, "the control: a teacher that knows no more teaches nothing"
    # its gradient is rounding, of which AdamW makes small steps: up to 1.6 points were seen, differing by machine
    assert untold.general_after >= untold.general_before - 0.05
