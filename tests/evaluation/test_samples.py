"""Sampled replies with the KL of each token, and what a row of R is called in the log."""

from __future__ import annotations

import math

import pytest
import torch

from featcl.adapters import constrain
from featcl.evaluation.matrix import ScoreMatrix
from featcl.evaluation.samples import COLUMNS, TEXT_PROMPT, sample_completions, sample_prompts
from featcl.evaluation.task_end import task_end_record
from featcl.streams import Trajectory
from tests.adapters.conftest import build_directions
from tests.evaluation import toys

TALK = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def adapted(scale: float) -> tuple[object, object]:
    adapter = constrain(toys.model(vocab=9 + len(toys.WORDS)), build_directions(4, layer=1), kind="write")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=seeded(1)))
    return adapter, toys.chat()


def test_the_kl_of_each_token_is_that_of_two_plain_forwards() -> None:
    adapter, chat = adapted(0.5)
    prompts = sample_prompts(chat, [Trajectory("t", messages=TALK)], 3)  # type: ignore[arg-type]
    assert prompts == [chat.prompt(TALK[:1])]  # type: ignore[attr-defined]
    prompts = [*prompts, [*prompts[0], 12, 13, 14]]
    samples = sample_completions(adapter, chat, prompts, generator=seeded(), max_new_tokens=9)  # type: ignore[arg-type]
    assert len(samples) == 2
    for prompt, sample in zip(prompts, samples, strict=True):
        assert len(sample.tokens) == len(sample.kl) <= 9
        ids = chat.tokenizer.convert_tokens_to_ids(list(sample.tokens))  # type: ignore[attr-defined]
        whole = torch.tensor([[*prompt, *ids]])
        with torch.no_grad():
            now = adapter.model(whole).logits[0].double().log_softmax(-1)  # type: ignore[attr-defined]
            with adapter.disabled():  # type: ignore[attr-defined]
                base = adapter.model(whole).logits[0].double().log_softmax(-1)  # type: ignore[attr-defined]
        expected = (now.exp() * (now - base)).sum(-1)[len(prompt) - 1 : -1]
        assert sample.kl == pytest.approx(expected.tolist(), abs=1e-5)
        assert sample.mean_kl == pytest.approx(sum(expected.tolist()) / len(expected), abs=1e-5)
        assert max(sample.kl) > 0.01
        assert dict(zip(COLUMNS, sample.row("a"), strict=True))["tokens"] == list(sample.tokens)


def test_the_base_model_has_no_kl_and_the_same_generator_says_the_same() -> None:
    adapter, chat = adapted(0.0)
    first, again, other = (
        sample_completions(adapter, chat, [chat.prompt(TALK[:1])], generator=seeded(s), max_new_tokens=12)  # type: ignore
        for s in (0, 0, 3)
    )
    assert set(first[0].kl) == {0.0}
    assert first == again
    assert first[0].tokens != other[0].tokens
    assert sample_completions(adapter, chat, [], generator=seeded()) == ()  # type: ignore[arg-type]


def test_prompts_end_where_the_last_reply_begins_and_texts_are_gone_on_with() -> None:
    chat = toys.chat()
    text = Trajectory("d", text=" ".join(["w5"] * 100))
    nothing = Trajectory("n", messages=({"role": "assistant", "content": "w3"},))  # type: ignore[arg-type]
    longer = Trajectory("l", messages=(*TALK, *TALK))  # type: ignore[arg-type]
    found = sample_prompts(chat, [nothing, text, longer, text], 2)
    assert [len(prompt) for prompt in found] == [TEXT_PROMPT, len(chat.prompt((*TALK, TALK[0])))]  # type: ignore


def test_a_row_of_R_has_the_names_of_the_canaries_and_higher_is_better() -> None:
    columns = ("home", "code", "general/facts")
    matrix = ScoreMatrix(columns, 2, "accuracy")
    for name, values in (("base", (0, 1, 1)), ("home", (1, 0, 1)), ("code", (0, 1, 0))):
        matrix = matrix.with_row(name, {c: {"i": float(v)} for c, v in zip(columns, values, strict=True)})
    record = task_end_record(matrix, general=columns[2:])
    assert record == {
        "R/home": 0.0, "R/code": 1.0, "R/general/facts": 0.0,
        "forgetting/home": 1.0, "forgetting/code": 0.0, "general/facts": 0.0,
    }  # fmt: skip
    nll = ScoreMatrix(("left", "background/quiet"), 1, "nll")
    nll = nll.with_row("base", {"left": {"i": 2.0}, "background/quiet": {"i": 1.0}})
    base = task_end_record(nll, general=("background/quiet",))
    assert "forgetting/left" not in base, "nothing comes before the base model"
    nll = nll.with_row("left", {"left": {"i": 3.0}, "background/quiet": {"i": 1.5}})
    worse = task_end_record(nll, general=("background/quiet",))
    assert worse["forgetting/left"] == 1.0
    assert worse["general/background/quiet"] == -1.5
    assert worse["R/left"] == 3.0
    assert all(math.isfinite(value) for value in worse.values())
