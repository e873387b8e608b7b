"""The memory confined to features: what it may read, what it may write, and what can be read off it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import Directions, FeatureEncoder
from featcl.memory import FeatureMemory, MemoryState, NeuralMemory
from featcl.memory.reference import recurrence

D_MODEL, K = 24, 5


def directions(*, encoder: bool = True, seed: int = 0) -> Directions:
    """Five features that are not orthogonal; feature j fires where the stream's product with its column exceeds 1."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(D_MODEL, generator=generator)
    vectors = torch.randn(K, D_MODEL, generator=generator) + 0.7 * common
    columns = torch.linalg.pinv(vectors / vectors.norm(dim=1, keepdim=True))  # reads exactly what is written
    given = FeatureEncoder(
        W_enc=columns, b_enc=torch.zeros(K), b_dec=torch.zeros(D_MODEL), threshold=torch.ones(K),
        activation="jumprelu", active=0, chosen=tuple(range(K)),
    )  # fmt: skip
    return Directions.from_vectors(
        vectors, layer=1, feature_ids=[10, 20, 30, 40, 50], names=("ten", "twenty", "thirty", "forty", "fifty"),
        encoder=given if encoder else None,
    )  # fmt: skip


def build(**settings: Any) -> FeatureMemory:
    return FeatureMemory(directions(), **{"chunk_size": 4, **settings})


def stream(length: int = 13, batch: int = 2, seed: int = 1, scale: float = 3.0) -> Tensor:
    """Noise on which some features fire and some do not."""
    return scale * torch.randn(batch, length, D_MODEL, generator=torch.Generator().manual_seed(seed))


def firing(*active: int, value: float = 4.0) -> Tensor:
    """One token [1, 1, d_model] on which exactly these features fire."""
    rows = directions().vectors
    return value * rows[list(active)].sum(dim=0)[None, None]


@pytest.mark.parametrize("settings", [{}, {"depth": 2}, {"conv": 3, "momentum": False}, {"out_gate": False}])
def test_it_writes_only_along_its_features(settings: dict[str, Any]) -> None:
    memory, span = build(**settings), directions().subspace()
    read, state = memory(stream())
    read = torch.cat([read, memory(stream(seed=2), state)[0]], dim=1)
    assert read.abs().max() > 1e-2
    assert span.reject(read).norm() <= 1e-6 * read.norm()
    for weight in (memory.values, memory.gates, *memory.initial):  # whatever is trained
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    trained = memory.bfloat16()(stream())[0]
    assert trained.abs().max() > 1e-2
    assert span.reject(trained).norm() <= 1e-6 * trained.norm()
    free, fed = NeuralMemory(D_MODEL, heads=2, chunk_size=4), stream()
    free_read = free(fed)[0]
    assert span.reject(free_read).norm() > 0.5 * free_read.norm()  # negative control


def test_it_reads_only_its_features() -> None:
    """A token on which none fires reads nothing and stores nothing; what lies beside the features is not seen."""
    memory = build(decay=False, momentum=False)
    _, state = memory(stream(8))
    assert state.count.tolist() == [0, 0]
    silent = torch.zeros(2, 4, D_MODEL) + 0.9 * directions().vectors[0]
    read, after = memory(silent, state)
    assert bool((read == 0).all())
    assert all(torch.equal(a, b) for a, b in zip(after.weights, state.weights, strict=True))
    loud, _ = memory(2 * silent, state)
    assert loud.abs().max() > 1e-3  # negative control: above the threshold


def test_it_is_the_recurrence_on_activations() -> None:
    memory = build(depth=2, chunk_size=3).double()
    for weight in memory.initial:
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = stream(9, batch=1).double()
    state = memory.initial_state(1)
    made = memory._tokens(x, state, torch.tensor([9]))
    acts = memory.encoder(x).double()[0]
    assert torch.equal(made.keys[0, :, 0], acts)
    assert torch.equal(made.queries[0, :, 0], acts)
    assert 0.2 < float((acts > 0).double().mean()) < 0.8
    unit = torch.nn.functional.normalize(acts, dim=-1)
    with torch.no_grad():
        _, after = memory._run(made, state, torch.tensor([9]))
    _, weights, _ = recurrence(
        [weight[0, 0] for weight in state.weights], [torch.zeros_like(weight[0, 0]) for weight in state.weights],
        queries=unit, keys=unit, values=made.values[0, :, 0], gates=made.gates[0, :, 0, :3], chunk_size=3,
        max_gradient=memory.max_gradient,
    )  # fmt: skip
    for own, other in zip(after.weights, weights, strict=True):
        assert (own[0, 0] - other).abs().max() <= 1e-10


@pytest.mark.parametrize("depth", [1, 2])
def test_its_content_is_a_table_of_what_it_gives(depth: int) -> None:
    memory = build(depth=depth, decay=False)
    state = memory(stream(64))[1]
    for row in range(2):
        content = memory.content(state, row=row)
        settled = memory.settle(state.rows(row).detach())
        for feature in range(K):
            token = firing(feature)
            rms = token.square().mean().sqrt()
            made = memory._tokens(token, settled, torch.tensor([1]))
            opening = made.gates[0, 0, 0, 3] / rms
            expected = rms * opening * content.table[:, feature] @ directions().vectors
            assert (memory(token, settled)[0][0, 0] - expected).norm() <= 1e-5 * expected.norm()
    assert (memory.content(state, row=0).table - memory.content(state, row=1).table).abs().max() > 1e-3


def test_its_content_names_what_was_stored() -> None:
    """Where feature 30 fires together with content along 30 alone, the strongest link is 30 → 30; then 10 is added."""
    memory = build(momentum=False, decay=False, max_step=0.5, conv=2)
    assert str(memory.content(memory.initial_state(1))) == "nothing is stored"
    episode = torch.cat([firing(0), firing(2)], dim=1)  # 10, and after it 30: the key is the token before
    state = None
    for _ in range(20):
        _, state = memory(episode, memory.settle(state)) if state else memory(episode)
    content = memory.content(state, top=4)
    best = content.links[0]
    found = {(link.reads, link.writes): link.strength for link in content.links}
    assert (best.reads_name, best.writes_name) in {("ten", "thirty"), ("thirty", "ten")}
    assert found[10, 30] > 0
    assert content.links == tuple(sorted(content.links, key=lambda link: -abs(link.strength)))
    assert sum(link.share for link in memory.content(state, top=K * K).links) == pytest.approx(1.0)
    assert content.to_dicts()[0]["reads_name"] == best.reads_name
    assert str(best).startswith(f"feature {best.reads} ({best.reads_name}) gives +")
    assert float(content.table.abs().max()) == pytest.approx(best.strength)


def test_content_includes_the_open_chunk() -> None:
    memory = build()
    state = memory(stream(3))[1]
    assert state.count.tolist() == [3, 3]
    assert not bool(state.weights[0].any())
    assert memory.content(state).links


@pytest.mark.parametrize("split", [[13], [1] * 13, [5, 0, 8]])
def test_any_split_of_a_stream_is_one_call(split: list[int]) -> None:
    memory = build(depth=2, conv=3)
    read, state = memory(stream())
    carried, parts = None, []
    for part in stream().split(split, dim=1):
        found, carried = memory(part, carried)
        parts.append(found)
    assert (torch.cat(parts, dim=1) - read).abs().max() <= 1e-5
    pairs = zip(carried.named().values(), state.named().values(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) <= 1e-5


def test_gradients_reach_every_slow_weight_and_no_direction() -> None:
    memory = build(depth=2, conv=2)
    first, state = memory(stream())
    second, _ = memory(stream(seed=2), state)
    (first.square().sum() + second.square().sum()).backward()
    for name, parameter in memory.named_parameters():
        assert float(parameter.grad.abs().sum()) > 0, name
    assert memory.state_dict().keys() == {name for name, _ in memory.named_parameters()}


def test_settings_make_the_same_memory_again() -> None:
    memory = build(depth=2, conv=2, out_gate=False, max_step=0.3)
    again = FeatureMemory(directions(), **memory.settings())
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again(stream())[0], memory(stream())[0])


def test_bad_input_is_refused() -> None:
    memory = build()
    state = memory(stream())[1]
    with pytest.raises(FeatclError, match="no SAE encoder"):
        FeatureMemory(directions(encoder=False))
    with pytest.raises(FeatclError, match="width = 24"):
        memory(stream()[..., :8])
    with pytest.raises(FeatclError, match="batch of 2"):
        memory.content(state, row=2)
    with pytest.raises(FeatclError, match="missing, or one too many"):
        memory.content(build(depth=2).initial_state(1))
    with pytest.raises(FeatclError, match="conv"):
        build(conv=-1)
    assert isinstance(state, MemoryState)
