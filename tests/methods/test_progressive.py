"""Growth and a persona: what is frozen stays bit for bit, and what is learned adds to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.method import Method
from featcl.methods.persona_and_task import PersonaAndTask
from featcl.methods.progressive import Progressive
from tests.methods.coins import round_trip, same_tensors
from tests.methods.tiny_learner import Tiny

A, B, C = ("abcd abcd",), ("vwxyz vw",), ("0123 0123",)


def kept_deltas(tiny: Tiny) -> dict[str, Tensor]:
    """ΔW of the frozen part."""
    return {site.name: site.kept["lora_B"] @ site.kept["lora_A"] for site in tiny.adapter.sites}


def kept_coordinates(tiny: Tiny) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tiny.adapter.coordinates().items() if ".kept_" in name}


def close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(one[name], other[name], atol=atol) for name in one)


def clear_(tiny: Tiny) -> None:
    """Take out what the present task learned."""
    with torch.no_grad():
        for site in tiny.adapter.sites:
            site.trained["lora_B" if "lora_B" in site.trained else "lora_A"].zero_()


@pytest.mark.parametrize("kind", ["none", "both"])
def test_every_task_is_frozen_when_the_next_begins(kind: str) -> None:
    tiny, method = Tiny(kind), Progressive()
    sizes, ends = [method.cost().stored_bytes], []
    for name, texts in (("a", A), ("b", B), ("c", C)):
        tiny.learn_(method, name, tiny.task(*texts))
        sizes.append(method.cost().stored_bytes)
        ends.append(tiny.deltas())
        if len(ends) > 1:
            assert close(kept_deltas(tiny), ends[-2])
            assert not close(tiny.deltas(), ends[-2], atol=1e-3)
    assert sizes[:2] == [0, 0]  # while the first task is learned nothing is frozen
    assert sizes[2] > 0
    assert (sizes[3] > sizes[2]) is (kind == "none")  # then it grows, but not beyond the features' span
    assert sizes[3] == sum(tensor.nbytes for tensor in kept_coordinates(tiny).values())


def test_learning_leaves_the_frozen_part_alone_bit_for_bit() -> None:
    tiny, method = Tiny("none", weight_decay=0.1), Progressive()
    tiny.learn_(method, "a", tiny.task(*A))
    method.begin_task_("b", tiny.view)
    tiny.restart_()
    before, logits = kept_coordinates(tiny), tiny.logits(tiny.task(*A))
    for _ in range(5):
        tiny.step_(method, tiny.task(*B)[0])
    assert same_tensors(kept_coordinates(tiny), before)
    assert len(before) == 2 * len(tiny.adapter.sites)
    assert not torch.allclose(tiny.logits(tiny.task(*A)), logits, atol=1e-3)
    clear_(tiny)
    assert torch.allclose(tiny.logits(tiny.task(*A)), logits, atol=1e-4)  # what a learned can still be had alone


@pytest.mark.parametrize("kind", ["none", "write"])
def test_the_persona_is_there_again_when_the_task_is_taken_out(kind: str) -> None:
    found = {}
    for made in (PersonaAndTask, Method):
        tiny, method = Tiny(kind), made()
        tiny.learn_(method, "persona", tiny.task(*A))
        persona, logits = tiny.deltas(), tiny.logits(tiny.task(*A))
        for name, texts in (("b", B), ("c", C)):
            tiny.learn_(method, name, tiny.task(*texts))
        task = {site.name: site.moving_factors()[1] @ site.moving_factors()[0] for site in tiny.adapter.sites}
        together = {name: persona[name] + task[name] for name in persona}
        adds = close(tiny.deltas(), together)
        clear_(tiny)
        found[method.name] = adds, float((tiny.logits(tiny.task(*A)) - logits).abs().max())
    assert found["persona_and_task"][0]
    assert found["persona_and_task"][1] < 1e-4
    assert not found["none"][0]  # negative control: one adapter for all holds no persona
    assert found["none"][1] > 1e-2


def test_the_persona_is_frozen_once_and_counted() -> None:
    tiny, method = Tiny("none"), PersonaAndTask()
    tiny.learn_(method, "persona", tiny.task(*A), steps=2)
    tiny.learn_(method, "persona", tiny.task(*A), steps=2)  # it is still being learned
    assert method.cost().stored_bytes == 0
    tiny.learn_(method, "b", tiny.task(*B))
    held, own = kept_coordinates(tiny), tiny.deltas()
    assert method.cost().stored_bytes == sum(tensor.nbytes for tensor in held.values()) > 0
    method.begin_task_("c", tiny.view)
    assert same_tensors(kept_coordinates(tiny), held)  # the task's own part goes on, it is not frozen
    assert close(tiny.deltas(), own, atol=0.0)


def test_a_persona_from_a_folder_acts_from_the_first_task_on(tmp_path: Path) -> None:
    other = Tiny("none")
    other.learn_(Method(), "persona", other.task(*A))
    other.adapter.save(tmp_path)
    persona, logits = other.deltas(), other.logits(other.task(*A))
    tiny, method = Tiny("both"), PersonaAndTask(folder=tmp_path)
    method.refuse(tiny.view)
    assert not torch.allclose(tiny.logits(tiny.task(*A)), logits, atol=1e-3)
    method.begin_task_("b", tiny.view)
    assert torch.allclose(tiny.logits(tiny.task(*A)), logits, atol=1e-4)
    tiny.learn_(method, "b", tiny.task(*B))
    assert close(kept_deltas(tiny), persona)
    assert not close(tiny.deltas(), persona, atol=1e-3)
    assert method.cost().stored_bytes == sum(tensor.nbytes for tensor in kept_coordinates(tiny).values())
    with tiny.adapter.disabled():
        assert not torch.allclose(tiny.logits(tiny.task(*A)), logits, atol=1e-3)  # the switch is about both


def test_a_persona_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatclError, match="not a PEFT folder"):
        PersonaAndTask(folder=tmp_path)
    Tiny("none", constraint={"layers": [0, 1]}).adapter.save(tmp_path)
    narrow = Tiny("none", constraint={"layers": [1]})
    with pytest.raises(FeatclError, match=r"changes model\.layers\.0\.\S+, which the adapter does not adapt"):
        PersonaAndTask(folder=tmp_path).refuse(narrow.view)
    named = Tiny("none", constraint={"layers": [0, 1]})
    named.adapter.model.get_base_model().config.name_or_path = "somewhere/other"
    named.adapter.save(tmp_path)
    mine = Tiny("none", constraint={"layers": [0, 1]})
    mine.adapter.model.get_base_model().config.name_or_path = "elsewhere/mine"
    with pytest.raises(FeatclError, match="belongs to somewhere/other, this model is elsewhere/mine"):
        PersonaAndTask(folder=tmp_path).refuse(mine.view)


@pytest.mark.parametrize("made", [Progressive, PersonaAndTask])
def test_state_goes_through_a_checkpoint(made: type[Method]) -> None:
    found = []
    for resumed in (False, True):
        tiny, method = Tiny("none"), made()
        for name, texts in (("a", A), ("b", B)):
            tiny.learn_(method, name, tiny.task(*texts))
        if resumed:
            fresh = Tiny("none")  # the frozen part comes back with the coordinates
            fresh.adapter.load_coordinates_(tiny.adapter.coordinates())
            tiny, method = fresh, round_trip(method, made)
        tiny.learn_(method, "c", tiny.task(*C))
        found.append((tiny.adapter.coordinates(), method.state(), method.cost(), kept_coordinates(tiny)))
    if made is Progressive:  # otherwise the optimizer's moments go on, which are not the method's
        assert same_tensors(found[0][0], found[1][0])
    assert same_tensors(found[0][3], found[1][3])
    assert found[0][1:3] == found[1][1:3]


@pytest.mark.parametrize("method", [Progressive(), PersonaAndTask()])
def test_a_kind_that_is_no_lora_is_refused(method: Method) -> None:
    with pytest.raises(FeatclError, match="is no LoRA"):
        method.refuse(Tiny("residual").view)
    method.refuse(Tiny("write").view)
