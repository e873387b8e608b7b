"""Which methods are refused together or on a kind, each with its reason; and that what makes sense composes."""

from __future__ import annotations

import pytest
import torch

from featcl.errors import FeatclError
from featcl.methods.baking import Baking
from featcl.methods.build import METHODS
from featcl.methods.in_context import InContext
from featcl.methods.method import Method
from featcl.methods.notes import Notes
from featcl.methods.replay import Replay
from featcl.methods.retrieval import Retrieval
from featcl.methods.together import REFUSED, check_together, refusal
from tests.methods.library import FIRST, LIBRARY, learner_with


def made(*names: str) -> list[Method]:
    return [LIBRARY[name].make() for name in names]


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        ("ewc", "olora", "ewc keeps what it measured in coordinates that olora starts anew"),
        ("merging", "gpm", "gpm keeps what it measured in coordinates that merging starts anew"),
        ("mica", "corda", "sets the adapter's factors by a rule of its own"),
        ("gpm", "sparse_memory", "the second projection leaves the subspace of the first"),
        ("inflora", "sparse_memory", "numbers that inflora keeps frozen"),
        ("lwf", "merging", "always be that one"),
        ("baking", "replay", "replay would be offered the last one alone"),
    ],
)
def test_what_makes_no_sense_together_is_refused_in_either_order(one: str, other: str, reason: str) -> None:
    for names in ((one, other), (other, one)):
        with pytest.raises(FeatclError, match=reason) as refused:
            check_together(made(*names))
        assert "\n" not in str(refused.value)
    assert refusal(one, "replay" if one != "baking" else "ewc") is None  # negative control


def test_the_table_speaks_of_methods_that_there_are() -> None:
    named = {name for first, second, _ in REFUSED for name in (*first, *second)}
    assert named <= set(METHODS)


def test_one_is_given_once_and_the_weights_stand_still_for_all_or_none() -> None:
    with pytest.raises(FeatclError, match="replay is given twice"):
        check_together([Replay(budget=1), Replay(budget=2)])
    with pytest.raises(FeatclError, match="in_context keeps the weights still, so that ewc has nothing to do"):
        check_together([*made("ewc"), InContext()])
    with pytest.raises(FeatclError, match="notes and in_context make no sense together"):
        check_together([Notes(by="embedding"), InContext(frozen=False)])
    with pytest.raises(FeatclError, match="baking and in_context make no sense together"):
        check_together([InContext(frozen=False), Baking()])
    check_together([*made("ewc", "replay"), InContext(frozen=False)])
    check_together([InContext(), Retrieval(by="embedding")])


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("mica", "write", "on kind none; this is 'write'"),
        ("corda", "both", "on kind none; this is 'both'"),
        ("inflora", "read", "on kind none; this is 'read'"),
        ("olora", "read", "trains no lora_A"),
        ("olora", "residual", "is no LoRA"),
        ("merging", "residual", "is no LoRA"),
        ("oplora", "shift", "is no LoRA"),
        ("gpm", "shift", "trains no matrix"),
        ("null_space", "scale", "trains no matrix"),
    ],
)
def test_a_kind_that_a_method_cannot_have_is_refused_at_once(name: str, kind: str, reason: str) -> None:
    with pytest.raises(FeatclError, match=reason):
        learner_with(*made(name), kind=kind)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("ewc", "replay", "lwf"), "write"),
        (("si", "gpm", "der"), "both"),
        (("olora", "replay"), "none"),
        (("mica", "ewc", "gpm", "rehearsal"), "none"),
        (("baking", "mas"), "residual"),
        (("sparse_memory", "replay", "skill_file"), "both"),
        (("merging", "generative_replay"), "both"),
    ],
)
def test_what_makes_sense_composes(names: tuple[str, ...], kind: str) -> None:
    learner = learner_with(*made(*names), kind=kind)
    for task in ("a", "b"):
        learner.begin_task(task)
        for trajectory in FIRST:
            learner.observe(trajectory)
        learner.end_task(task, FIRST)
    assert set(learner.cost()) == set(names)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in learner.adapter.coordinates().values())


def test_si_sees_the_gradient_before_it_is_projected() -> None:
    alone, together = learner_with(*made("si")), learner_with(*made("gpm", "si"))
    paths = []
    for learner in (alone, together):
        learner.begin_task("a")
        learner.observe(FIRST[0])
        learner.end_task("a", FIRST)
        learner.begin_task("b")
        seen: list[dict[str, torch.Tensor]] = []
        for method in learner.methods:
            if method.name == "si":
                own = method.project_
                method.project_ = lambda view, own=own, seen=seen: (  # type: ignore[method-assign]
                    seen.append({name: p.grad.clone() for name, p in view.parameters.items() if p.grad is not None}),
                    own(view),
                )
        learner.observe(FIRST[1])
        paths.append(seen[0])
    assert all(torch.equal(paths[0][name], paths[1][name]) for name in paths[0])
