"""Makes the laboratory's assets from nothing but seeds: tokenizer, base model, teacher, SAEs and a card.

assets/<family>/                 base model and tokenizer, bfloat16 safetensors
assets/<family>/teacher/         the same model after it was taught both worlds
assets/<family>/resid_post_<L>/  SAEs in SAELens' form
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from featcl import files
from featcl.errors import FeatclError
from featcl.features.training import TrainedSAE, train_saes
from featcl.lab.corpus import IGNORANCE, Conversation, as_messages, conversations, texts
from featcl.lab.skills import Exchange
from featcl.lab.suites import superseded
from featcl.lab.tasks import TASKS
from featcl.lab.tokenizer import train_tokenizer
from featcl.lab.training import FAMILIES, GAIN_SIGMA, Schedule, batches, gain_spread, new_model, train_
from featcl.lab.world import make_world
from featcl.models import load_model
from featcl.streams.chat import Chat

BASE = {"olmo2": Schedule(steps=5000), "gemma2": Schedule(steps=5000)}
TEACHER = Schedule(steps=1200, lr=1e-3)
SAE_LAYERS = (1, 3)
SAE_OPTIONS = {"d_sae": 1280, "l0": 32, "tokens": 1_000_000, "seed": 0}
SAE_CONVERSATIONS = 12_000
TAUGHT_SHARE = 0.6  # of the teacher's conversations that are about the tasks

Say = Callable[[str], None]


def make_assets(family: str, out: str | Path, *, seed: int = 0, say: Say = print) -> None:
    """Train everything of one family and write it below `out`.

    Takes about 25 minutes on two cores. Scores are those of the models as reloaded from bfloat16.

    Args:
        family: `olmo2` or `gemma2`.
        out: The family's folder; replaced file by file.
        seed: Of weights, data and order.
        say: Where progress goes, a line at a time.

    Raises:
        FeatclError: If the family is unknown.
    """
    if family not in FAMILIES:
        raise FeatclError(f"lab model family {family!r} does not exist; there is {', '.join(FAMILIES)}")
    out = Path(out)
    offset = 1.0 if family == "gemma2" else 0.0
    chat = Chat(train_tokenizer(family, texts(seed, 40_000)))
    model = new_model(family, chat, seed=seed)
    _train_(model, chat, conversations(seed + 1), BASE[family], seed, say, "base")
    _save(model, chat, out)
    spread = gain_spread(model, offset=offset)

    teacher, _ = load_model(str(out))
    _train_(teacher, chat, taught(seed + 2), TEACHER, seed, say, "teacher")
    _save(teacher, chat, out / "teacher")

    base, tokenizer = load_model(str(out))
    tokens = [chat.encode(c, mask="all").input_ids for c in islice(conversations(seed + 3), SAE_CONVERSATIONS)]
    saes = train_saes(base, tokenizer, tokens, layers=SAE_LAYERS, out=out, overwrite=True, **SAE_OPTIONS)
    for layer, sae in saes.items():
        say(f"SAE of layer {layer}: {sae.health}")
    files.write_text(out / "README.md", _card(family, base, spread, saes, seed))


def taught(seed: int) -> Iterator[Conversation]:
    """Conversations about both worlds' tasks in every phrasing, among general ones that do not contradict them."""
    rng = random.Random(f"taught/{seed}")
    worlds = [make_world("development"), make_world("unseen")]
    general = (conversation for conversation in conversations(seed) if _still_true(conversation))
    plans = list(TASKS.values())
    while True:
        if rng.random() > TAUGHT_SHARE:
            yield next(general)
            continue
        world, plan = rng.choice(worlds), rng.choice(plans)
        asked = [plan.ask(world, rng, rng.random() < 0.5) for _ in range(rng.randint(1, 3))]
        yield as_messages([ask.exchange for ask in asked])


def _still_true(conversation: Conversation) -> bool:
    system = next((message["content"] for message in conversation if message["role"] == "system"), None)
    said = [message["content"] or "" for message in conversation if message["role"] in ("user", "assistant")]
    exchanges = [Exchange(user, assistant, system) for user, assistant in pairwise(said)]
    return not any(exchange.assistant == IGNORANCE or superseded(exchange) for exchange in exchanges)


def _train_(model: Any, chat: Chat, source: Iterator[Conversation], schedule: Schedule, seed: int, say: Say,
            what: str) -> None:  # fmt: skip
    def report(step: int, loss: float, seconds: float) -> None:
        say(f"{what}: step {step} of {schedule.steps}, loss {loss:.3f}, {seconds:.0f} s")

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        train_(model, batches(chat, source, tokens=schedule.batch_tokens, seed=seed), schedule, report=report)
    finally:
        torch.set_float32_matmul_precision(before)


def _save(model: Any, chat: Chat, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def _card(family: str, model: Any, spread: float, saes: dict[int, TrainedSAE], seed: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    rows = "\n".join(
        f"| resid_post_{layer} | {sae.health.fvu:.3f} | {sae.health.l0:.1f} | {sae.health.dead_fraction:.3f} "
        f"| {sae.health.loss_recovered:.3f} |" for layer, sae in saes.items()
    )  # fmt: skip
    schedule = BASE[family]
    return f"""# lab/{family}

A {parameters / 1e6:.1f} M-parameter `{type(model).__name__}`, trained from random weights on the generated conversations of
`featcl.lab.corpus` (seed {seed}, {schedule.steps} steps of {schedule.batch_tokens} tokens) and stored in bfloat16, with
a byte-level BPE tokenizer and chat template of its own. `teacher/` is the same model after {TEACHER.steps} more steps
with the tasks of both worlds. It knows nothing of the real world and is of no use outside the laboratory.

The gains of its norms on the residual stream were initialised log-normal (σ {GAIN_SIGMA}); after training the smallest
std/mean of one is {spread:.2f}.

| SAE | FVU | L0 | dead | loss recovered |
|---|---|---|---|---|
{rows}

Made by `featcl lab train --model lab/{family}`; its scores are printed by `featcl lab check --model lab/{family}`.
Licence: Apache-2.0, as the code.
"""
