"""`featcl lab check`: does the laboratory discriminate? Every claim of its design, measured, with its bound.

If the base cannot do the general suite, or can do the tasks, or if joint training cannot learn them, or if plain LoRA
does not forget, then no study run in the laboratory means anything.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from featcl.adapters import ConstrainedAdapter, constrain
from featcl.errors import FeatclError
from featcl.evaluation import ItemScorer
from featcl.features import Directions, check_sae, load_sae
from featcl.lab.corpus import conversations
from featcl.lab.items import Item
from featcl.lab.streams import LabStream, load_stream
from featcl.lab.suites import load_suite
from featcl.lab.tasks import LabTask
from featcl.lab.training import Schedule, batches, train_
from featcl.learning import Learner
from featcl.models import LAB_ASSETS, load_model
from featcl.streams import Trajectory
from featcl.streams.chat import Chat

WORLDS = ("development", "unseen")
TAUGHT = ("lab/applications", "lab/labels")  # the streams whose tasks must be learnable
RANK = 32
LR, STEPS = 1e-3, 2  # of every run: gradient steps on each trajectory
# Joint training, tuned for each model on the development world: OLMo-2 observes one trajectory at a time, at a learning
# rate for each pass; Gemma-2 gets small batches (passes, peak rate, tokens a batch): with single trajectories, and with
# batches of 1024 tokens, it memorises a skill's examples instead of its rule.
JOINT_ONE_BY_ONE = {"lab/olmo2": (1e-3, 1e-3, 5e-4)}
JOINT_IN_BATCHES = {"lab/gemma2": (8, 2e-3, 256)}
RELATED_UPDATES = 96  # on both related tasks together, and on each alone: the same number
RELATED_SEEDS = (0, 1, 2)
SAE_TEXT_SEED, SAE_TEXTS = 777, 1500
ASSET_LIMIT = 25_000_000

Say = Callable[[str], None]


@dataclass(frozen=True)
class Claim:
    """One thing that must hold.

    Attributes:
        what: In words, with the world where it concerns one.
        value: What was measured.
        bound: What it is compared with.
        above: Whether the value must be at least the bound, or at most.
        parts: The numbers behind the value, by task or skill.
    """

    what: str
    value: float
    bound: float
    above: bool
    parts: dict[str, float]

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.above else self.value <= self.bound


@dataclass(frozen=True)
class LabReport:
    """All claims about one model, with the digests of what they were measured on."""

    model: str
    claims: tuple[Claim, ...]
    digests: dict[str, str]
    seconds: float

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        claims = [asdict(claim) | {"holds": claim.holds} for claim in self.claims]
        return asdict(self) | {"claims": claims, "holds": self.holds}

    def print(self) -> None:
        """The claims as a table, to standard output."""
        for claim in self.claims:
            sign = "≥" if claim.above else "≤"
            print(f"{'ok' if claim.holds else 'NO':3}{claim.what:72}{claim.value:14.3f} {sign} {claim.bound:g}")
        print(f"{self.model}: {'all claims hold' if self.holds else 'NOT all claims hold'} ({self.seconds} s)")


def check_lab(name: str = "lab/olmo2", *, say: Say = print) -> LabReport:
    """Measure every claim about one lab model, in both worlds.

    Args:
        name: `lab/olmo2` or `lab/gemma2`.
        say: Where progress goes, a line at a time.

    Returns:
        The claims; `holds` if all do.
    """
    start = time.perf_counter()
    bench = _Bench(name, say)
    claims, digests = [], {}
    for claim in bench.general():
        claims.append(claim)
    for world in WORLDS:
        streams = {stream: load_stream(stream, world=world) for stream in (*TAUGHT, "lab/related")}
        digests |= {f"{stream}/{world}": made.digest for stream, made in streams.items()}
        for claim in bench.world(world, streams):
            claims.append(claim)
            say(f"{'ok ' if claim.holds else 'NO '} {claim.what}: {claim.value:.3f}")
    return LabReport(name, tuple(claims), digests, round(time.perf_counter() - start, 1))


class _Bench:
    """A lab model with its teacher, and the scoring of item lists."""

    def __init__(self, name: str, say: Say) -> None:
        if name not in {**JOINT_ONE_BY_ONE, **JOINT_IN_BATCHES}:
            raise FeatclError(f"lab check measures the lab's own models, lab/olmo2 and lab/gemma2, not {name!r}")
        self.name, self.say = name, say
        self.model, self.tokenizer = load_model(name)
        self.teacher, _ = load_model(f"{name}/teacher")
        self.chat = Chat(self.tokenizer)
        self.suite = load_suite()

    @cached_property
    def skills(self) -> dict[str, float]:
        """The base model's accuracy by skill of the general suite."""
        return self.accuracy(self.model, self.suite)

    # --- what does not depend on a world --------------------------------------------------------------------------

    def general(self) -> Iterator[Claim]:
        yield Claim("base on the general suite", _mean(self.skills), 0.90, True, self.skills)
        yield from self.saes()
        size = sum(file.stat().st_size for file in LAB_ASSETS.rglob("*") if file.is_file())
        yield Claim("bytes of all assets", float(size), ASSET_LIMIT, False, {})

    def saes(self) -> Iterator[Claim]:
        ids = [self.chat.encode(c, mask="all").input_ids for c in islice(conversations(SAE_TEXT_SEED), SAE_TEXTS)]
        for folder in sorted((LAB_ASSETS / self.name.removeprefix("lab/")).glob("resid_post_*")):
            health = check_sae(load_sae(folder), self.model, self.tokenizer, ids, strict=False)
            where = f"SAE {folder.name}"
            yield Claim(f"{where}: fraction of variance unexplained", health.fvu, 0.15, False, {})
            yield Claim(f"{where}: active features per token", health.l0, self.model.config.hidden_size / 4, False, {})
            yield Claim(f"{where}: dead features", health.dead_fraction, 0.10, False, {})
            yield Claim(f"{where}: loss recovered", health.loss_recovered, 0.90, True, {})

    # --- one world ------------------------------------------------------------------------------------------------

    def world(self, world: str, streams: dict[str, LabStream]) -> Iterator[Claim]:
        tasks = [task for name in TAUGHT for task in streams[name].tasks]
        items = [item for task in tasks for item in task.items]
        base = self.accuracy(self.model, items)
        yield Claim(f"{world}: base on the tasks, worst", max(base.values()), 0.15, False, base)
        told = self.accuracy(self.model, [self._told(item) for item in items])
        latent = {task.name: told[task.name] for task in tasks if task.kind == "latent"}
        yield Claim(f"{world}: base on latent tasks when told, worst", min(latent.values()), 0.90, True, latent)
        knowledge = {task.name: told[task.name] for task in tasks if task.kind == "knowledge"}
        yield Claim(
            f"{world}: base on knowledge tasks when told, best", max(knowledge.values()), 0.90, False, knowledge
        )
        teacher = self.accuracy(self.teacher, items)
        yield Claim(f"{world}: teacher on the tasks, worst", min(teacher.values()), 0.90, True, teacher)
        for name in TAUGHT:
            joint = self.joint(streams[name].tasks)
            yield Claim(f"{world}: joint training on {name}, worst task", min(joint.values()), 0.90, True, joint)
        yield from self.sequential(world, streams["lab/applications"])
        yield self.related(world, streams["lab/related"].tasks)

    def joint(self, tasks: Sequence[LabTask]) -> dict[str, float]:
        """All tasks at once, shuffled, with plain LoRA: accuracy by task."""
        trajectories = [trajectory for task in tasks for trajectory in task.trajectories]
        with _Adapted(self) as learner:
            if self.name in JOINT_IN_BATCHES:
                self._learn_in_batches(learner, trajectories, *JOINT_IN_BATCHES[self.name])
            for number, lr in enumerate(JOINT_ONE_BY_ONE.get(self.name, ())):
                learner.reconfigure(lr=lr)
                self._learn(learner, random.Random(number).sample(trajectories, len(trajectories)))
            return self.accuracy(learner.adapter.model, [item for task in tasks for item in task.items])

    def sequential(self, world: str, stream: LabStream) -> Iterator[Claim]:
        """Task after task with plain LoRA: what is learned, and what is then lost."""
        learned: dict[str, float] = {}
        with _Adapted(self) as learner:
            for task in stream.tasks:
                self._learn(learner, task.trajectories)
                learned |= self.accuracy(learner.adapter.model, task.items)
            final = self.accuracy(learner.adapter.model, [item for task in stream.tasks for item in task.items])
            suite = self.accuracy(learner.adapter.model, self.suite)
        lost = {task: learned[task] - final[task] for task in list(learned)[:-1]}
        general = {skill: before - suite[skill] for skill, before in self.skills.items()}
        yield Claim(f"{world}: sequential plain LoRA acquires, mean", _mean(learned), 0.85, True, learned)
        parts = {"earlier tasks": _mean(lost), "general suite": _mean(general)} | lost | general
        yield Claim(
            f"{world}: and then forgets (earlier tasks or suite)", max(_mean(lost), _mean(general)), 0.30, True, parts
        )

    def related(self, world: str, tasks: Sequence[LabTask]) -> Claim:
        """Joint training on both related tasks minus training on each alone, by task and seed."""
        gains = {}
        for seed in RELATED_SEEDS:
            both = self._few([t for task in tasks for t in task.trajectories], tasks, seed)
            for task in tasks:
                alone = self._few(task.trajectories, [task], seed)
                gains[f"{task.name}/seed {seed}"] = both[task.name] - alone[task.name]
        low = float(np.mean(list(gains.values())) - 1.96 * np.std(list(gains.values()), ddof=1) / len(gains) ** 0.5)
        return Claim(f"{world}: joint training on related tasks gains, lower bound of 95 %", low, 0.01, True, gains)

    def _few(self, trajectories: Sequence[Trajectory], tasks: Sequence[LabTask], seed: int) -> dict[str, float]:
        rng = random.Random(seed)
        with _Adapted(self, seed=seed) as learner:
            for _ in range(RELATED_UPDATES // len(trajectories)):
                self._learn(learner, rng.sample(trajectories, len(trajectories)))
            return self.accuracy(learner.adapter.model, [item for task in tasks for item in task.items])

    # --- parts ----------------------------------------------------------------------------------------------------

    def accuracy(self, model: Any, items: Sequence[Item]) -> dict[str, float]:
        """Share of right replies by task or skill."""
        right = ItemScorer(self.chat, items).score(model)
        tasks = dict.fromkeys(item.task for item in items)
        return {t: _mean([r for r, item in zip(right, items, strict=True) if item.task == t]) for t in tasks}

    def _told(self, item: Item) -> Item:
        if item.context is None:
            raise FeatclError(f"item {item.id} has no privileged context")
        messages = tuple(dict(message) for message in self.chat.with_context(item.messages, item.context))
        return replace(item, messages=messages)

    def _learn(self, learner: Learner, trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            learner.observe(trajectory)

    def _learn_in_batches(
        self, learner: Learner, trajectories: Sequence[Trajectory], passes: int, lr: float, tokens: int
    ) -> None:
        rng = random.Random(0)
        shuffled = [t for _ in range(passes) for t in rng.sample(trajectories, len(trajectories))]
        said = ([dict(message) for message in trajectory.messages] for trajectory in shuffled)
        data = list(batches(self.chat, said, tokens=tokens, seed=0, context_weight=0.0))
        schedule = Schedule(len(data), lr=lr, weight_decay=0.0)
        train_(learner.adapter.model, iter(data), schedule, parameters=learner.adapter.parameters())


class _Adapted:
    """A plain LoRA on every linear of the bench's model and a learner for it; taken off at the end."""

    def __init__(self, bench: _Bench, *, seed: int = 0) -> None:
        self.bench, self.seed = bench, seed

    def __enter__(self) -> Learner:
        bench = self.bench
        layers = range(bench.model.config.num_hidden_layers)
        self.adapter: ConstrainedAdapter = constrain(
            bench.model, _any_directions(bench.model), kind="none", rank=RANK, layers=list(layers), seed=self.seed
        )
        return Learner(bench.model, bench.tokenizer, self.adapter, objective="sft", lr=LR, steps=STEPS, seed=self.seed)

    def __exit__(self, *_: object) -> None:
        self.adapter.remove()


def _any_directions(model: Any) -> Directions:
    """Plain LoRA promises nothing about directions; these only say how many, and at which layer."""
    from featcl.subspace import Subspace

    width, last = model.config.hidden_size, model.config.num_hidden_layers - 1
    return Directions.from_vectors(Subspace.random(width, RANK, seed=0).basis.T, layer=last)


def _mean(values: dict[str, float] | Sequence[float]) -> float:
    return float(np.mean(list(values.values() if isinstance(values, dict) else values)))
