"""The regularisers on adapted language models: every kind, with the learner's loss, doing what they are for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from featcl.methods.ewc import EWC
from featcl.methods.l2 import L2ToStart
from featcl.methods.lwf import LwF
from featcl.methods.mas import MAS
from featcl.methods.method import Method
from featcl.methods.sensitivity import measure, rows_of
from featcl.methods.si import SI
from featcl.objectives.scoring import pack
from tests.methods.coins import round_trip, same_tensors
from tests.methods.tiny_learner import Tiny

OLD, NEW = ("abcdefgh abcdefgh",), ("aabbccdd eeffgghh",)
MAKE: dict[str, Callable[[float], Method]] = {
    "ewc": lambda s: EWC(strength=300.0 * s),
    "online": lambda s: EWC(strength=300.0 * s, variant="online"),
    "si": lambda s: SI(strength=10.0 * s),
    "mas": lambda s: MAS(strength=1.0 * s),
    "l2": lambda s: L2ToStart(strength=1.0 * s, start="task"),
    "lwf": lambda s: LwF(strength=20.0 * s),
    "features": lambda s: LwF(strength=30.0 * s, match="features"),
}


def old_and_new(name: str, strength: float) -> tuple[float, float]:
    """Loss on the old task after the new one, and on the new one; the old one is learned freely."""
    tiny, method = Tiny("none"), MAKE[name](1e-9)
    old, new = tiny.task(*OLD), tiny.task(*NEW)
    tiny.learn_(method, "a", old, steps=25)
    tiny.learn_(round_trip(method, lambda: MAKE[name](strength)), "b", new, steps=25)
    return tiny.loss(old), tiny.loss(new)


@pytest.mark.parametrize("name", list(MAKE))
def test_it_forgets_less_than_plain_training_and_still_learns(name: str) -> None:
    tiny = Tiny("none")
    for task, texts in (("a", OLD), ("b", NEW)):
        start = tiny.loss(tiny.task(*NEW))
        tiny.learn_(Method(), task, tiny.task(*texts), steps=25)
    plain = tiny.loss(tiny.task(*OLD))
    held, learned = old_and_new(name, 1.0)
    nothing, _ = old_and_new(name, 1e-9)
    assert held < plain - 0.05
    assert learned < start - 0.1
    assert nothing == pytest.approx(plain, abs=0.02)  # negative control: without strength it is plain training


@pytest.mark.parametrize("kind", ["write", "read", "both", "residual", "gated", "shift", "scale"])
@pytest.mark.parametrize("name", list(MAKE))
def test_every_kind_has_coordinates_to_hold(name: str, kind: str) -> None:
    moved = {}
    for strength in (1e-9, 300.0):
        tiny, method = Tiny(kind, lr=1e-2), MAKE[name](strength)
        old, new = tiny.task(*OLD), tiny.task(*NEW)
        tiny.learn_(method, "a", old, steps=3)
        before = tiny.logits(old)
        method.begin_task_("b", tiny.view)
        for _ in range(15):
            tiny.step_(method, new[0])
        moved[strength] = float((tiny.logits(old) - before).norm())
    assert moved[300.0] < 0.8 * moved[1e-9]


@pytest.mark.parametrize("name", list(MAKE))
def test_a_resumed_learner_repeats_itself(name: str) -> None:
    found = []
    for resumed in (False, True):
        tiny, method = Tiny("none"), MAKE[name](1.0)
        tiny.learn_(method, "a", tiny.task(*OLD), steps=3)
        method.begin_task_("b", tiny.view)
        tiny.restart_()
        for number in range(4):
            if resumed and number == 2:
                method = round_trip(method, lambda: MAKE[name](1.0))
            tiny.step_(method, tiny.task(*NEW)[0])
        method.end_task_("b", tiny.task(*NEW), tiny.view)
        found.append((tiny.adapter.coordinates(), method.tensors(), method.state()))
    assert same_tensors(found[0][0], found[1][0])
    assert same_tensors(found[0][1], found[1][1])
    if name not in ("lwf", "features"):  # a batch that was tokenised anew is read by the old model again
        assert found[0][2] == found[1][2]


def test_the_fisher_of_a_language_model_is_that_of_torchs_own_gradients() -> None:
    """Against a loop with `backward` over single sequences, and not changed by how sequences are batched."""
    tiny = Tiny("both")
    tiny.shake_()
    (one,), (two,) = (tiny.task(text) for text in ("abc de", "xy"))
    method = EWC(labels="data")
    method.end_task_("a", [one, two], tiny.view)
    sums = {name: torch.zeros_like(p) for name, p in tiny.view.parameters.items()}
    for each in (one, two):
        ids = each.batches[0].input_ids
        logits = tiny.adapter.model(input_ids=ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        for name, parameter in tiny.view.parameters.items():
            sums[name] += parameter.grad.square()
            parameter.grad = None
    for name, total in sums.items():
        assert torch.allclose(method.wells[0].importance[name], total / (5 + 1), rtol=1e-3, atol=1e-8)
    together = type(one)(one.trajectory, pack([_encoded(one), _encoded(two)]), one.generator)
    assert len(together.batches) == 1
    assert [row.input_ids.shape[1] for row in rows_of(together.batches[0])] == [
        5,
        1,
    ]  # cut after the last target's place
    again = EWC(labels="data")
    again.end_task_("a", [together], tiny.view)
    for name, value in method.wells[0].importance.items():
        assert torch.allclose(again.wells[0].importance[name], value, rtol=1e-3, atol=1e-8)


def _encoded(experience):
    from featcl.streams.chat import Encoded

    ids = experience.batches[0].input_ids[0].tolist()
    return Encoded(ids, [False] + [True] * (len(ids) - 1))


def test_measuring_leaves_gradients_and_weights_alone() -> None:
    tiny = Tiny("both")
    tiny.shake_()
    before = tiny.adapter.coordinates()
    for parameter in tiny.adapter.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    measure(tiny.task(*OLD), tiny.view, lambda hidden, row: hidden.sum(), of=torch.abs, method="test")
    assert same_tensors(before, tiny.adapter.coordinates())
    assert all(bool((parameter.grad == 7.0).all()) for parameter in tiny.adapter.parameters())
