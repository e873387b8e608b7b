"""A LoRA per task and its routers: accuracy against shuffled labels, exact retention, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.memory import NeuralMemory, attach_memory
from featcl.methods.embeddings import mean_activation, token_vectors
from featcl.methods.method import Method
from featcl.methods.routed import START, Routed
from featcl.methods.router import Learned, Nearest, Router, prompt_vector, question_of
from featcl.streams import Trajectory
from tests.methods.coins import round_trip, same_tensors
from tests.methods.tiny_learner import Tiny

A, B = ("abcd abcd", "dcba dcba"), ("vwxyz vw", "zyxwv zy")
ALPHABETS = {"low": "abcdefgh", "digits": "01234567", "high": "STUVWXYZ"}


def question(alphabet: str, draw: random.Random) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "".join(draw.choices(alphabet, k=40))}]


def vectors_of(tiny: Tiny, count: int, seed: int) -> list[tuple[str, Tensor]]:
    """(task, vector) of `count` questions of each task."""
    draw = random.Random(seed)
    return [
        (task, prompt_vector(question(alphabet, draw), tiny.student, layer=0)[0])
        for task, alphabet in ALPHABETS.items()
        for _ in range(count)
    ]


def accuracy(router: Router, seen: Sequence[tuple[str, Tensor]], asked: Sequence[tuple[str, Tensor]]) -> float:
    for task in ALPHABETS:
        router.add_(task, torch.stack([vector for own, vector in seen if own == task]))
    return sum(router.choose(vector) == task for task, vector in asked) / len(asked)


@pytest.mark.parametrize("made", [Nearest, Learned])
def test_separable_tasks_are_told_apart_and_shuffled_ones_are_not(made: type[Router]) -> None:
    tiny = Tiny("write")
    tiny.shake_()  # the adapter is switched off where the base is read
    seen, asked = vectors_of(tiny, 16, seed=0), vectors_of(tiny, 16, seed=1)
    assert accuracy(made(examples=64), seen, asked) > 0.95
    labels = [task for task, _ in seen]
    random.Random(2).shuffle(labels)
    shuffled = [(label, vector) for label, (_, vector) in zip(labels, seen, strict=True)]
    assert accuracy(made(examples=64), shuffled, asked) < 0.6  # chance is 1/3, four deviations of 48 draws


def test_nearest_counts_distances_in_units_of_the_spread() -> None:
    router = Nearest(examples=8)
    router.add_("a", torch.tensor([[0.0, -20.0], [0.0, 20.0]]))
    router.add_("b", torch.tensor([[2.0, -15.0], [2.0, 25.0]]))
    assert torch.allclose(router._means, torch.tensor([[0.0, 0.0], [2.0, 5.0]], dtype=torch.float64))
    assert torch.allclose(
        router._variance, torch.tensor([20.0, 380.0], dtype=torch.float64)
    )  # 0.9 (0, 400) + 0.1 · 200
    assert router.choose(torch.tensor([2.0, 0.0])) == "b"  # 4 / 20 + 0 for a, 0 + 25 / 380 for b; unscaled it were a
    assert router.choose(torch.tensor([0.0, 0.0])) == "a"


def test_the_learned_router_is_at_the_optimum_of_its_loss() -> None:
    router = Learned(examples=16)
    draw = torch.Generator().manual_seed(0)
    rows = {task: torch.randn(count, 3, generator=draw) + shift for task, count, shift in (("a", 4, 0), ("b", 9, 2))}
    for task, own in rows.items():
        router.add_(task, own)
    z = (torch.cat(list(rows.values())).double() - router._centre) / router._scale
    labels = torch.tensor([0] * 4 + [1] * 9)
    weight = router._weight.clone().requires_grad_(True)
    scores = z @ weight[:, :-1].T + weight[:, -1]
    nll = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
    (0.5 * (nll[:4].mean() + nll[4:].mean()) + 0.005 * weight[:, :-1].square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-5
    assert float(router._weight.abs().max()) > 0.5  # and not because it is zero


def test_what_is_read_is_the_base_and_the_question_alone() -> None:
    tiny = Tiny("write")
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "no"}]
    assert question_of(Trajectory("t", messages=tuple(messages))) == tuple(messages[:1])
    assert question_of(Trajectory("t", text="abc")) == ({"role": "user", "content": "abc"},)
    before, read = prompt_vector(messages[:1], tiny.student, layer=1)
    assert read == len(tiny.student.chat.prompt(messages[:1]))
    tiny.shake_()
    assert torch.equal(prompt_vector(messages[:1], tiny.student, layer=1)[0], before)
    ids = torch.tensor([tiny.student.chat.prompt(messages[:1])])
    with tiny.adapter.disabled(), torch.no_grad():
        hidden = tiny.adapter.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.allclose(prompt_vector(messages[:1], tiny.student, layer=0)[0], hidden[1][0, 1:].mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "both", "shift"])
def test_nothing_that_a_task_learned_is_lost(kind: str) -> None:
    tiny, method = Tiny(kind), Routed(router="oracle")
    start, base = tiny.adapter.coordinates(), tiny.logits(tiny.task(*A))
    tiny.learn_(method, "a", tiny.task(*A))
    right_after = tiny.logits(tiny.task(*A))
    assert method.route(question("ab", random.Random(0)), "a", tiny.view) is None
    method.begin_task_("b", tiny.view)
    assert same_tensors(tiny.adapter.coordinates(), start)
    tiny.learn_(method, "b", tiny.task(*B))
    own = tiny.adapter.coordinates()
    assert not torch.equal(tiny.logits(tiny.task(*A)), right_after)  # b's adapter is another one
    assert method.route((), "a", tiny.view) == "a"
    with method.routed("a", tiny.view):
        assert torch.equal(tiny.logits(tiny.task(*A)), right_after)
    assert same_tensors(tiny.adapter.coordinates(), own)
    assert method.route((), "of none of them", tiny.view) == START
    with method.routed(START, tiny.view):
        assert torch.equal(tiny.logits(tiny.task(*A)), base)
    assert method.route((), None, tiny.view) is None


def test_plain_learning_forgets_what_is_kept_here() -> None:
    losses = {}
    for made in (lambda: Routed(router="oracle"), Method):
        tiny, method = Tiny("none", lr=3e-2), made()
        tiny.learn_(method, "a", tiny.task(*A), steps=20)
        at_end = tiny.loss(tiny.task(*A))
        tiny.learn_(method, "b", tiny.task(*B), steps=20)
        key = method.route((), "a", tiny.view)
        with method.routed(key or "", tiny.view):
            losses[method.name] = tiny.loss(tiny.task(*A)) - at_end
    assert losses["routed"] == 0.0
    assert losses["none"] > 0.5  # negative control


@pytest.mark.parametrize("router", ["nearest", "learned"])
def test_questions_find_their_task(router: str) -> None:
    tiny, method = Tiny("write"), Routed(router=router)
    draw = random.Random(0)
    assert method.route(question("ab", draw), None, tiny.view) is None  # nothing is known yet
    for task, alphabet in ALPHABETS.items():
        reply = {"role": "assistant", "content": "y"}
        said = [Trajectory(f"{task}{n}", messages=(*question(alphabet, draw), reply)) for n in range(8)]
        tiny.learn_(method, task, [tiny.encode(trajectory) for trajectory in said], steps=1)
        if task == "low":
            assert method.route(question("XYZ", draw), None, tiny.view) is None  # all go to the only one, the present
    asked = [(task, question(alphabet, draw)) for task, alphabet in ALPHABETS.items() for _ in range(8)]
    keys = [(task, method.route(messages, None, tiny.view)) for task, messages in asked]
    assert sum(key == (None if task == "high" else task) for task, key in keys) > 0.95 * len(keys)


def test_a_task_that_comes_again_goes_on_where_it_was() -> None:
    tiny, method = Tiny("none"), Routed(router="oracle")
    tiny.learn_(method, "a", tiny.task(*A))
    first = tiny.adapter.coordinates()
    tiny.learn_(method, "b", tiny.task(*B))
    method.begin_task_("a", tiny.view)
    assert same_tensors(tiny.adapter.coordinates(), first)
    tiny.restart_()
    tiny.step_(method, tiny.task(*A)[0])
    later = tiny.adapter.coordinates()
    method.begin_task_("b", tiny.view)  # also where nobody said that it ended
    with method.routed("a", tiny.view):
        assert same_tensors(tiny.adapter.coordinates(), later)


@pytest.mark.parametrize("router", ["oracle", "nearest", "learned"])
def test_state_goes_through_a_checkpoint(router: str) -> None:
    found: list[Any] = []
    for resumed in (False, True):
        tiny, method = Tiny("none"), Routed(router=router)
        tiny.learn_(method, "a", tiny.task(*A))
        tiny.learn_(method, "b/1", tiny.task(*B))
        if resumed:
            method = round_trip(method, lambda: Routed(router=router))
        route = method.route([{"role": "user", "content": "abcd"}], "a", tiny.view)
        tiny.learn_(method, "c", tiny.task("0123 0123"))
        with method.routed("a", tiny.view):
            found.append((route, tiny.adapter.coordinates(), method.tensors(), method.state(), method.cost()))
    assert found[0][0] == found[1][0] == "a"
    assert same_tensors(found[0][1], found[1][1])
    assert same_tensors(found[0][2], found[1][2])
    assert found[0][3:] == found[1][3:]


def test_cost_is_what_is_stored_and_read() -> None:
    tiny, method = Tiny("none"), Routed(examples=1)
    assert method.cost().stored_bytes == 0
    each = sum(tensor.nbytes for tensor in tiny.adapter.coordinates().values())
    for number, (task, texts) in enumerate((("a", A), ("b", B)), start=1):
        tiny.learn_(method, task, tiny.task(*texts))
        assert method.cost().stored_bytes == (number + 1) * each + number * 32 * 4  # the start, tasks, one vector each
    prompts = [tiny.student.chat.prompt([{"role": "user", "content": texts[0]}]) for texts in (A, B)]
    assert method.cost().forward_tokens == sum(map(len, prompts))
    assert method.cost().backward_tokens == 0


def test_bad_input_is_one_clear_error() -> None:
    for options, message in (
        ({"router": "near"}, "router 'near' is not available: there is oracle, nearest, learned"),
        ({"examples": 0}, "examples must be a whole number"),
        ({"router": "oracle", "layer": 1}, "leave layer out"),
    ):
        with pytest.raises(FeatclError, match=message):
            Routed(**options)
    tiny = Tiny("none")
    with pytest.raises(FeatclError, match="layer 2 is out of range"):
        Routed(layer=2).refuse(tiny.view)
    method = Routed()
    with pytest.raises(FeatclError, match="at least two tasks, the stream has 1"):
        method.check_tasks(["a", "a"])
    method.check_tasks(["a", "b"])
    method.begin_task_("a", tiny.view)
    with pytest.raises(FeatclError, match="'b' ends, but 'a'"):
        method.end_task_("b", tiny.task(*B), tiny.view)
    with pytest.raises(FeatclError, match="no experiences"):
        method.end_task_("a", [], tiny.view)
    with pytest.raises(FeatclError, match="no task 'c'"), method.routed("c", tiny.view):
        pass
    tiny.adapter.changes += 1
    with pytest.raises(FeatclError, match="directions were changed"):
        method.end_task_("a", tiny.task(*A), tiny.view)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_memory_is_no_part_of_the_base(layer: int) -> None:
    """What routers and searches read is the base alone, so that it never grows stale, whatever a memory was told."""
    tiny = Tiny("none")
    asked = [{"role": "user", "content": "abcdabcd"}]

    def read() -> list[Tensor]:
        [batch] = tiny.task(*A)[0].batches
        return [
            prompt_vector(asked, tiny.student, layer=1)[0],
            token_vectors("abcd", tiny.student, layer=1),
            mean_activation([batch], tiny.student),
        ]

    alone, [batch] = read(), tiny.task(*A)[0].batches
    memory = NeuralMemory(32, heads=2, head_dim=8, persistent=0, seed=0)
    attached = attach_memory(tiny.model, memory, layer=layer, seed=0)
    with torch.no_grad():
        before = tiny.student.scorer.hidden(batch)
        for parameter in attached.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        with attached.writing():
            tiny.model(torch.arange(40)[None])
        assert not torch.allclose(tiny.student.scorer.hidden(batch), before), "negative control: it does act"
    assert all(torch.equal(one, other) for one, other in zip(read(), alone, strict=True))
