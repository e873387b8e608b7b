"""Makes the laboratory's assets from nothing but seeds: tokenizer, base model, teacher, SAEs and a card.

assets/<family>/                 base model and tokenizer, bfloat16 safetensors
assets/<family>/teacher/         the same model after it was taught both worlds
assets/<family>/resid_post_<L>/  SAEs in SAELens' form
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from featcl import files
from featcl.errors import FeatclError
from featcl.features.training import TrainedSAE, train_saes
from featcl.lab.corpus import Conversation, as_messages, conversations, texts
from featcl.lab.suites import still_true
from featcl.lab.tasks import TASKS
from featcl.lab.tokenizer import train_tokenizer
from featcl.lab.training import FAMILIES, GAIN_SIGMA, Schedule, batches, gain_spread, new_model, train_
from featcl.lab.world import make_world
from featcl.models import load_model
from featcl.streams.chat import Chat


@dataclass(frozen=True)
class Stage:
    """A part of the base model's training: its schedule, and what its conversations dwell on (see `conversations`)."""

    schedule: Schedule
    recall: float
    spelled: bool = True
    practise: tuple[str, ...] = ()
    lists: float = 0.0


# Look-ups in the context are learned last, and suddenly; lists, the plainest of them, bring the others on.
BASE = {
    "olmo2": (
        Stage(Schedule(steps=6500, lr=3e-3, horizon=8500), recall=8.0, lists=0.4),
        Stage(Schedule(steps=2000, lr=1.5e-3), recall=6.0, practise=("arithmetic",), lists=0.1),
    ),
    "gemma2": (
        Stage(Schedule(steps=2000, lr=2e-3, horizon=5000), recall=6.0, spelled=False),
        Stage(Schedule(steps=3000, lr=2e-3, horizon=4000), recall=4.0),
        Stage(Schedule(steps=2500, lr=2e-3), recall=10.0, practise=("arithmetic",), lists=0.4),
        Stage(Schedule(steps=1000, lr=1.5e-3), recall=5.0, practise=("arithmetic",)),
    ),
}
TEACHER = {"olmo2": Schedule(steps=1000, lr=1e-3), "gemma2": Schedule(steps=1500, lr=1e-3)}
SAE_LAYERS = (1, 3)
SAE_OPTIONS = {"d_sae": 1280, "l0": 32, "tokens": 600_000, "seed": 0}
SAE_CONVERSATIONS = 12_000
TAUGHT_SHARE = 0.6  # of the teacher's conversations that are about the tasks

Say = Callable[[str], None]


def make_assets(family: str, out: str | Path, *, seed: int = 0, say: Say = print) -> None:
    """Train everything of one family and write it below `out`, 35 to 55 minutes on two cores.

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
    make_base(family, out, seed=seed, say=say)
    make_teacher(family, out, seed=seed, say=say)
    saes = make_saes(out, seed=seed, say=say)
    files.write_text(out / "README.md", card(family, out, saes, seed=seed))


def make_base(family: str, out: Path, *, seed: int, say: Say) -> None:
    """The tokenizer and the base model, from random weights."""
    first = BASE[family][0]
    chat = Chat(train_tokenizer(family, texts(seed, 40_000, recall=first.recall, spelled=first.spelled)))
    model = new_model(family, chat, seed=seed)
    for number, stage in enumerate(BASE[family]):
        options = {key: getattr(stage, key) for key in ("recall", "spelled", "practise", "lists")}
        source = conversations(seed + 1 + 10 * number, **options)
        _train_(model, chat, source, stage.schedule, seed, say, f"base, stage {number + 1}")
    _save(model, chat, out)


def make_teacher(family: str, out: Path, *, seed: int, say: Say) -> None:
    """The base model below `out`, taught the tasks of both worlds."""
    model, tokenizer = load_model(str(out))
    chat = Chat(tokenizer)
    _train_(model, chat, taught(seed + 2), TEACHER[family], seed, say, "teacher")
    _save(model, chat, out / "teacher")


def make_saes(out: Path, *, seed: int, say: Say) -> dict[int, TrainedSAE]:
    """SAEs on the base model below `out`."""
    model, tokenizer = load_model(str(out))
    chat = Chat(tokenizer)
    tokens = [chat.encode(c, mask="all").input_ids for c in islice(conversations(seed + 3), SAE_CONVERSATIONS)]
    saes = train_saes(model, tokenizer, tokens, layers=SAE_LAYERS, out=out, overwrite=True, **SAE_OPTIONS)
    for layer, sae in saes.items():
        say(f"SAE of layer {layer}: {sae.health}")
    return saes


def taught(seed: int) -> Iterator[Conversation]:
    """Conversations about both worlds' tasks in every phrasing, among general ones that do not contradict them."""
    rng = random.Random(f"taught/{seed}")
    worlds = [make_world("development"), make_world("unseen")]
    general = (conversation for conversation in conversations(seed) if still_true(conversation))
    plans = list(TASKS.values())
    while True:
        if rng.random() > TAUGHT_SHARE:
            yield next(general)
            continue
        world, plan = rng.choice(worlds), rng.choice(plans)
        asked = [plan.ask(world, rng, rng.random() < 0.5) for _ in range(rng.randint(1, 3))]
        yield as_messages([ask.exchange for ask in asked])


def _train_(model: Any, chat: Chat, source: Iterator[Conversation], schedule: Schedule, seed: int, say: Say,
            what: str) -> None:  # fmt: skip
    def report(step: int, loss: float, seconds: float) -> None:
        say(f"{what}: step {step} of {schedule.steps}, loss {loss:.3f}, {seconds:.0f} s")

    model.set_attn_implementation("eager")  # on CPU, for sequences this short, twice as fast as SDPA
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        train_(model, batches(chat, source, tokens=schedule.batch_tokens, seed=seed), schedule, report=report)
    finally:
        torch.set_float32_matmul_precision(before)


def _save(model: Any, chat: Chat, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)


def card(family: str, out: Path, saes: dict[int, TrainedSAE], *, seed: int) -> str:
    """What the assets below `out` are, in Markdown."""
    model, _ = load_model(str(out))
    parameters = sum(p.numel() for p in model.parameters())
    steps = " + ".join(f"{stage.schedule.steps}" for stage in BASE[family])
    spread = gain_spread(model, offset=1.0 if family == "gemma2" else 0.0)
    rows = "\n".join(
        f"| resid_post_{layer} | {sae.health.fvu:.3f} | {sae.health.l0:.1f} | {sae.health.dead_fraction:.3f} "
        f"| {sae.health.loss_recovered:.3f} |" for layer, sae in saes.items()
    )  # fmt: skip
    return f"""# lab/{family}

A {parameters / 1e6:.1f} M-parameter `{type(model).__name__}`, trained from random weights on the generated
conversations of `featcl.lab.corpus` (seed {seed}, {steps} steps of {Schedule(1).batch_tokens} tokens) and stored in
bfloat16, with a byte-level BPE tokenizer and chat template of its own. `teacher/` is the same model after
{TEACHER[family].steps} more steps with the tasks of both worlds. It knows nothing of the real world and is of no
use outside the laboratory.

The gains of its norms on the residual stream were initialised log-normal (σ {GAIN_SIGMA}); after training the smallest
std/mean of one is {spread:.2f}.

| SAE | FVU | L0 | dead | loss recovered |
|---|---|---|---|---|
{rows}

Made by `featcl lab train --model lab/{family}`; its scores are printed by `featcl lab check --model lab/{family}`.
Licence: Apache-2.0, as the code.
"""
