"""GPM and the null space of inputs: what was read before gives the same as before, exactly, and AdamW must not leak."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods.gpm import GPM, grown
from featcl.methods.method import Method
from featcl.methods.null_space import NullSpace, main_directions
from featcl.methods.projected import Projected
from featcl.methods.site_inputs import influential, inputs_of, recorded
from tests.methods.coins import batch_of, round_trip, same_tensors
from tests.methods.tiny_learner import Tiny

# kinds whose trained matrices read enough dimensions that some are left after a short text
WIDE = ("none", "write")
OLD, NEW = ("abcd",), ("vwxyz vw", "zzyyxxww")


class GradientOnly(GPM):
    """GPM as it is mostly written: the gradient is projected, the step is not."""

    def project_step_(self, before, view) -> None:
        return None


class InputsOfAOnly(GPM):
    """GPM on LoRA's A alone: B may change what A a gives."""

    def block_(self, view, *, left=None, right=None) -> None:
        super().block_(view, right={name: r for name, r in right.items() if name.endswith("lora_A")})


def change_of_old_logits(tiny: Tiny, method: Method) -> tuple[float, float]:
    """How far task 2 moved the logits on task 1's tokens, and on its own."""
    old, new = tiny.task(*OLD), tiny.task(*NEW)
    tiny.learn_(method, "a", old)
    before = tiny.logits(old), tiny.logits(new)
    tiny.learn_(method, "b", new)
    after = tiny.logits(old), tiny.logits(new)
    return tuple(float((x - y).abs().max()) for x, y in zip(before, after, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("make", [lambda: GPM(threshold=1.0), lambda: NullSpace(lost=1e-9)])
def test_with_all_inputs_blocked_the_old_logits_stay(kind: str, make) -> None:
    old, new = change_of_old_logits(Tiny(kind, weight_decay=0.1 if kind == "write" else 0.0), make())
    assert new > 0.05  # the new task was learned all the same
    assert old < 2e-5
    control, _ = change_of_old_logits(Tiny(kind), Method())
    assert control > 0.02


@pytest.mark.parametrize("broken", [GradientOnly, InputsOfAOnly])
def test_negative_control_the_usual_shortcuts_leak(broken: type[GPM]) -> None:
    old, _ = change_of_old_logits(Tiny("none"), broken(threshold=1.0))
    assert old > 5e-3


def test_weight_decay_would_leak_too() -> None:
    """Decay of A shrinks what it gives on old inputs; the projection of the step takes it back."""
    old, _ = change_of_old_logits(Tiny("none", weight_decay=1.0), GPM(threshold=1.0))
    assert old < 2e-5


@pytest.mark.parametrize("kind", ["read", "residual", "gated", "both"])
def test_matrices_that_read_features_are_projected_too(kind: str) -> None:
    tiny, method = Tiny(kind, k=8), GPM(threshold=0.7)
    old, new = tiny.task(*OLD), tiny.task(*NEW)
    tiny.learn_(method, "a", old)
    start = {name: p.detach().clone() for name, p in tiny.view.parameters.items()}
    assert 0.1 < method.room(tiny.view) < 0.95
    tiny.learn_(method, "b", new)
    moved = {name: p.detach() - start[name] for name, p in tiny.view.parameters.items()}
    # method.right has grown with task b; the basis of task a is its beginning
    first = GPM(threshold=0.7)
    other = Tiny(kind, k=8)
    other.learn_(first, "a", other.task(*OLD))
    for name, value in moved.items():
        assert float((value @ first.right[name]).norm()) < 1e-6 * max(1.0, float(value.norm()))
    assert max(float(value.norm()) for value in moved.values()) > 1e-3


def test_recorded_inputs_are_what_the_update_reads() -> None:
    """X z of every trained matrix, put together by hand, is the adapter's own output."""
    for kind, constraint in (("none", {}), ("write", {}), ("read", {}), ("write", {"rank": 2}), ("read", {"rank": 2})):
        tiny = Tiny(kind, constraint=constraint)
        tiny.shake_()
        (experience,) = tiny.task(*OLD)
        batch, site = experience.batches[0], tiny.adapter.sites[-1]
        outputs: list[Tensor] = []
        hook = site.module.register_forward_hook(
            lambda module, inputs, output: outputs.append(output - module.base_layer(inputs[0]))  # noqa: B023
        )
        with recorded(tiny.adapter, "test") as seen:
            tiny.logits([experience])
        hook.remove()
        _, b = site.moving_factors()
        which = "lora_B" if "lora_B" in site.trained else "lora_A"
        z = seen[f"{site.name}.{which}"]
        if which == "lora_A":
            left = b if f"{which}.basis" not in site.frozen else site.scale * b
            by_hand = z @ site.trained[which].detach().T @ left.T
        else:
            basis = site.frozen.get("lora_B.basis")
            by_hand = z @ site.trained[which].detach().T @ (torch.eye(len(b)) if basis is None else basis.T)
        assert batch.input_ids.shape == z.shape[:2]
        assert torch.allclose(by_hand, outputs[0], atol=1e-5), kind
        assert float(outputs[0].abs().max()) > 1e-3


def test_only_tokens_that_can_influence_a_target_count() -> None:
    batch = batch_of((0, 1, 1), (1, 0))  # the second sequence is padded by one
    assert influential(batch).tolist() == [[True, True, False], [True, False, False]]
    tiny = Tiny("none")
    experiences = tiny.task("abc", "abcdef")
    draw = torch.Generator()
    found, read = inputs_of(experiences, tiny.student, limit=100, generator=draw, method="test")
    assert {len(rows) for rows in found.values()} == {2 + 5}  # the last token predicts nothing
    assert read == 3 + 6
    some, _ = inputs_of(experiences, tiny.student, limit=5, generator=draw.manual_seed(0), method="test")
    rows, everything = next(iter(some.values())), next(iter(found.values()))
    assert len(rows) == 5
    assert all(bool((everything == row).all(1).any()) for row in rows)


# --- the bases


def test_a_basis_grows_by_as_few_directions_as_the_threshold_needs() -> None:
    rows = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))  # energies 16, 9, 4, 1 of 30
    for threshold, size in ((0.5, 1), (16 / 30, 1), (0.6, 2), (25 / 30, 2), (0.97, 4), (1.0, 4)):
        basis = grown(None, rows, threshold=threshold)
        assert basis.shape == (4, size)
        assert torch.allclose(basis.T @ basis, torch.eye(size), atol=1e-6)
    # the share that was reached is at least the threshold (with one direction fewer it would not be)
    assert float((rows @ grown(None, rows, threshold=0.6)).square().sum()) / 30 >= 0.6 > 16 / 30


def test_what_the_basis_holds_already_counts() -> None:
    known = torch.eye(3)[:, :1]
    rows = torch.tensor([[10.0, 1.0, 0.0], [10.0, 0.0, 0.5]])
    assert grown(known, rows, threshold=0.99).shape[1] == 1  # 200 of 201.25 lie in it
    two = grown(known, rows, threshold=0.997)
    assert two.shape[1] == 2
    assert torch.equal(two[:, 0].abs(), known[:, 0])
    assert grown(known, rows, threshold=1.0).shape[1] == 3


def test_the_null_space_holds_as_much_energy_as_may_be_lost() -> None:
    total = torch.diag(torch.tensor([16.0, 9.0, 4.0, 1.0], dtype=torch.float64))
    assert main_directions(total, lost=1 / 30 - 1e-9).shape[1] == 4
    assert main_directions(total, lost=1 / 30 + 1e-9).shape[1] == 3
    assert main_directions(total, lost=0.2).shape[1] == 2
    basis = main_directions(total, lost=0.2)
    assert torch.equal(basis.abs(), torch.eye(4)[:, :2])


def test_retained_texts_are_kept_before_anything_was_learned() -> None:
    tiny, method = Tiny("none"), NullSpace(lost=1e-9, retained=OLD)
    kept = tiny.task(*OLD)
    before = tiny.logits(kept)
    tiny.learn_(method, "a", tiny.task(*NEW))
    assert float((tiny.logits(kept) - before).abs().max()) < 2e-5
    control = Tiny("none")
    control.learn_(Method(), "a", control.task(*NEW))
    assert float((control.logits(kept) - before).abs().max()) > 0.02


# --- the rest


@pytest.mark.parametrize("make", [lambda: GPM(threshold=0.9), lambda: NullSpace(lost=0.1)])
def test_state_goes_through_a_checkpoint(make) -> None:
    found = []
    for resumed in (False, True):
        tiny, method = Tiny("none"), make()
        tiny.learn_(method, "a", tiny.task(*OLD))
        if resumed:
            method = round_trip(method, make)
        tiny.learn_(method, "b", tiny.task(*NEW))
        found.append((tiny.adapter.coordinates(), method.tensors(), method.state(), method.cost()))
    assert same_tensors(found[0][0], found[1][0])
    assert same_tensors(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]
    assert found[0][3].stored_bytes > 0 < found[0][3].forward_tokens


@pytest.mark.parametrize("kind", ["shift", "scale"])
def test_a_kind_without_matrices_is_refused(kind: str) -> None:
    tiny = Tiny(kind)
    with pytest.raises(FeatclError, match="trains no matrix"):
        GPM().end_task_("a", tiny.task(*OLD), tiny.view)


def test_a_full_memory_is_an_error_and_not_a_frozen_model() -> None:
    tiny = Tiny("read")  # 4 numbers are read, a text of 20 tokens spans them all
    with pytest.raises(FeatclError, match="nothing can be learned any more"):
        GPM(threshold=1.0).end_task_("a", tiny.task("abcdefghijklmnopqrst"), tiny.view)


def test_bad_arguments_and_changed_directions_are_refused() -> None:
    for make, what in ((lambda: GPM(threshold=1.5), "threshold"), (lambda: NullSpace(lost=0.0), "lost")):
        with pytest.raises(FeatclError, match=what):
            make()
    tiny, method = Tiny("write"), GPM()
    tiny.learn_(method, "a", tiny.task(*OLD))
    tiny.adapter.changes += 1
    with pytest.raises(FeatclError, match="directions were changed"):
        method.project_(tiny.view)
    assert isinstance(method, Projected)
