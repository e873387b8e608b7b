"""Sampling: log-probabilities equal teacher-forced ones, batched equals alone, greedy equals transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.streams.rollouts import choose, generate

PROMPTS = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5, 6], [200]]
Tiny = Callable[..., tuple[Any, Any]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_logprobs_equal_teacher_forced_ones(tiny: Tiny, family: str) -> None:
    model, _ = tiny(family)
    rollout = generate(model, PROMPTS, max_new_tokens=9, temperature=1.0, generator=generator())
    for prompt, reply, logprobs in zip(PROMPTS, rollout.token_ids, rollout.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(reply)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-5, rtol=1e-5)


def test_a_reply_does_not_depend_on_its_neighbours(tiny: Tiny, family: str) -> None:
    model, _ = tiny(family)
    together = generate(model, PROMPTS, max_new_tokens=7, temperature=0.0)
    alone = [generate(model, [p], max_new_tokens=7, temperature=0.0).token_ids[0] for p in PROMPTS]
    assert together.token_ids == alone


def test_greedy_equals_transformers(tiny: Tiny, family: str) -> None:
    model, _ = tiny(family)
    found = generate(model, [PROMPTS[1]], max_new_tokens=8, temperature=0.0)
    expected = model.generate(
        torch.tensor([PROMPTS[1]]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.token_ids[0] == expected[0, len(PROMPTS[1]) :].tolist()


def test_a_reply_ends_at_a_stop_token_and_keeps_it(tiny: Tiny) -> None:
    model, _ = tiny()
    free = generate(model, PROMPTS, max_new_tokens=12, temperature=1.0, generator=generator())
    stop = free.token_ids[0][3]
    held = generate(model, PROMPTS, max_new_tokens=12, temperature=1.0, stop_ids={stop}, generator=generator())
    assert held.token_ids[0] == free.token_ids[0][: free.token_ids[0].index(stop) + 1]
    assert all(stop not in reply[:-1] for reply in held.token_ids)
    assert [len(reply) for reply in held.token_ids] == [len(logprobs) for logprobs in held.logprobs]
    assert all(row == full[: len(row)] for row, full in zip(held.token_ids, free.token_ids, strict=True))


def test_draws_come_from_the_generator_alone(tiny: Tiny) -> None:
    model, _ = tiny()
    first = generate(model, PROMPTS, max_new_tokens=6, generator=generator(3))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert generate(model, PROMPTS, max_new_tokens=6, generator=generator(3)) == first
    assert torch.equal(torch.random.get_rng_state(), state)
    assert generate(model, PROMPTS, max_new_tokens=6, generator=generator(4)) != first


def test_inverse_cdf_draws_the_distribution() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5, -float("inf"), 3.0]])
    draws = (torch.arange(20_000) + 0.5) / 20_000
    counts = choose(logits.expand(20_000, 5), 0.7, draws).bincount(minlength=5) / 20_000
    torch.testing.assert_close(counts, (logits[0] / 0.7).softmax(-1), atol=1e-4, rtol=0)
    edges = choose(logits.expand(2, 5), 1.0, torch.tensor([0.0, 1.0 - 2**-24]))
    assert edges.tolist() == [0, 4]
    zero_first = torch.tensor([[-float("inf"), 0.0]])
    assert choose(zero_first, 1.0, torch.tensor([0.0])).item() == 1, "a token of probability 0 is never drawn"


def test_bad_requests(tiny: Tiny) -> None:
    model, _ = tiny()
    with pytest.raises(FeatclError, match="empty"):
        generate(model, [[1], []], max_new_tokens=1, temperature=0.0)
    with pytest.raises(FeatclError, match="needs a generator"):
        generate(model, [[1]], max_new_tokens=1)
