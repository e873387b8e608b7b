"""The guard: when it looks, what it draws, what it does on an alarm, which versions are safe, what outlives what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.errors import FeatclError
from featcl.evaluation.pool import Pool
from featcl.learning.eprocess import EProcess
from featcl.learning.guard import CanaryGuard, GuardReading, Stopped
from featcl.streams import Trajectory
from featcl.streams.chat import Encoded

Make = Callable[..., Any]
FINE, BAD = 0.0, 0.5


class Scripted:
    """A pool whose losses at each look are written down; the last one goes on."""

    def __init__(self, *losses: float) -> None:
        self.script, self.drawn = list(losses), []

    def __len__(self) -> int:
        return 1000

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(1000, generator=generator)[:count]

    def losses(self, model: Any, chosen: torch.Tensor, *, answering: Any = None) -> torch.Tensor:
        self.drawn.append(tuple(chosen.tolist()))
        return torch.full((len(chosen),), self.script[min(len(self.drawn), len(self.script)) - 1])


def guarded(rig: Any, script: Sequence[float], *, learner: dict[str, Any] | None = None, **settings: Any) -> Any:
    guard = CanaryGuard(Scripted(*script), **{"every": 2, "items": 32, "tolerance": 0.02, **settings})  # type: ignore[arg-type]
    return rig.learner(guard=guard, **(learner or {}))


def observe(learner: Any, talk: Trajectory, count: int) -> list[Any]:
    return [learner.observe(replace(talk, id=f"talk-{learner.guard.updates}")) for _ in range(count)]


def coordinates(learner: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.adapter.coordinates().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_looks_every_so_often_and_draws_anew(rig: Make, talk: Trajectory) -> None:
    learner = guarded(rig(), [FINE], every=3)
    stats = observe(learner, talk, 9)
    looked = [index for index, one in enumerate(stats, 1) if "guard/wealth" in one.measures]
    assert looked == [3, 6, 9]
    draws = learner.guard.pool.drawn
    assert len(draws) == len(set(draws)) == 3
    assert all(len(set(draw)) == 32 for draw in draws)
    assert {one.alarm for one in stats} == {None}
    other = guarded(rig(), [FINE], every=3)
    observe(other, talk, 3)
    assert other.guard.pool.drawn == draws[:1]  # the same seed, the same look
    another = guarded(rig(), [FINE], every=3, seed=1)
    observe(another, talk, 3)
    assert another.guard.pool.drawn != draws[:1]


def test_an_alarm_returns_to_the_newest_safe_version_exactly(rig: Make, talk: Trajectory) -> None:
    """Looks at versions 2, 4, … 20: fine up to 12, bad from 14 on."""
    learner = guarded(rig(), [FINE] * 6 + [BAD])
    observe(learner, talk, 12)
    safe = coordinates(learner)
    moments = {name: tensor.clone() for name, tensor in learner._snapshot().moments.items()}
    stats = observe(learner, talk, 2)[-1]
    assert stats.alarm is not None
    assert "rolled back from version 14 to 12" in stats.alarm
    assert (stats.version, learner.version) == (14, 12)
    assert equal(coordinates(learner), safe)
    assert equal(learner._snapshot().moments, moments)
    assert stats.measures["guard/alarms"] == 1
    assert learner.guard.threshold == pytest.approx(4 / 0.05)


def test_without_a_guard_the_same_stream_is_not_taken_back(rig: Make, talk: Trajectory) -> None:
    learner, free = guarded(rig(), [FINE] * 6 + [BAD]), rig().learner()
    observe(learner, talk, 14)
    for index in range(14):
        free.observe(replace(talk, id=f"talk-{index}"))
    assert free.version == 14
    assert not equal(coordinates(free), coordinates(learner))


def test_an_old_safe_version_outlives_the_last_few(rig: Make, talk: Trajectory) -> None:
    """A loss so small that it takes many looks: the version before it is older than what is kept otherwise."""
    learner = guarded(rig(), [FINE] * 3 + [0.03], items=16, every=4)
    stats = observe(learner, talk, 12)
    safe = coordinates(learner)
    while stats[-1].alarm is None and len(stats) < 120:
        stats += observe(learner, talk, 4)
    assert stats[-1].alarm is not None
    assert stats[-1].version - 12 > 8  # KEPT_VERSIONS
    assert learner.version == 12
    assert equal(coordinates(learner), safe)


def test_an_alarm_that_comes_again_goes_further_back_and_at_last_to_the_start(rig: Make, talk: Trajectory) -> None:
    learner = guarded(rig(), [FINE] * 4 + [BAD])
    start = coordinates(learner)
    observe(learner, talk, 8)
    assert learner.guard.safe_versions == (0, 4, 6, 8)
    went_to = []
    while len(went_to) < 5:
        stats = observe(learner, talk, 1)[-1]
        went_to += [learner.version] if stats.alarm else []
    assert went_to == [8, 6, 4, 0, 0]
    assert equal(coordinates(learner), start)
    assert learner.guard.alarms == 5


def test_kept_safe_versions_have_growing_ages(rig: Make, talk: Trajectory) -> None:
    learner = guarded(rig(), [FINE], every=1)
    observe(learner, talk, 40)
    ages = [40 - version for version in learner.guard.safe_versions]
    assert (ages[0], ages[-1], len(ages)) == (40, 0, 4)
    assert 1 <= ages[2] <= 8 < ages[1] < 40
    assert set(learner.guard.safe_versions) <= set(learner.versions)


def test_what_was_seen_outlives_a_rollback(rig: Make, talk: Trajectory) -> None:
    """Rolling back by hand takes back what was learned, but neither draws nor wealth nor alarms."""
    learner = guarded(rig(), [FINE, FINE, 0.03], items=8)
    observe(learner, talk, 6)
    wealth, draws = float(learner.guard.test.wealth), list(learner.guard.pool.drawn)
    learner.rollback(3)
    assert float(learner.guard.test.wealth) == wealth
    assert learner.guard.safe_versions == (0, 2, 4)
    assert float(learner.guard.test.evidence) > 1.0
    observe(learner, talk, 2)
    assert learner.guard.safe_versions == (0, 2)  # 4 was taken back
    assert learner.guard.pool.drawn[-1] not in draws
    assert learner.guard.looks == 4


def test_stop_leaves_a_whole_learner_and_tells_what_it_measured(rig: Make, talk: Trajectory) -> None:
    learner = guarded(rig(), [FINE, BAD], action="stop")
    observe(learner, talk, 3)
    with pytest.raises(Stopped, match="stopped at version 4, the newest safe version is 2") as caught:
        observe(learner, talk, 1)
    stats = caught.value.stats
    assert stats is not None
    assert (stats.version, stats.alarm, learner.version) == (4, str(caught.value), 4)
    assert stats.measures["guard/alarms"] == 1
    assert learner.versions[-1] == 4
    learner.rollback(2)
    assert learner.version == 2
    assert observe(learner, talk, 1)[0].version == 3


def test_shrink_halves_what_an_update_may_move(rig: Make, talk: Trajectory) -> None:
    learner = guarded(rig(), [BAD], action="shrink", learner={"lr": 3e-2})
    first = observe(learner, talk, 2)
    mean = (first[0].kl + first[1].kl) / 2
    assert first[1].alarm is not None
    assert learner.guard.max_kl == pytest.approx(mean / 2)
    learner.reconfigure(max_kl_per_update=10.0)  # as a phase does: the guard's own limit stays
    assert learner.max_kl() == learner.guard.max_kl
    scales, limit, alarms = [], learner.guard.max_kl, 1
    for _ in range(24):
        stats = observe(learner, talk, 1)[0]
        assert stats.kl <= limit
        scales.append(stats.step_scale)
        alarms += stats.alarm is not None
        limit = learner.guard.max_kl
    assert min(scales) < 1.0
    assert limit == pytest.approx(mean / 2**alarms)
    assert alarms >= 4
    free = rig().learner(lr=3e-2)
    assert max(free.observe(replace(talk, id=f"talk-{index}")).kl for index in range(24)) > limit


def test_a_saved_learner_goes_on_with_its_wealth_and_its_safe_versions(
    rig: Make, talk: Trajectory, tmp_path: Path
) -> None:
    """Saved between the loss and the alarm; the version it returns to is older than the save."""
    script = [FINE] * 3 + [0.04]
    whole = guarded(rig(), script, items=16)
    stats = observe(whole, talk, 40)
    alarm = next(index for index, one in enumerate(stats) if one.alarm)
    assert alarm > 8
    half = guarded(rig(), script, items=16)
    observe(half, talk, alarm - 1)
    half.save(tmp_path)
    resumed = guarded(rig(), script, items=16)
    resumed.guard.pool.drawn = list(half.guard.pool.drawn)
    resumed.restore_(tmp_path)
    rest = observe(resumed, talk, 40 - (alarm - 1))
    for one, other in zip(rest, stats[alarm - 1 :], strict=True):
        assert (one.alarm, one.version, one.kl) == (other.alarm, other.version, other.kl)
        assert one.measures == other.measures
    assert equal(coordinates(resumed), coordinates(whole))
    assert resumed.guard.state() == whole.guard.state()
    fresh = guarded(rig(), script, items=16)  # control: without its state the guard draws and bets otherwise
    assert fresh.guard.state() != half.guard.state()


def test_a_change_of_directions_begins_anew(rig: Make, talk: Trajectory) -> None:
    from featcl.features import Directions

    own = rig()
    learner = guarded(own, [FINE] * 3 + [BAD])
    observe(learner, talk, 4)
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
    learner.change_directions(Directions.from_vectors(vectors, layer=1))
    changed = coordinates(learner)
    observe(learner, talk, 2)
    assert learner.guard.safe_versions == (5, 7)
    observe(learner, talk, 2)
    assert learner.version == 7
    observe(learner, talk, 2)
    assert learner.version == 5
    assert equal(coordinates(learner), changed)


def test_after_consolidation_the_guard_goes_back_no_further(rig: Make, talk: Trajectory) -> None:
    own = rig()
    learner = guarded(own, [FINE] * 3 + [BAD])
    observe(learner, talk, 4)
    assert learner.guard.safe_versions
    learner.consolidate()
    consolidated = coordinates(learner)
    observe(learner, talk, 2)
    assert learner.guard.safe_versions == (5, 7)
    observe(learner, talk, 4)
    assert learner.version == 5
    assert equal(coordinates(learner), consolidated)


def test_a_real_pool_sees_what_a_wild_learner_destroys_and_a_quiet_one_does_not(rig: Make, talk: Trajectory) -> None:
    """Pool: what the base model would say after six bytes; tolerance two points."""

    def run(lr: float) -> tuple[Any, list[Any]]:
        own = rig()
        prompts = torch.randint(0, 256, (1000, 6), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            said = own.adapter.model(prompts).logits[:, -1].argmax(-1)
        sequences = [
            Encoded((*ids, last), (False,) * 6 + (True,))
            for ids, last in zip(prompts.tolist(), said.tolist(), strict=True)
        ]
        guard = CanaryGuard(Pool(own.adapter.model, sequences, measure="tokens"), every=2, items=64, tolerance=0.02)
        learner = own.learner(guard=guard, lr=lr)
        return learner, observe(learner, talk, 30)

    wild, stats = run(0.3)
    assert any(one.alarm for one in stats)
    assert wild.version < 30
    quiet, stats = run(1e-4)
    assert not any(one.alarm for one in stats)
    assert quiet.version == 30


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": 0.0}, "alpha 0.0"),
        ({"every": 0}, "every 0"),
        ({"items": 1001}, "items at most 1000"),
        ({"action": "pray"}, "action 'pray'"),
        ({"tolerance": 0.0}, "tolerance 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(FeatclError, match=message):
        CanaryGuard(Scripted(FINE), **setting)  # type: ignore[arg-type]


def test_a_reading_is_added_to_the_stats_of_its_update(rig: Make, talk: Trajectory) -> None:
    stats = rig().learner().observe(talk)
    added = GuardReading({"guard/wealth": 2.0}, "alarm").added_to(stats)
    assert (added.measures["guard/wealth"], added.alarm, added.loss) == (2.0, "alarm", stats.loss)
    assert added.record()["alarm"] == "alarm"
    assert float(EProcess.start(0.02).wealth) == 1.0
