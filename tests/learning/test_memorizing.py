"""Training a memory: long texts in windows, the loss, what is trained, and that it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.learning.longread import full_hidden, read_texts, window_hidden
from featcl.learning.longtext import LongBatch, LongText, cut, pieces
from featcl.learning.memorizing import LongTexts, MemoryTraining, trained
from featcl.memory.attach import attach_memory
from featcl.memory.neural import NeuralMemory
from featcl.objectives.divergence import kl_divergence
from featcl.objectives.scoring import Scorer
from featcl.streams.chat import Encoded

Make = Callable[..., Any]


def text_of(*lengths: int, seed: int = 0, start: int | None = None) -> LongText:
    """Random tokens in windows of these lengths; about half are targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (sum(lengths),), generator=generator).tolist()
    targets = (torch.rand(sum(lengths), generator=generator) < 0.5).tolist()
    if start is not None:
        ids[0] = start
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return cut(Encoded(ids, [False, *targets[1:]]), ends, start=start)


@pytest.fixture
def made(tiny: Make) -> tuple[Any, Any, Scorer]:
    """A tiny model with a memory whose gate is a little open."""
    model, _ = tiny("olmo2", n_layers=2)
    attached = attach_memory(model, NeuralMemory(32, heads=2, chunk_size=4), layer=1)
    with torch.no_grad():
        attached.branch.gate.fill_(0.1)
    return model, attached, Scorer(model)


def texts(count: int = 4, *, asked: bool = False) -> LongTexts:
    heldout = [[text_of(6, 7, 5, seed=100 + n) for n in range(3)]]
    return LongTexts(
        lambda step: [text_of(6, 7, 5, seed=1000 * step + n) for n in range(count)], heldout, asked=asked, digest="-"
    )


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, 256])
def test_every_target_is_predicted_once_from_the_token_before_it(start: int | None) -> None:
    """Also the first of a window, by the last of the window before; a start token in front shifts the places."""
    group = [text_of(5, 8, 3, seed=1, start=start), text_of(9, 2, 6, seed=2, start=start)]
    batch = LongBatch.of(group)
    found = []
    for number, window in enumerate(batch.windows):
        for place, within, target, row in zip(*(part.tolist() for part in (
            window.positions, window.within, window.targets, window.rows)), strict=True):  # fmt: skip
            whole = [id for part in group[row].windows for id in part.input_ids]
            at = within - row * batch.whole.shape[1]
            assert whole[at + 1] == target
            assert whole[at] == batch.whole.flatten()[within] == window.input_ids.flatten()[place]
            assert window.real.flatten()[place]
            found.append((row, at + 1))
        if start is not None and number:
            assert (window.input_ids[:, 0] == start).all()
    wanted = [
        (row, place)
        for row, text in enumerate(group)
        for place, target in enumerate(t for window in text.windows for t in window.loss_mask)
        if target
    ]
    assert sorted(found) == sorted(wanted)


def test_texts_of_unequal_windows_share_no_batch() -> None:
    with pytest.raises(FeatclError, match=r"texts of \[1, 2\] windows"):
        LongBatch.of([text_of(4, 4), text_of(8)])
    with pytest.raises(FeatclError, match="no token is a target"):
        LongBatch.of([LongText((Encoded([1, 2], [False, False]),))])


def test_a_document_is_cut_into_whole_pieces() -> None:
    ids = [256, *range(50)]
    found = list(pieces(ids, window=8, context=20, start=256))
    assert [[len(window) for window in text.windows] for text in found] == [[8, 8, 4]] * 2
    read = [id for text in found for window in text.windows for id in window.input_ids if id != 256]
    assert read == list(range(38)), "what is left is shorter than a piece"
    assert all(text.windows[0].input_ids[0] == 256 and text.start == 256 for text in found)


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_readers_are_the_model_whole_and_window_by_window(made: tuple[Any, Any, Scorer]) -> None:
    """By hand, one text at a time, without padding."""
    model, attached, scorer = made
    group = [text_of(5, 8, 3, seed=1), text_of(9, 2, 6, seed=2)]
    batch = LongBatch.of(group)
    readers = {
        "full": full_hidden(scorer, attached, batch),
        "truncated": window_hidden(scorer, attached, batch, memory=False),
        "memory": window_hidden(scorer, attached, batch),
    }
    for row, text in enumerate(group):
        ids = torch.tensor([[id for window in text.windows for id in window.input_ids]])
        with torch.no_grad(), attached.disabled():
            whole = model(input_ids=ids).logits[0]
        begin = 0
        with torch.no_grad(), attached.using(None), attached.writing():
            for number, window in enumerate(text.windows):
                own = torch.tensor([window.input_ids])
                with attached.disabled():
                    alone = model(input_ids=own).logits[0]
                told = model(input_ids=own).logits[0]
                attached.state = attached.memory.settle(attached.state)
                mine = batch.windows[number].rows == row
                places = batch.windows[number].within[mine] - row * batch.whole.shape[1] - begin
                for reader, logits in (("full", whole[begin:]), ("truncated", alone), ("memory", told)):
                    found = scorer.head(readers[reader][number][mine])
                    torch.testing.assert_close(found, logits[places], rtol=1e-4, atol=1e-4)
                begin += len(window)
    assert attached.state is None


def test_a_step_is_the_mean_divergence_and_reaches_the_memory_alone(made: tuple[Any, Any, Scorer]) -> None:
    model, attached, scorer = made
    training = MemoryTraining(attached, scorer, texts(), steps=10, lr=1e-2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    slow = attached.tensors()
    batch = LongBatch.of(training.texts.batch(0))
    with torch.no_grad():
        teacher, student = (
            torch.cat([scorer.head(part) for part in read])
            for read in (full_hidden(scorer, attached, batch), window_hidden(scorer, attached, batch))
        )
    expected = kl_divergence(student[None], teacher[None], mask=torch.ones(1, len(student)).bool(), alpha=0.0)
    done = training.step_()
    assert done.loss == pytest.approx(float(expected), rel=1e-5)
    assert done.tokens == batch.tokens == len(student)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert any(not torch.equal(slow[name], tensor) for name, tensor in attached.tensors().items())
    assert not any(p.requires_grad or p.grad is not None for p in [*attached.parameters(), *model.parameters()])
    assert attached.state is None


def test_the_control_trains_the_gate_alone(made: tuple[Any, Any, Scorer]) -> None:
    _, attached, scorer = made
    slow = attached.tensors()
    MemoryTraining(attached, scorer, texts(), steps=10, lr=1e-2, gate_only=True).step_()
    changed = {name for name, tensor in attached.tensors().items() if not torch.equal(tensor, slow[name])}
    assert changed == {"gate"}


def test_the_gradient_comes_back_through_the_windows(made: tuple[Any, Any, Scorer]) -> None:
    """Finite differences of the loss on the last window alone, along the slow weights."""
    _, attached, scorer = made
    text = text_of(6, 7, 5, seed=3)
    silent = tuple(replace(window, loss_mask=[False] * len(window)) for window in text.windows[:2])
    batch = LongBatch.of([LongText((*silent, text.windows[2]))])

    def loss() -> torch.Tensor:
        hidden = window_hidden(scorer, attached, batch)[2 if len(batch.windows[2].targets) else 1]
        return scorer.head(hidden).square().mean()

    [projection] = [p for name, p in attached.branch.named_parameters() if name.endswith("projection")]
    with trained([projection]), torch.enable_grad():
        [gradient] = torch.autograd.grad(loss(), [projection])
    direction = gradient / gradient.norm()
    size = 1e-2
    values = []
    for sign in (1.0, -1.0):
        projection.data.add_(direction, alpha=sign * size)
        with torch.no_grad():
            values.append(float(loss()))
        projection.data.add_(direction, alpha=-sign * size)
    assert float(gradient.norm()) > 0
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(float(gradient.norm()), rel=2e-2)


def test_what_is_far_is_learned_and_only_with_memory(tiny: Make) -> None:
    """One letter is told in the first window and asked in the last: as many as fit in no truncated context.

    The control: the same training on texts whose first window belongs to another text.
    """
    model, _ = tiny("olmo2", n_layers=2)

    def text(letter: int, asked: int) -> LongText:
        told = [10, letter, letter, 11, letter, letter]
        last = [12, 13, asked]
        return LongText((Encoded(told, [False] * 6), Encoded(last, [False, False, True])))

    def losses(shuffled: bool) -> tuple[float, float]:
        attached = attach_memory(model, NeuralMemory(32, heads=2, chunk_size=4), layer=1)
        scorer = _Copying(model)

        def batch(step: int) -> list[LongText]:
            letters = torch.randint(20, 24, (16,), generator=torch.Generator().manual_seed(step)).tolist()
            return [text(letters[n], letters[(n + 5) % 16] if shuffled else letters[n]) for n in range(16)]

        training = MemoryTraining(attached, scorer, LongTexts(batch, [], asked=True, digest="-"), steps=60, lr=2e-2)
        found = [training.step_().loss for _ in range(60)]
        attached.detach()
        return sum(found[:5]) / 5, sum(found[-5:]) / 5

    first, last = losses(shuffled=False)
    assert last < 0.35 * first
    first, last = losses(shuffled=True)
    assert last > 0.5 * first


class _Copying(Scorer):
    """A teacher that knows the asked letter: its hidden state is that letter's row of the output head, made long."""

    def hidden(self, batch: Any) -> torch.Tensor:
        weight: Any = self.head.linear.weight
        return 40.0 * torch.nn.functional.normalize(weight[batch.targets].float(), dim=-1)


# --- going on --------------------------------------------------------------------------------------------------------


def test_saved_and_restored_it_goes_on_bit_equal(tiny: Make, tmp_path: Path) -> None:
    def training(seed: int = 0) -> MemoryTraining:
        model, _ = tiny("olmo2", n_layers=2)
        attached = attach_memory(model, NeuralMemory(32, heads=2, chunk_size=4, seed=seed), layer=1)
        return MemoryTraining(attached, Scorer(model), texts(), steps=8, lr=1e-2)

    whole, first, second = training(), training(), training(seed=1)
    for _ in range(8):
        whole.step_()
    for _ in range(3):
        first.step_()
    first.save(tmp_path / "training")
    second.restore_(tmp_path / "training")
    assert second.done == 3
    for _ in range(5):
        second.step_()
    for name, tensor in whole.attached.tensors().items():
        assert torch.equal(tensor, second.attached.tensors()[name])
    assert whole.measure() == second.measure()
    assert whole.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 2), "the last step before the rate is zero"
    (tmp_path / "training").write_bytes(b"torn")
    with pytest.raises(FeatclError, match="no saved memory training"):
        second.restore_(tmp_path / "training")


def test_a_loss_that_is_not_finite_changes_nothing(made: tuple[Any, Any, Scorer]) -> None:
    _, attached, scorer = made
    training = MemoryTraining(attached, scorer, texts(), steps=10, lr=1e-2)
    with torch.no_grad():
        attached.branch.gate.fill_(float("nan"))
    before = attached.tensors()
    with pytest.raises(FeatclError, match=r"the memory's (loss|gradient norm)"):
        training.step_()
    assert training.done == 0
    assert all(torch.equal(before[n], t) or n == "gate" for n, t in attached.tensors().items())


# --- measuring -------------------------------------------------------------------------------------------------------


def test_measures_by_hand(made: tuple[Any, Any, Scorer]) -> None:
    _, attached, scorer = made
    group = [text_of(5, 8, 3, seed=n) for n in range(5)]
    found = read_texts(scorer, attached, group, at_once=2).measures(asked=True)
    batch = LongBatch.of(group)
    kl, right, likely = {}, {}, {}
    full = torch.cat([scorer.head(part) for part in full_hidden(scorer, attached, batch)])
    with torch.no_grad():
        for reader, memory in (("memory", True), ("truncated", False)):
            parts = [scorer.head(part) for part in window_hidden(scorer, attached, batch, memory=memory)]
            logits = torch.cat(parts)
            mask = torch.ones(1, len(logits)).bool()
            kl[reader] = float(kl_divergence(logits[None], full[None], mask=mask, alpha=0.0))
            last = batch.windows[-1]
            hits = parts[-1].argmax(-1) == last.targets
            right[reader] = [bool(hits[last.rows == row].all()) for row in range(5)]
            likely[reader] = logits.argmax(-1)
            for number, (part, window) in enumerate(zip(parts, batch.windows, strict=True)):
                nll = torch.nn.functional.cross_entropy(part, window.targets)
                assert found[f"loss_{reader}/window_{number}"] == pytest.approx(float(nll), rel=1e-4)
            assert found[f"kl_{reader}"] == pytest.approx(kl[reader], rel=1e-3)
            assert found[f"recall_{reader}"] == sum(right[reader]) / 5
    assert found["closed"] == pytest.approx(1 - kl["memory"] / kl["truncated"], abs=1e-3)
    moved = full.argmax(-1) != likely["truncated"]
    agreed = likely["memory"][moved] == full.argmax(-1)[moved]
    assert found["agreement"] == pytest.approx(float(agreed.float().mean()))
    assert not any("recall" in name for name in read_texts(scorer, attached, group).measures(asked=False))
