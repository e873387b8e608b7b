"""InfLoRA, OPLoRA, MiCA and CorDA: what each promises of ΔW, measured."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from featcl.errors import FeatclError
from featcl.methods.corda import CorDA, least_needed
from featcl.methods.inflora import InfLoRA, new_directions
from featcl.methods.method import Method
from featcl.methods.mica import MiCA
from featcl.methods.oplora import OPLoRA, alignment
from tests.conftest import tiny_model
from tests.methods.coins import round_trip, same_tensors
from tests.methods.tiny_learner import Tiny

OLD, NEW = ("abcd",), ("vwxyz vw", "zzyyxxww")


# --- InfLoRA


def test_the_second_task_does_not_touch_the_first() -> None:
    tiny, method = Tiny("none", weight_decay=0.1), InfLoRA(threshold=1.0)
    old, new = tiny.task(*OLD), tiny.task(*NEW)
    tiny.learn_(method, "a", old, upcoming=old)
    before, start = tiny.logits(old), tiny.loss(new)
    tiny.learn_(method, "b", new, steps=20, upcoming=new)
    assert tiny.loss(new) < start - 0.1
    assert float((tiny.logits(old) - before).abs().max()) < 1e-4
    control = Tiny("none")
    control.learn_(Method(), "a", control.task(*OLD))
    then = control.logits(old)
    control.learn_(Method(), "b", control.task(*NEW), steps=20)
    assert float((control.logits(old) - then).abs().max()) > 0.05


def test_only_lora_b_is_trained_and_lora_a_lies_in_the_new_inputs_outside_the_old() -> None:
    tiny, method = Tiny("none", weight_decay=0.5), InfLoRA(threshold=1.0)
    old, new = tiny.task(*OLD), tiny.task(*NEW)
    tiny.learn_(method, "a", old, upcoming=old)
    known = {name: basis.clone() for name, basis in method.known.items()}
    method.begin_task_("b", tiny.view, upcoming=new)
    designed = {name: p.detach().clone() for name, p in tiny.view.parameters.items()}
    tiny.restart_()
    for _ in range(5):
        tiny.step_(method, new[0])
    for name, parameter in tiny.view.parameters.items():
        if name.endswith(".lora_A"):
            assert torch.equal(parameter, designed[name])
            assert float((parameter.detach() @ known[name]).norm()) < 1e-5
            assert torch.allclose(parameter.detach() @ parameter.detach().T, torch.eye(4) / 3.0, atol=1e-5)
        else:
            assert not designed[name].any()
    assert any(bool(p.any()) for name, p in tiny.view.parameters.items() if name.endswith(".lora_B"))


def test_new_directions_by_hand() -> None:
    rows = torch.diag(torch.tensor([5.0, 3.0, 2.0, 0.0]))
    known = torch.eye(4)[:, :1]
    found = new_directions(rows, known, rank=2)
    assert torch.allclose(found.abs(), torch.eye(4)[1:3], atol=1e-6)
    assert not new_directions(rows, known, rank=4)[2:].any()  # where the directions run out
    assert not new_directions(rows[:1], known, rank=2).any()  # nothing new


def test_inflora_refuses_what_it_cannot_do() -> None:
    tiny = Tiny("none")
    with pytest.raises(FeatclError, match="must be known"):
        InfLoRA().begin_task_("a", tiny.view)
    with pytest.raises(FeatclError, match="kind none"):
        InfLoRA().begin_task_("a", Tiny("write").view, upcoming=tiny.task(*OLD))
    method, old = InfLoRA(threshold=1.0), tiny.task(*OLD)
    tiny.learn_(method, "a", old, steps=0, upcoming=old)
    method.known = {name: torch.eye(len(basis)) for name, basis in method.known.items()}
    with pytest.raises(FeatclError, match="no input here"):
        method.begin_task_("b", tiny.view, upcoming=tiny.task(*NEW))


def test_inflora_goes_through_a_checkpoint() -> None:
    found = []
    for resumed in (False, True):
        tiny, method = Tiny("none"), InfLoRA(threshold=0.8)
        old, new = tiny.task(*OLD), tiny.task(*NEW)
        tiny.learn_(method, "a", old, upcoming=old)
        method.begin_task_("b", tiny.view, upcoming=new)
        if resumed:
            method = round_trip(method, InfLoRA)
            method.threshold = 0.8
        tiny.restart_()
        for each in new:
            tiny.step_(method, each)
        method.end_task_("b", new, tiny.view)
        found.append((tiny.adapter.coordinates(), method.tensors(), method.cost(), method.state()))
    assert same_tensors(found[0][0], found[1][0])
    assert same_tensors(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]


# --- OPLoRA


@pytest.mark.parametrize(("kind", "preserved", "k"), [("none", 6, 4), ("write", 3, 8), ("both", 3, 8)])
def test_the_top_singular_triples_are_preserved(kind: str, preserved: int, k: int) -> None:
    tiny, method = Tiny(kind, k=k, weight_decay=0.1), OPLoRA(preserved=preserved)
    tiny.learn_(method, "a", tiny.task(*NEW), steps=10)
    assert tiny.adapter.delta_norm() > 0.05
    for site in tiny.adapter.sites:
        weight, delta = site.module.get_base_layer().weight.double(), tiny.deltas()[site.name].double()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, :preserved], s[:preserved], vt[:preserved].T
        assert float(((weight + delta) @ v - u * s).abs().max()) < 1e-5
        assert float((u.T @ (weight + delta) - s[:, None] * v.T).abs().max()) < 1e-5
        assert alignment(delta, weight, preserved=preserved) < 1e-5
    control = Tiny(kind, k=k)
    control.learn_(Method(), "a", control.task(*NEW), steps=10)
    site = control.adapter.sites[0]
    weight = site.module.get_base_layer().weight
    assert alignment(control.deltas()[site.name], weight, preserved=preserved) > 0.1


def test_a_span_without_room_and_hook_kinds_are_refused() -> None:
    with pytest.raises(FeatclError, match="nothing can be learned"):
        OPLoRA(preserved=4).begin_task_("a", Tiny("write", k=4).view)
    with pytest.raises(FeatclError, match="is no LoRA"):
        OPLoRA().begin_task_("a", Tiny("residual").view)
    with pytest.raises(FeatclError, match="not 500"):
        OPLoRA(preserved=500).begin_task_("a", Tiny("none").view)
    with pytest.raises(FeatclError, match="preserved"):
        OPLoRA(preserved=0)


def test_oplora_goes_through_a_checkpoint() -> None:
    found = []
    for resumed in (False, True):
        tiny, method = Tiny("none"), OPLoRA(preserved=4)
        tiny.learn_(method, "a", tiny.task(*OLD))
        method = round_trip(method, lambda: OPLoRA(preserved=4)) if resumed else method
        tiny.learn_(method, "b", tiny.task(*NEW))
        found.append((tiny.adapter.coordinates(), method.tensors()))
    assert same_tensors(found[0][0], found[1][0])
    assert same_tensors(found[0][1], found[1][1])


# --- MiCA


def test_mica_is_pefts_own_over_training() -> None:
    tiny, method = Tiny("none", weight_decay=0.1), MiCA()
    (text,) = tiny.task("abcd efgh")
    tiny.learn_(method, "a", [text], steps=5)
    base = tiny_model("olmo2", n_layers=2)  # the same weights
    names = [site.name for site in tiny.adapter.sites]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=names, init_lora_weights="mica", task_type="CAUSAL_LM")
    peft = get_peft_model(base, config)
    steps = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    ids = text.batches[0].input_ids
    for _ in range(5):
        steps.zero_grad()
        peft(input_ids=ids, labels=ids).loss.backward()
        steps.step()
    for name in names:
        theirs = peft.get_base_model().get_submodule(name).get_delta_weight("default")
        assert torch.allclose(tiny.deltas()[name], theirs.detach(), atol=2e-5)
    assert tiny.adapter.delta_norm() > 0.05


def test_mica_writes_only_along_the_smallest_singular_directions() -> None:
    found = {}
    for method in (MiCA(), Method()):
        tiny = Tiny("none", weight_decay=0.5)
        start = tiny.task(*OLD)
        base = tiny.logits(start)
        method.begin_task_("a", tiny.view)
        assert torch.equal(tiny.logits(start), base)
        tiny.learn_(method, "a", tiny.task(*NEW))
        site = tiny.adapter.sites[0]
        u = torch.linalg.svd(site.module.get_base_layer().weight).U[
            :, : min(site.module.get_base_layer().weight.shape) - 4
        ]
        delta = tiny.deltas()[site.name]
        found[method.name] = float((u.T @ delta).norm() / delta.norm())
    assert found["mica"] < 1e-5 < 0.5 < found["none"]


def test_mica_goes_through_a_checkpoint_and_refuses_other_kinds() -> None:
    tiny, method = Tiny("none"), MiCA()
    tiny.learn_(method, "a", tiny.task(*OLD))
    other, here = round_trip(method, MiCA), tiny.adapter.coordinates()
    other.begin_task_("b", tiny.view)  # not set anew
    assert same_tensors(here, tiny.adapter.coordinates())
    assert other.frozen == method.frozen != ()
    with pytest.raises(FeatclError, match="kind none"):
        MiCA().begin_task_("a", Tiny("write").view)
    with pytest.raises(FeatclError, match="too few"):
        MiCA().begin_task_("a", Tiny("none", k=17).view)  # k_proj and v_proj have 16 outputs


# --- CorDA


def test_corda_starts_at_the_base_and_trains_what_retained_inputs_need_least() -> None:
    tiny, method = Tiny("none"), CorDA(retained=("abcd efgh", "ijkl"))
    kept = tiny.task("abcd efgh", "ijkl")
    base = tiny.logits(kept)
    method.begin_task_("a", tiny.view)
    assert float((tiny.logits(kept) - base).abs().max()) < 1e-4
    assert tiny.adapter.delta_norm() < 1e-4
    with tiny.adapter.disabled():
        assert torch.equal(tiny.logits(kept), base)  # the base weights were not touched
    site = tiny.adapter.sites[0]
    assert float(site.trained["lora_B"].detach().norm()) > 1e-3
    tiny.learn_(method, "a", tiny.task(*NEW))
    assert tiny.adapter.delta_norm() > 1e-2


def test_its_factors_are_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT 0.21 imports `attr` here, which it does not ask for; all it needs of it is a dataclass
    monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.corda import collect_eigens_for_layer

    torch.manual_seed(0)
    weight, inputs = torch.randn(6, 8), torch.randn(50, 8)
    linear = torch.nn.Linear(8, 6, bias=False)
    linear.weight.data = weight.clone()
    linear.covariance_matrix = inputs.T @ inputs / len(inputs)
    eigens = collect_eigens_for_layer(linear, LoraConfig(r=3))
    a, b = least_needed(weight, inputs, rank=3)
    theirs = (eigens.U_WC[:, -3:] * eigens.S_WC[-3:]) @ eigens.V_WC[:, -3:].T
    assert torch.allclose(b @ a, theirs, atol=1e-4)
    full = (eigens.U_WC * eigens.S_WC) @ eigens.V_WC.T
    assert torch.allclose(full, weight, atol=1e-4)
    # what is trained matters less for the inputs than another three directions of the same decomposition
    other = (eigens.U_WC[:, :3] * eigens.S_WC[:3]) @ eigens.V_WC[:, :3].T
    assert float((b @ a @ inputs.T).norm()) < 0.5 * float((other @ inputs.T).norm())


def test_corda_goes_through_a_checkpoint_and_refuses_what_it_cannot_do() -> None:
    make = lambda: CorDA(retained=("abcd",))  # noqa: E731
    tiny, method = Tiny("none"), make()
    tiny.learn_(method, "a", tiny.task(*OLD))
    other, here = round_trip(method, make), tiny.adapter.coordinates()
    other.begin_task_("b", tiny.view)  # not set anew
    assert same_tensors(here, tiny.adapter.coordinates())
    assert other.cost() == method.cost()
    with pytest.raises(FeatclError, match="no retained texts"):
        CorDA()
    with pytest.raises(FeatclError, match="kind none"):
        make().begin_task_("a", Tiny("both").view)
