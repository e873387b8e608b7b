"""The data of the local tasks: a few dozen items of the pocket laboratory, the same on every machine.

lm-evaluation-harness loads this file by its path, for the YAML files beside it.
"""

from __future__ import annotations

import random
from typing import Any

from featcl.lab.corpus import texts as corpus_texts
from featcl.lab.items import Item
from featcl.lab.suites import load_suite

SKILLS = ("facts", "arithmetic", "copying", "reversal", "logic", "language")
PER_SKILL = 8
SEED = 4211  # its own, so that the items are not those of the suite that is a column of R
CHOICES = 4


def choices(**_: Any) -> dict[str, Any]:
    """Items with the right reply among four; the other three are replies to other questions of the same skill."""
    return _test([_choice(item) for item in _items()])


def replies(**_: Any) -> dict[str, Any]:
    """Items with the reply that is right."""
    return _test([{"question": item.messages[-1]["content"], "answer": item.answer} for item in _items()])


def texts(**_: Any) -> dict[str, Any]:
    """Conversations as plain text."""
    return _test([{"text": text} for text in corpus_texts(SEED, 24)])


def _items() -> list[Item]:
    """Single questions, without instructions in front of them."""
    found = []
    for skill in SKILLS:
        plain = [item for item in load_suite(skills=[skill], items=4 * PER_SKILL, seed=SEED) if len(item.messages) == 1]
        found += plain[:PER_SKILL]
    return found


def _choice(item: Item) -> dict[str, Any]:
    rng = random.Random(item.id)
    others = {other.answer for other in load_suite(skills=[item.task], items=4 * PER_SKILL, seed=SEED)} - {item.answer}
    options = [*rng.sample(sorted(others), CHOICES - 1), item.answer]
    rng.shuffle(options)
    return {
        "question": item.messages[-1]["content"],
        "choices": options,
        "right": options.index(item.answer),
    }


def _test(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    return {"test": Dataset.from_list(rows)}
