"""From names and options to objectives."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from featcl.errors import FeatclError
from featcl.objectives.anchors import KlToBase, L2ToBase, Recover
from featcl.objectives.distillation import Distillation
from featcl.objectives.sft import Sft

OBJECTIVES: dict[str, type] = {
    "sft": Sft,
    "distillation": Distillation,
    "self_distillation": Distillation,
    "recover": Recover,
    "kl_to_base": KlToBase,
    "l2_to_base": L2ToBase,
}
LATER = ("policy", "preference", "predict")
Spec = str | Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Term:
    """One summand of the loss: weight times an objective's mean over tokens, or times a penalty.

    Attributes:
        name: As in a config.
        weight: Its factor.
        objective: An `Objective`, or a `Penalty`.
    """

    name: str
    weight: float
    objective: Any

    @property
    def on_tokens(self) -> bool:
        """Whether it is an `Objective`, which reads tokens, and not a `Penalty`."""
        return hasattr(self.objective, "read")


def normalise(spec: Spec) -> list[dict[str, Any]]:
    """`"sft"`, `{"name": "sft", "weight": 1.0, …options}` or a list of such, as a list of dictionaries."""
    items = [spec] if isinstance(spec, str | Mapping) else list(spec)
    if not items:
        raise FeatclError(f"no objective given; choose from {', '.join(OBJECTIVES)}")
    return [{"name": item} if isinstance(item, str) else dict(item) for item in items]


def build_terms(spec: Spec, *, has_teacher: bool = False, background: Sequence[str] = ()) -> list[Term]:
    """The objectives of a learner.

    Args:
        spec: As in `normalise`; options are the attributes of the objective's class.
        has_teacher: Whether the learner has a separate teacher model.
        background: Texts for `recover`.

    Raises:
        FeatclError: For an unknown name or option, or what an objective lacks.
    """
    return [_term(dict(item), has_teacher, tuple(background)) for item in normalise(spec)]


def _term(options: dict[str, Any], has_teacher: bool, background: tuple[str, ...]) -> Term:
    name, weight = options.pop("name", None), options.pop("weight", 1.0)
    if name in LATER:
        raise FeatclError(f"objective {name!r} is not available yet; choose from {', '.join(OBJECTIVES)}")
    if name not in OBJECTIVES:
        raise FeatclError(f"unknown objective {name!r}; {_near(str(name), list(OBJECTIVES))}")
    kind = OBJECTIVES[name]
    allowed = [f.name for f in fields(kind) if f.name not in ("metric", "context", "background")]
    for option in options:
        if option not in allowed:
            raise FeatclError(f"objective {name} has no option {option!r}; {_near(option, [*allowed, 'weight'])}")
    if name == "distillation" and not has_teacher:
        raise FeatclError("objective distillation needs a teacher model; self_distillation teaches itself")
    if name == "recover":
        options["background"] = background
    if name == "self_distillation":
        options["context"] = True
    try:
        if not math.isfinite(float(weight)):
            raise ValueError(f"weight must be finite, got {weight}")
        return Term(name, float(weight), kind(**options))
    except (TypeError, ValueError) as error:
        raise FeatclError(f"objective {name}: {error}") from error


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
