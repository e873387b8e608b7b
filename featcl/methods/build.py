"""From names and options to methods, and from names and files to what they are made with.

    methods = build_methods([{"name": "ewc", "strength": 10.0}, {"name": "rehearsal", "material": "kept.jsonl"}])

An option that is material (conversations or texts) is in a config the name of something that the stream brings with it,
such as `instructions`, or a file, or a list of these.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
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
from featcl.methods.rehearsal import Rehearsal, read_material
from featcl.methods.replay import Replay
from featcl.methods.retrieval import Retrieval
from featcl.methods.routed import Routed
from featcl.methods.si import SI
from featcl.methods.skill_file import SkillFile
from featcl.methods.sparse_memory import SparseMemory
from featcl.streams.texts import message_text
from featcl.streams.trajectory import Trajectory

METHODS: dict[str, type[Method]] = {
    "baking": Baking,
    "cartridge": Cartridge,
    "corda": CorDA,
    "der": DarkReplay,
    "ewc": EWC,
    "generative_replay": GenerativeReplay,
    "gpm": GPM,
    "in_context": InContext,
    "inflora": InfLoRA,
    "l2_to_start": L2ToStart,
    "latent_replay": LatentReplay,
    "lwf": LwF,
    "mas": MAS,
    "merging": Merging,
    "mica": MiCA,
    "notes": Notes,
    "null_space": NullSpace,
    "olora": OLoRA,
    "oplora": OPLoRA,
    "persona": Persona,
    "persona_and_task": PersonaAndTask,
    "progressive": Progressive,
    "rehearsal": Rehearsal,
    "replay": Replay,
    "retrieval": Retrieval,
    "routed": Routed,
    "si": SI,
    "skill_file": SkillFile,
    "sparse_memory": SparseMemory,
}
MATERIAL = ("material", "answers", "background")  # options that are trajectories
TEXTS = ("retained",)  # options that are plain texts

Spec = str | Mapping[str, Any]


@dataclass(frozen=True)
class Sources:
    """Where material comes from.

    Attributes:
        named: What the stream brings with it, by name.
        read: Reads a file: trajectories, or blocks of text.
        folder: Where files of methods lie whose path is relative.
    """

    named: Mapping[str, Sequence[Trajectory]] = field(default_factory=dict)
    read: Callable[[str], Sequence[Trajectory]] = read_material
    folder: Path = Path()

    def trajectories(self, wanted: Any, *, what: str) -> tuple[Trajectory, ...]:
        """The material of a name, a file, or a list of these.

        Raises:
            FeatclError: If there is no such name or file; `what` asks for it.
        """
        if isinstance(wanted, str):
            return tuple(self._one(wanted, what))
        if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(each, str) for each in wanted):
            raise FeatclError(f"{what} is {wanted!r}; {self.right()}")
        return tuple(trajectory for each in wanted for trajectory in self._one(each, what))

    def _one(self, wanted: str, what: str) -> Sequence[Trajectory]:
        if wanted in self.named:
            if not self.named[wanted]:
                raise FeatclError(f"{what}: this stream brings no {wanted} with it; name a file, or for texts give "
                                  "features.background")  # fmt: skip
            return self.named[wanted]
        if not Path(wanted).exists():
            near = difflib.get_close_matches(wanted, list(self.named), n=1)
            right = f"did you mean {near[0]!r}?" if near else self.right()
            raise FeatclError(f"{what}: there is no file {wanted!r}; {right}")
        return self.read(wanted)

    def right(self) -> str:
        """What can be given."""
        return f"give {', '.join([*self.named, 'a file'])}, or a list of these"


def build_methods(specs: Sequence[Spec], sources: Sources | None = None) -> tuple[Method, ...]:
    """Methods by name and options, in this order.

    Args:
        specs: `"ewc"` or `{"name": "ewc", …options}`; options are those of the class, with material by name or file.
        sources: What names and files mean; by default files alone.

    Raises:
        FeatclError: For an unknown name or option, with the nearest that there is; or whatever the class refuses.
    """
    return tuple(build_method(spec, sources) for spec in specs)


def build_method(spec: Spec, sources: Sources | None = None) -> Method:
    """One method; arguments as for `build_methods`."""
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", ""))
    if name not in METHODS:
        raise FeatclError(f"unknown method {name!r}; {_near(name, METHODS)}")
    known = parameters_of(name)
    for option in options:
        if option not in known:
            raise FeatclError(f"method {name} has no parameter {option!r}; {_near(option, known)}")
    sources = sources or Sources()
    for option, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and options.get(option) is None:
            raise FeatclError(f"{name}: {option} is missing; {sources.right()}")
        if option in options:
            options[option] = _resolved(name, option, options[option], sources)
    return METHODS[name](**options)


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a method by name."""
    kind = METHODS[name]
    return {} if kind.__init__ is object.__init__ else _own(inspect.signature(kind).parameters)


def _own(parameters: Mapping[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    return {name: found for name, found in parameters.items() if found.kind is inspect.Parameter.KEYWORD_ONLY}


def _resolved(method: str, option: str, value: Any, sources: Sources) -> Any:
    """An option as the class takes it."""
    if value is None:
        return value
    if option in MATERIAL:
        return sources.trajectories(value, what=f"{method}: {option}")
    if option in TEXTS:
        return tuple(plain_text(each) for each in sources.trajectories(value, what=f"{method}: {option}"))
    if option == "file":
        return sources.folder / str(value)
    return value


def plain_text(trajectory: Trajectory) -> str:
    """What a trajectory says, without who says it."""
    if trajectory.text is not None:
        return trajectory.text
    return "\n".join(said for message in trajectory.messages if (said := message_text(message)))


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known) or 'none'}"
