"""Which records stay: uniform, by importance, far apart, balanced; against what theory says."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats

from featcl.errors import FeatclError
from featcl.learning.randomness import derived_generator
from featcl.methods.balanced import Balanced
from featcl.methods.buffer import Buffer, Look
from featcl.methods.importance import SMALLEST, Importance, gradient_norm, mean_loss
from featcl.methods.k_centre import KCentre, one_of_closest
from featcl.methods.reservoir import Reservoir
from featcl.objectives.experience import Experience
from featcl.streams import Trajectory
from tests.methods.replaying import Bench, ask


class Seeded:
    """A view that has generators and nothing else."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generator(self, purpose: str) -> torch.Generator:
        return derived_generator(self.seed, "", purpose)


def offered(buffer: Buffer, trajectories: list[Trajectory], seed: int) -> list[str]:
    """The ids that stay."""
    for trajectory in trajectories:
        generator: Any = None
        buffer.add_(b"x", Experience(trajectory, [], generator), Seeded(seed))  # type: ignore[arg-type]
    return [entry.id for entry in buffer.entries]


def stream(sizes: dict[str, int]) -> list[Trajectory]:
    return [Trajectory(f"{task}{i}", task=task, text="ab") for task, size in sizes.items() for i in range(size)]


def chi_square(counts: list[int]) -> float:
    return float(stats.chisquare(counts).pvalue)


# --- reservoir ---------------------------------------------------------------------------------------------------


def test_a_reservoir_keeps_every_record_equally_often() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        counts.update(offered(Buffer(Reservoir(), budget=5), stream({"a": 25}), seed))
    assert sum(counts.values()) == 400 * 5
    assert chi_square([counts[f"a{i}"] for i in range(25)]) > 0.01


def test_a_buffer_that_drops_any_entry_is_not_uniform() -> None:
    class Naive(Reservoir):  # negative control: the newest always gets in, and any of all goes
        def victim_(self, entries: Any, generator: torch.Generator) -> int:
            return int(torch.randint(len(entries) - 1, (), generator=generator))

    counts: Counter[str] = Counter()
    for seed in range(400):
        counts.update(offered(Buffer(Naive(), budget=5), stream({"a": 25}), seed))
    assert chi_square([counts[f"a{i}"] for i in range(25)]) < 1e-6


# --- importance --------------------------------------------------------------------------------------------------


def scored(weights: dict[str, float]) -> Importance:
    """Importance whose scores are given."""

    class Given(Importance):
        def look_(self, experience: Experience, view: Any, generator: torch.Generator) -> Look:
            u = 1.0 - float(torch.rand((), dtype=torch.float64, generator=generator))
            return Look({"key": math.log(u) / max(weights[experience.trajectory.id], SMALLEST)})

    return Given()


def test_importance_keeps_one_of_two_in_proportion_to_their_weights() -> None:
    trajectories = [Trajectory("light", text="ab"), Trajectory("heavy", text="ab")]
    kept = Counter(
        offered(Buffer(scored({"light": 1.0, "heavy": 3.0}), budget=1), trajectories, s)[0] for s in range(800)
    )
    assert stats.binomtest(kept["heavy"], 800, 0.75).pvalue > 0.01
    assert stats.binomtest(kept["heavy"], 800, 0.5).pvalue < 1e-6  # negative control


@pytest.mark.parametrize("score", ["loss", "gradient_norm"])
def test_importance_measures_what_it_says(score: str) -> None:
    bench = Bench()
    bench.move_()
    experience, view = bench.encode(ask(3)), bench.view()
    look = Importance(score=score).look_(experience, view, view.generator("x"))
    u = 1.0 - float(torch.rand((), dtype=torch.float64, generator=view.generator("x")))
    if score == "loss":
        assert look.mark["score"] == pytest.approx(bench.nll(ask(3)), rel=1e-6)
        assert look.mark["score"] == mean_loss(experience, view)
    else:
        squares = sum(float(g.double().square().sum()) for g in bench.gradient(experience).values())
        assert look.mark["score"] == pytest.approx(squares**0.5, rel=1e-9)
        assert look.mark["score"] == gradient_norm(experience, view)
        assert look.backward_tokens > 0
    assert look.mark["key"] == pytest.approx(math.log(u) / look.mark["score"], rel=1e-12)


def test_importance_without_power_is_the_reservoir() -> None:
    bench = Bench()
    experience, view = bench.encode(ask(3)), bench.view()
    ours = Importance(power=0.0).look_(experience, view, view.generator("x")).mark["key"]
    assert ours == math.log(Reservoir().look_(experience, view, view.generator("x")).mark["key"])


# --- k-centre ----------------------------------------------------------------------------------------------------


def kept_points(points: list[list[float]], k: int) -> list[list[float]]:
    """One point at a time."""
    held: list[list[float]] = []
    for point in points:
        held.append(point)
        if len(held) > k:
            held.pop(one_of_closest(torch.tensor(held)))
    return held


def radius(points: list[list[float]], kept: list[list[float]]) -> float:
    return float(torch.cdist(torch.tensor(points), torch.tensor(kept)).min(1).values.max())


def test_k_centre_on_a_toy_set() -> None:
    line = [[0.0], [1.0], [10.0], [11.0], [20.0], [20.5]]
    # by hand: of 0, 1 goes 1 (nearer to 10), of 10, 11 goes 11 (nearer to 20), of 20, 20.5 goes 20 (nearer to 10)
    assert kept_points(line, 3) == [[0.0], [10.0], [20.5]]
    assert kept_points([[0.0], [4.0], [5.0]], 2) == [[0.0], [5.0]]  # of 4 and 5, 4 has the nearer next neighbour


def test_each_step_of_k_centre_is_the_best_one() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        points = torch.randn(6, 2, generator=draw).tolist()
        choices = [radius(points, points[:i] + points[i + 1 :]) for i in range(6)]
        gone = one_of_closest(torch.tensor(points))
        assert choices[gone] == pytest.approx(min(choices), abs=1e-6)
        assert max(choices) > min(choices) + 1e-3  # negative control: it matters which one goes


def test_k_centre_covers_better_than_a_uniform_sample() -> None:
    draw = torch.Generator().manual_seed(1)
    crowd = 0.1 * torch.randn(60, 3, generator=draw)
    lonely = 3.0 * torch.randn(6, 3, generator=draw)
    points = torch.cat([crowd, lonely])[torch.randperm(66, generator=draw)].tolist()
    uniform = [radius(points, [points[i] for i in torch.randperm(66, generator=draw)[:8]]) for _ in range(50)]
    assert radius(points, kept_points(points, 8)) < 0.5 * min(uniform)


def test_k_centre_places_records_by_the_base_model() -> None:
    bench = Bench()
    experience, view = bench.encode(ask(3)), bench.view()
    first = KCentre().look_(experience, view, view.generator("x")).vector
    bench.move_()
    second = KCentre().look_(experience, bench.view(), view.generator("x")).vector
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    other = KCentre().look_(bench.encode(ask(4)), bench.view(), view.generator("x")).vector
    assert not torch.allclose(first, other)  # type: ignore[arg-type]


# --- balance -----------------------------------------------------------------------------------------------------


def test_every_class_has_as_many_records() -> None:
    trajectories = stream({"common": 300, "usual": 60, "rare": 12})
    order = torch.randperm(len(trajectories), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [trajectories[place] for place in order]
    for given in (trajectories, shuffled):
        kept = Counter(id.rstrip("0123456789") for id in offered(Buffer(Balanced(), budget=30), given, 0))
        assert kept == {"common": 10, "usual": 10, "rare": 10}
    plain = Counter(id.rstrip("0123456789") for id in offered(Buffer(Reservoir(), budget=30), shuffled, 0))
    assert plain["rare"] < 5  # negative control


def test_within_a_class_the_records_are_a_uniform_sample() -> None:
    counts: Counter[str] = Counter()
    for seed in range(400):
        counts.update(offered(Buffer(Balanced(), budget=6), stream({"a": 20, "b": 20}), seed))
    assert sum(counts.values()) == 400 * 6
    assert chi_square([counts[f"a{i}"] for i in range(20)]) > 0.01
    assert chi_square([counts[f"b{i}"] for i in range(20)]) > 0.01


def test_balance_needs_its_class() -> None:
    with pytest.raises(FeatclError, match=r"no meta\[\"class\"\]"):
        offered(Buffer(Balanced(by="class"), budget=2), stream({"a": 1}), 0)
    with pytest.raises(FeatclError, match="by 'colour'"):
        Balanced(by="colour")
    buffer = Buffer(Balanced(by="class"), budget=2)
    assert offered(buffer, [Trajectory("x", text="ab", meta={"class": "z"})], 0) == ["x"]
