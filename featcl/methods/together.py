"""Which methods make no sense together, and why: one table, read when a learner is made."""

from __future__ import annotations

from collections.abc import Sequence

from featcl.errors import FeatclError
from featcl.methods.method import Method, overrides

# Methods that set the adapter's factors where tasks begin.
FACTORS = ("olora", "inflora", "merging", "mica", "corda", "oplora", "routed", "progressive", "persona_and_task")

# Each row: every method of the first group with every other of the second, by name.
REFUSED: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        ("ewc", "si", "mas", "l2_to_start", "gpm", "null_space"),
        ("olora", "inflora", "merging", "routed", "progressive", "persona_and_task"),
        "{one} keeps what it measured in coordinates that {other} starts anew where a task begins",
    ),
    (
        FACTORS,
        FACTORS,
        "each of them sets the adapter's factors by a rule of its own",
    ),
    (
        ("gpm", "null_space", "oplora"),
        ("gpm", "null_space", "oplora", "sparse_memory"),
        "each of them projects the step, and the second projection leaves the subspace of the first",
    ),
    (
        ("sparse_memory",),
        ("mica", "inflora"),
        "sparse_memory would choose among numbers that {other} keeps frozen",
    ),
    (
        ("lwf",),
        ("merging", "routed"),
        "{other} goes back to the start before each task, so that the model lwf keeps would always be that one",
    ),
    (
        ("baking",),
        ("replay", "der", "latent_replay", "persona"),
        "baking learns from all that it collected at once, of which {other} would be offered the last one alone",
    ),
)


def check_together(methods: Sequence[Method]) -> None:
    """Raise FeatclError, in one line, for methods that make no sense together.

    Raises:
        FeatclError: For what is no method; one that is given twice; a pair of the table; methods of which some keep the
            weights still and others need them to learn.
    """
    for method in methods:
        if not isinstance(method, Method):
            raise FeatclError(f"methods: {method!r} is no method; give objects such as featcl.methods.ewc.EWC()")
    names = [method.name for method in methods]
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            if one == other:
                raise FeatclError(f"methods: {one} is given twice; one of each kind")
            if (reason := refusal(one, other)) is not None:
                raise FeatclError(f"methods: {one} and {other} make no sense together: {reason}")
    _check_frozen(methods)


def refusal(one: str, other: str) -> str | None:
    """Why two methods make no sense together; None where they do."""
    for first, second, reason in REFUSED:
        for left, right in ((one, other), (other, one)):
            if left in first and right in second:
                return reason.format(one=left, other=right)
    return None


def _check_frozen(methods: Sequence[Method]) -> None:
    """What is remembered outside the weights is so by all, or learned by all."""
    still = [method for method in methods if method.keeps_still]
    moving = [method for method in methods if not method.keeps_still]
    if still and moving:
        raise FeatclError(
            f"methods: {still[0].name} keeps the weights still, so that {moving[0].name} has nothing to do; give "
            f"{still[0].name} frozen: false if it can learn too, or leave one of them out"
        )
    for one in methods:  # baking collects, and notes stands still after its first tasks
        if one.name not in ("baking", "notes"):
            continue
        for other in methods:
            if other is not one and overrides(other, "postpones_"):
                raise FeatclError(
                    f"methods: {one.name} and {other.name} make no sense together: what {one.name} does not learn "
                    f"from would be unknown to {other.name}"
                )
