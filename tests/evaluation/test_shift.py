"""Distances between segments: exactly 0 for identical ones, near their floor for samples of one kind, and in order."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

import featcl
from featcl.adapters import constrain
from featcl.errors import FeatclError
from featcl.evaluation.shift import ShiftSeries, cut_segments, prediction_kl, shift_series
from featcl.lab.streams import load_stream
from featcl.streams import Chat, Encoded
from featcl.streams.windows import encode_trajectory
from tests.adapters.conftest import build_directions, build_model
from tests.evaluation import toys


def sequences(count: int, *, low: int, high: int, seed: int) -> list[Encoded]:
    """Random sequences over a range of the vocabulary; every token but the first is a target."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        ids = torch.randint(low, high, (length,), generator=generator).tolist()
        found.append(Encoded(ids, [False] + [True] * (length - 1)))
    return found


def test_identical_segments_have_no_distance() -> None:
    same = sequences(8, low=5, high=40, seed=0)
    series = shift_series(toys.model(), {"a": same, "b": list(same), "c": same})
    assert len(series.steps) == 2
    for step in series.steps:
        assert (step.gradient, step.kl, step.js) == (0.0, 0.0, 0.0)
        assert step.gradient_floor > 0.0  # the halves of both are not the same sequences
    assert series.record()["shift/gradient"] == 0.0


def test_the_numbers_are_those_of_a_plain_loop() -> None:
    model: Any = toys.model()
    segments = {"a": sequences(3, low=5, high=20, seed=0), "b": sequences(5, low=30, high=60, seed=1)}
    weights = [parameter for name, parameter in model.named_parameters() if "o_proj" in name or "down_proj" in name]
    gradients, predictions = [], []
    for members in segments.values():
        total, probabilities, tokens = torch.zeros(()), torch.zeros(64, dtype=torch.float64), 0
        for member in members:
            log_p = model(torch.tensor([member.input_ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(member.input_ids[1:])
            total = total - log_p[torch.arange(len(targets)), targets].sum()
            probabilities += log_p.detach().double().exp().sum(0)
            tokens += len(targets)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total / tokens, weights)]).double())
        predictions.append(probabilities / tokens)
    [step] = shift_series(model, segments, batch_tokens=24).steps
    cosine = torch.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert step.gradient == pytest.approx(1 - float(cosine), abs=1e-5)
    p, q = predictions
    assert step.kl == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-4)
    middle = (p + q) / 2
    js = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    assert step.js == pytest.approx(float(js), rel=1e-4)
    assert 0 < step.js < math.log(2)


def test_two_samples_of_one_kind_lie_at_their_floor_and_two_kinds_above() -> None:
    model = toys.model()
    one, again = (sequences(60, low=5, high=9, seed=seed) for seed in (0, 1))
    other = sequences(60, low=30, high=34, seed=2)
    same, differ = shift_series(model, {"one": one, "again": again, "other": other}).steps
    assert same.gradient < 3 * same.gradient_floor
    assert differ.gradient > 5 * differ.gradient_floor
    assert differ.gradient > 5 * same.gradient
    assert differ.js > 3 * same.js


def test_the_model_is_left_as_it_was() -> None:
    model: Any = toys.model()
    model.train()
    names = dict(model.named_parameters())
    names["lm_head.weight"].requires_grad_(False)
    before = {name: (parameter.requires_grad, parameter.detach().clone()) for name, parameter in names.items()}
    shift_series(model, {"a": sequences(4, low=5, high=20, seed=0), "b": sequences(4, low=5, high=20, seed=1)})
    assert model.training
    for name, (flag, value) in before.items():
        assert names[name].requires_grad == flag
        assert torch.equal(names[name], value)
        assert names[name].grad is None


def test_layers_choose_whose_gradient_it_is() -> None:
    model = toys.model()
    segments = {"a": sequences(8, low=5, high=20, seed=0), "b": sequences(8, low=30, high=60, seed=1)}
    whole, first, last = (shift_series(model, segments, layers=layers).gradient for layers in (None, [0], [1]))
    assert min(first, last) - 1e-9 < whole < max(first, last) + 0.2
    assert abs(first - last) > 1e-4
    with pytest.raises(FeatclError, match="layer 2 is out of range, the model has blocks 0 to 1"):
        shift_series(model, segments, layers=[2])
    with pytest.raises(FeatclError, match="no layers"):
        shift_series(model, segments, layers=[])


def test_what_learning_changed_in_the_predictions() -> None:
    model = build_model("olmo2")
    adapter = constrain(model, build_directions(), kind="both")
    members = sequences(6, low=5, high=40, seed=0)
    zero = adapter.coordinates()
    assert prediction_kl(adapter, zero, zero, members) == 0.0
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moved = adapter.coordinates()
    found = prediction_kl(adapter, zero, moved, members)
    total = tokens = 0.0
    for member in members:
        ids = torch.tensor([member.input_ids])
        with torch.no_grad():
            now = adapter.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with adapter.disabled():
                base = adapter.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        total += float((now.exp() * (now - base)).sum())
        tokens += len(now)
    assert found == pytest.approx(total / tokens, rel=1e-4)
    assert found > 1e-3
    assert all(torch.equal(adapter.coordinates()[name], value) for name, value in moved.items())  # put back
    assert prediction_kl(adapter, moved, zero, members) != pytest.approx(found, rel=1e-3)  # it has a direction


def test_bad_input() -> None:
    members = sequences(6, low=5, high=40, seed=0)
    with pytest.raises(FeatclError, match="1 segment; a distance needs two"):
        shift_series(toys.model(), {"a": members})
    with pytest.raises(FeatclError, match="segment 'b' has 1 sequence; each needs two"):
        shift_series(toys.model(), {"a": members, "b": members[:1]})
    with pytest.raises(FeatclError, match="6 sequences do not make 4 segments"):
        cut_segments(members, 4)
    cut = cut_segments(members, 3)
    assert [sequence for part in cut.values() for sequence in part] == members
    assert [len(part) for part in cut.values()] == [2, 2, 2]


# --- orders of the same data ---------------------------------------------------------------------------------------

ORDERS = ("blocked", "gradual", "shuffled", "recurring")
TASKS = ("home_facts", "home_style", "code_convention", "code_library")
SEGMENTS = 8


def ordered(kinds: list[list[Encoded]], order: str) -> list[Encoded]:
    """The same sequences of several kinds in an order, as the laboratory's streams have them."""
    rng = random.Random(0)
    if order == "recurring":
        return [member for start in (0, 1) for kind in kinds for member in kind[start::2]]
    spread = {"blocked": 0.0, "gradual": 0.5, "shuffled": 100.0}[order]
    placed = [
        (index + place / len(kind) + rng.gauss(0.0, spread), index, place)
        for index, kind in enumerate(kinds)
        for place in range(len(kind))
    ]
    return [kinds[index][place] for _, index, place in sorted(placed)]


def check_order(found: dict[str, ShiftSeries]) -> None:
    for number in ("gradient", "js", "gradient_excess"):
        value = {order: getattr(series, number) for order, series in found.items()}
        assert value["shuffled"] < value["gradual"] < value["blocked"] < value["recurring"], number
    steps = [step.gradient for step in found["blocked"].steps]  # 4 kinds in 8 segments: borders at 1, 3, 5
    assert max(steps[::2]) < 0.5 * min(steps[1::2])
    assert found["shuffled"].gradient_excess < 0.1 * found["blocked"].gradient_excess
    assert min(step.gradient for step in found["recurring"].steps) > max(steps[::2])


def test_orders_of_the_same_data_shift_as_they_should() -> None:
    model = toys.model()
    kinds = [sequences(120, low=5 + 8 * kind, high=9 + 8 * kind, seed=kind) for kind in range(4)]
    check_order({order: shift_series(model, cut_segments(ordered(kinds, order), SEGMENTS)) for order in ORDERS})


@pytest.mark.slow
def test_the_orders_of_the_laboratory_shift_as_they_should() -> None:
    model, tokenizer = featcl.load_model("lab/olmo2")
    chat = Chat(tokenizer)
    found = {}
    for order in ORDERS:
        stream = load_stream("lab/applications", order=order, tasks=TASKS)
        taught = [trajectory for task in stream.tasks for trajectory in task.trajectories]
        encoded = [window for t in taught for window in encode_trajectory(t, chat, max_length=256).windows]
        found[order] = shift_series(model, cut_segments(encoded, SEGMENTS), layers=[2])
    check_order(found)
