"""Every method of the library as a learner can have it on a tiny model, and a stream of two short tasks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featcl.adapters import constrain
from featcl.features import Directions
from featcl.learning import Learner
from featcl.learning.optimizers import moments
from featcl.methods.baking import Baking
from featcl.methods.cartridge import Cartridge
from featcl.methods.corda import CorDA
from featcl.methods.der import DarkReplay
from featcl.methods.ewc import EWC
from featcl.methods.generative import GenerativeReplay
from featcl.methods.gpm import GPM
from featcl.methods.in_context import InContext
from featcl.methods.inflora import InfLoRA
from featcl.methods.l2 import L2ToStart
from featcl.methods.latent import LatentReplay
from featcl.methods.lwf import LwF
from featcl.methods.mas import MAS
from featcl.methods.merging import Merging
from featcl.methods.method import Method
from featcl.methods.mica import MiCA
from featcl.methods.notes import Notes
from featcl.methods.null_space import NullSpace
from featcl.methods.olora import OLoRA
from featcl.methods.oplora import OPLoRA
from featcl.methods.persona import Persona
from featcl.methods.persona_and_task import PersonaAndTask
from featcl.methods.progressive import Progressive
from featcl.methods.rehearsal import Rehearsal
from featcl.methods.replay import Replay
from featcl.methods.retrieval import Retrieval
from featcl.methods.routed import Routed
from featcl.methods.si import SI
from featcl.methods.skill_file import SkillFile
from featcl.methods.sparse_memory import SparseMemory
from featcl.streams import Trajectory
from tests.conftest import tiny_model, tiny_tokenizer

GIVEN = tuple(Trajectory(f"given-{n}", text=f"line {n} of quiet text") for n in range(3))


@dataclass(frozen=True)
class Case:
    """How a method is made, and the kind of adapter that it is tried on."""

    make: Callable[[], Method]
    kind: str = "both"


LIBRARY = {
    "ewc": Case(lambda: EWC(strength=10.0)),
    "si": Case(lambda: SI(strength=10.0)),
    "mas": Case(lambda: MAS(strength=0.1)),
    "l2_to_start": Case(lambda: L2ToStart(strength=1.0)),
    "lwf": Case(lambda: LwF()),
    "gpm": Case(lambda: GPM(threshold=0.5)),
    "null_space": Case(lambda: NullSpace(lost=0.4)),
    "olora": Case(lambda: OLoRA(), "none"),
    "inflora": Case(lambda: InfLoRA(threshold=0.5), "none"),
    "oplora": Case(lambda: OPLoRA(preserved=2), "none"),
    "mica": Case(lambda: MiCA(), "none"),
    "corda": Case(lambda: CorDA(retained=[str(each.text) for each in GIVEN]), "none"),
    "merging": Case(lambda: Merging(method="average")),
    "replay": Case(lambda: Replay(budget=2)),
    "der": Case(lambda: DarkReplay(budget=2, top_k=4)),
    "latent_replay": Case(lambda: LatentReplay(budget=2)),
    "generative_replay": Case(lambda: GenerativeReplay(samples=2, max_new_tokens=4)),
    "rehearsal": Case(lambda: Rehearsal(material=GIVEN)),
    "persona": Case(lambda: Persona(answers=[ask(90)])),
    "progressive": Case(lambda: Progressive(), "write"),
    "persona_and_task": Case(lambda: PersonaAndTask(), "none"),
    "routed": Case(lambda: Routed()),
    "baking": Case(lambda: Baking(every=2)),
    "in_context": Case(lambda: InContext(frozen=False)),
    "retrieval": Case(lambda: Retrieval(by="embedding", k=1, frozen=False)),
    "skill_file": Case(lambda: SkillFile(frozen=False)),
    "notes": Case(lambda: Notes(by="embedding", k=2, max_new_tokens=4)),
    "cartridge": Case(lambda: Cartridge(tokens=4, samples=2, steps=2, max_new_tokens=4)),
    "sparse_memory": Case(lambda: SparseMemory(background=GIVEN, top=16)),
}


def ask(number: int) -> Trajectory:
    """A question with its answer, a note of it, and a judgement."""
    messages = (
        {"role": "user", "content": f"what is number {number}?"},
        {"role": "assistant", "content": f"it is {number * 7 % 10}"},
    )
    more: dict[str, Any] = {"reward": 1.0, "feedback": f"say {number}.", "meta": {"context": f"number {number}."}}
    return Trajectory(f"t{number}", task="ask", messages=messages, **more)


FIRST, SECOND = [ask(n) for n in range(3)], [ask(n) for n in range(10, 13)]


def learner_with(*methods: Method, kind: str = "both", **options: Any) -> Learner:
    """A fresh learner on a tiny model; the same arguments give the same weights."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    adapter = constrain(model, Directions.from_vectors(vectors, layer=2), kind=kind, layers=[2])
    return Learner(model, tokenizer, adapter, methods=methods, **{"lr": 1e-2, "max_kl_per_update": 0.05, **options})


def first_task(learner: Learner) -> Learner:
    """The whole first task, and the beginning of the second."""
    learner.begin_task("a", upcoming=FIRST)
    for trajectory in FIRST:
        learner.observe(trajectory)
    learner.end_task("a", FIRST)
    learner.begin_task("b", upcoming=SECOND)
    learner.observe(SECOND[0])
    return learner


def second_task(learner: Learner) -> Learner:
    """The rest of the second."""
    for trajectory in SECOND[1:]:
        learner.observe(trajectory)
    learner.end_task("b", SECOND)
    return learner


def everything(learner: Learner) -> dict[str, Any]:
    """Coordinates, moments, and all that methods remember."""
    return {
        "coordinates": learner.adapter.coordinates(),
        "moments": moments(learner.optimizer),
        "tensors": learner.methods.tensors(),
        "state": json.loads(json.dumps(learner.methods.state())),
        "version": learner.version,
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two of these are not bit-equal."""
    found = [key for key in ("state", "version") if one[key] != other[key]]
    for part in ("coordinates", "moments", "tensors"):
        mine, theirs = one[part], other[part]
        found += [f"{part}/{name}" for name in mine.keys() ^ theirs.keys()]
        found += [f"{part}/{name}" for name in mine.keys() & theirs.keys() if not alike(mine[name], theirs[name])]
    return sorted(found)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are bit-equal."""
    return one.shape == other.shape and torch.equal(one.cpu(), other.cpu())


def names(methods: Sequence[str]) -> Any:
    """For `pytest.mark.parametrize`."""
    return sorted(methods)
