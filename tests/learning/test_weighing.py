"""What each signal measures and does, that they can be switched, and what quarantine leaves untouched."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from featcl.errors import FeatclError
from featcl.learning import Learner
from featcl.learning.full_gradient import energy_share, full_gradient, span_of
from featcl.learning.optimizers import moments
from featcl.learning.running import KNOWN, Usual
from featcl.learning.weighing import SIGNALS, SignalWeigher, check_priors, trust
from featcl.streams import Trajectory

Make = Callable[..., Any]


def weighed(learner: Learner, trajectory: Trajectory) -> Any:
    experience, _ = learner._experience(trajectory)
    return learner.weigher.weigh(experience, learner.student, learner.terms)  # type: ignore[union-attr]


def coordinates(learner: Learner) -> dict[str, torch.Tensor]:
    return {**learner.adapter.coordinates(), **moments(learner.optimizer)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what is usual ---------------------------------------------------------------------------------------------------


def test_centre_and_spread_are_those_of_the_last_values() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, robust = Usual(25), Usual(25, robust=True)
    for value in values.tolist():
        plain.update_(value)
        robust.update_(value)
    last = values[-25:]
    assert plain.centre == plain.mean == pytest.approx(last.mean().item())
    assert plain.spread == pytest.approx(last.std(unbiased=False).item())
    assert robust.centre == pytest.approx(last.median().item())
    assert robust.spread == pytest.approx(1.4826 * (last - last.median()).abs().median().item())


def test_nothing_is_far_off_before_enough_is_known() -> None:
    usual = Usual(16, floor=0.1)
    assert usual.mean is None
    for number in range(KNOWN):
        assert usual.z(100.0) == 0.0, f"{number} values are known"
        usual.update_(1.0)
    assert usual.z(1.5) == pytest.approx(0.5 / 0.1)


def test_a_burst_cannot_hide_the_next() -> None:
    """Outliers move neither median nor its deviation; a mean and its deviation they do."""
    robust, plain = (Usual(16, floor=0.1, robust=each) for each in (True, False))
    for number in range(16):
        for usual in (robust, plain):
            usual.update_(50.0 if number in (9, 13, 15) else 1.0 + 0.1 * (-1) ** number)
    assert robust.z(50.0) > 100
    assert plain.z(50.0) < 3, "the control"
    for _ in range(9):
        robust.update_(50.0)
    assert robust.z(50.0) < 1, "what is more than half of the window is usual"


def test_what_is_usual_comes_back_from_json() -> None:
    usual, again = Usual(3), Usual(3)
    for value in (0.1, 0.7, 1e-9, 3.3):
        usual.update_(value)
    again.load_state_(json.loads(json.dumps(usual.state())))
    assert again.state() == usual.state() == {"values": [0.7, 1e-9, 3.3]}


def test_trust_is_one_up_to_the_margin_and_then_falls() -> None:
    assert trust(-5.0) == trust(0.0) == trust(2.0, 2.0) == 1.0
    assert [round(trust(2.0 + z, 2.0), 2) for z in (1, 2, 3, 4)] == [0.54, 0.24, 0.09, 0.04]
    assert trust(1e9) < 1e-300


# --- the signals -----------------------------------------------------------------------------------------------------


def test_surprise_is_the_students_own_likelihood_against_its_mean(rig: Make, talk: Trajectory) -> None:
    learner = rig("gemma2").learner(weigher=SignalWeigher(["surprise"]))
    encoded = learner.student.chat.encode(talk.messages)
    ids, mask = torch.tensor([encoded.input_ids]), torch.tensor(encoded.loss_mask)[1:]
    for number in range(KNOWN):
        with torch.no_grad():
            expected = F.cross_entropy(learner.adapter.model(ids).logits[0, :-1][mask], ids[0, 1:][mask]).item()
        stats = learner.observe(replace(talk, id=str(number)))
        assert stats.measures["weight/nll"] == pytest.approx(expected, rel=1e-5)
        assert stats.measures["weight/surprise"] == stats.weight == 1.0
    usual = learner.weigher._usual["surprise"]  # type: ignore[union-attr]
    usual.load_state_({"values": [4.0 + 0.5 * (-1) ** number for number in range(16)]})
    found = weighed(learner, Trajectory("x", text="\x00\x01\x02 zqxj"))
    z = (found.signals["weight/nll"] - usual.centre) / (1.4826 * 0.5)
    assert z > 2
    assert found.value == found.signals["weight/surprise"] == pytest.approx(trust(z, 2.0))
    assert found.value < 0.7


def test_a_reward_below_the_usual_lowers_the_weight(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(weigher=SignalWeigher(["reward"]))
    for number in range(10):
        learner.observe(replace(talk, id=str(number), reward=0.8 + 0.1 * (number % 2)))
    assert weighed(learner, replace(talk, reward=0.9)).value == 1.0
    assert weighed(learner, replace(talk, reward=0.0)).value < 0.01
    assert weighed(learner, talk).value == 1.0, "no reward says nothing"
    assert weighed(learner, replace(talk, feedback="wrong")).value == 1.0, "text says nothing without a judge"


def test_a_judge_reads_feedback_as_a_reward(rig: Make, talk: Trajectory) -> None:
    judge = lambda text: 0.0 if "wrong" in text else 1.0  # noqa: E731
    learner = rig().learner(weigher=SignalWeigher(["reward"], judge=judge))
    for number in range(10):
        learner.observe(replace(talk, id=str(number), feedback="good"))
    assert weighed(learner, replace(talk, feedback="wrong")).value < 0.01
    assert weighed(learner, replace(talk, feedback="wrong", reward=1.0)).value == 1.0, "a number goes first"


def test_agreement_is_what_the_teacher_thinks_of_it(rig: Make, tiny: Make, talk: Trajectory) -> None:
    """The teacher's likelihood; where there is no teacher, that of the model with its adapter off."""
    teacher, _ = tiny("olmo2", n_layers=2, seed=7)
    learner = rig().learner(weigher=SignalWeigher(["agreement"]), teacher=teacher)
    alone = rig().learner(weigher=SignalWeigher(["agreement"]))
    base, _ = tiny("olmo2", n_layers=2)
    encoded = learner.student.chat.encode(talk.messages)
    ids, mask = torch.tensor([encoded.input_ids]), torch.tensor(encoded.loss_mask)[1:]
    for subject, model in ((learner, teacher), (alone, base)):
        for number in range(2):  # what was learned does not change it
            stats = subject.observe(replace(talk, id=str(number)))
            with torch.no_grad():
                expected = F.cross_entropy(model(ids).logits[0, :-1][mask], ids[0, 1:][mask]).item()
            assert stats.measures["weight/teacher_nll"] == pytest.approx(expected, rel=1e-5)


def test_energy_is_the_share_of_the_full_gradient_against_chance(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(weigher=SignalWeigher(["energy"]))
    experience, _ = learner._experience(talk)
    span = span_of(learner.adapter)
    share = energy_share(full_gradient(learner.terms, experience, learner.student), span)
    found = weighed(learner, talk)
    assert found.signals["weight/log_energy_ratio"] == pytest.approx(math.log(share / (4 / 32)), rel=1e-4)


def test_a_gradient_of_zero_has_no_share_and_stops_nothing(rig: Make, talk: Trajectory) -> None:
    """A first reward of 0 has no advantage, so there is nothing to learn and nothing to weigh."""
    policy = {"name": "policy", "kl_weight": 0.0}
    learner = rig().learner(objective=policy, weigher=SignalWeigher(["energy"]))
    stats = learner.observe(replace(talk, reward=0.0))
    assert (stats.grad_norm, stats.weight) == (0.0, 1.0)
    assert "weight/log_energy_ratio" not in stats.measures
    assert "weight/log_energy_ratio" in learner.observe(replace(talk, id="t2", reward=1.0)).measures, "the control"


def test_priors_and_the_users_function_multiply(rig: Make, talk: Trajectory) -> None:
    weigher = SignalWeigher(["prior", "custom"], priors={"home": 0.5}, custom=lambda trajectory: 0.3)
    learner = rig().learner(weigher=weigher)
    stats = learner.observe(talk)
    assert stats.weight == pytest.approx(0.15)
    assert stats.measures["weight/prior"] == 0.5
    assert stats.record()["weight"] == pytest.approx(0.15)
    assert weighed(learner, replace(talk, source="elsewhere")).value == pytest.approx(0.3)


def test_the_weight_multiplies_the_gradient(rig: Make, talk: Trajectory) -> None:
    moves = []
    for weigher in (None, lambda trajectory: 0.25):
        learner = rig().learner(weigher=weigher, optimizer="sgd", lr=0.1)
        stats = learner.observe(talk)
        moves.append(torch.cat([value.flatten() for value in learner.adapter.coordinates().values()]))
        assert stats.weight == (1.0 if weigher is None else 0.25)
    torch.testing.assert_close(moves[1], 0.25 * moves[0], rtol=1e-4, atol=1e-8)
    assert float(moves[0].norm()) > 0


GIVEN = ("custom", "memory")  # signals that need a function or a memory


@pytest.mark.parametrize("signal", [signal for signal in SIGNALS if signal not in GIVEN])
def test_each_signal_can_be_switched_off(rig: Make, talk: Trajectory, signal: str) -> None:
    others = [other for other in SIGNALS if other not in (signal, *GIVEN)]
    learner = rig().learner(weigher=SignalWeigher(others))
    stats = learner.observe(replace(talk, reward=1.0))
    assert f"weight/{signal}" not in stats.measures
    assert {f"weight/{other}" for other in others} <= stats.measures.keys()


# --- quarantine ------------------------------------------------------------------------------------------------------


def test_quarantine_learns_nothing_and_says_why(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(weigher=SignalWeigher(["prior"], priors={"spam": 0.05}, quarantine_below=0.1))
    learner.observe(talk)
    before = coordinates(learner)
    stats = learner.observe(replace(talk, id="bad", source="spam"))
    assert stats.quarantined == "weight 0.05, lowest signal: prior 0.05"
    assert (stats.version, stats.tokens, stats.kl, learner.version) == (1, 0, 0.0, 1)
    assert same(coordinates(learner), before)
    record = stats.record()
    assert record["quarantined"] == stats.quarantined
    assert "train/loss" not in record
    assert json.dumps(record, allow_nan=False)
    assert stats.delta_norm == pytest.approx(learner.adapter.delta_norm())
    assert learner.observe(talk).version == 2


def test_a_weight_of_zero_is_always_quarantined(rig: Make, talk: Trajectory) -> None:
    """A zero gradient would still move AdamW by its momentum."""
    learner = rig().learner(weigher=lambda trajectory: 0.0 if trajectory.id == "bad" else 1.0)
    learner.observe(talk)
    before = coordinates(learner)
    assert learner.observe(replace(talk, id="bad")).quarantined
    assert same(coordinates(learner), before)


@pytest.fixture
def nll_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The student finds `good…` about 2 ± 0.2 nats per token, all else 6."""

    def scripted(experience: Any, student: Any) -> float:
        name = experience.trajectory.id
        noise = torch.randn((), generator=torch.Generator().manual_seed(len(name) + sum(map(ord, name)))).item()
        return (2.0 if name.startswith("good") else 6.0) + 0.2 * noise

    monkeypatch.setattr("featcl.learning.weighing.student_nll", scripted)


@pytest.mark.usefixtures("nll_by_id")
def test_what_was_quarantined_becomes_usual_in_time(rig: Make, talk: Trajectory) -> None:
    """A new task is not shut out for ever: what is quarantined enters the running mean too."""
    learner = rig(kind="shift").learner(weigher=SignalWeigher(["surprise"], quarantine_below=0.1))
    for number in range(20):
        assert learner.observe(replace(talk, id=f"good-{number}")).quarantined is None
    fates = [learner.observe(replace(talk, id=f"new-{number}")).quarantined for number in range(30)]
    assert fates[0] is not None
    assert re.search(r"lowest signal: surprise \S+ \(nll [56]\.\d+, usually (1\.9|2)\S* ± 0\.\d+\)", fates[0])
    shut_out = sum(fate is not None for fate in fates)
    assert 2 <= shut_out <= 9, "half a window, and one"
    assert fates[shut_out:] == [None] * (30 - shut_out)


@pytest.mark.usefixtures("nll_by_id")
def test_garbage_is_told_from_what_is_learned(rig: Make, talk: Trajectory) -> None:
    """One in ten is garbage: it is quarantined, the rest is not, and is learned as if there had been no garbage."""
    names = [f"good-{n}" if n % 10 != 9 else f"bad-{n}" for n in range(60)]
    guarded = rig().learner(weigher=SignalWeigher(["surprise"], quarantine_below=0.3))
    loose = rig().learner(weigher=SignalWeigher(["prior"], quarantine_below=0.3))
    clean = rig().learner()
    fates = {name: guarded.observe(replace(talk, id=name)).quarantined for name in names}
    for name in names:
        loose.observe(replace(talk, id=name))
        if name.startswith("good"):
            clean.observe(replace(talk, id=name))
    assert [name for name, reason in fates.items() if reason] == [name for name in names if name.startswith("bad")]
    found, expected, control = (torch.cat([value.flatten() for value in each.adapter.coordinates().values()])
                                for each in (guarded, clean, loose))  # fmt: skip
    assert guarded.version == clean.version
    assert float((found - expected).norm() / expected.norm()) < 0.02, "weights just below 1 are all the difference"
    assert float((control - expected).norm() / expected.norm()) > 0.04, "the control: it learned from the garbage"


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nll_by_id")
def test_weighing_goes_on_after_a_save_and_a_rollback(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    def fresh() -> Learner:
        return rig().learner(weigher=SignalWeigher(["surprise", "reward"], quarantine_below=0.2))

    stream = [replace(talk, id=f"{'bad' if n == 10 else 'good'}-{n}", reward=float(n % 3 != 0)) for n in range(14)]
    whole, first, second = fresh(), fresh(), fresh()
    expected = [replace(whole.observe(t), seconds=0.0) for t in stream]
    assert any(stats.quarantined for stats in expected)
    for t in stream[:11]:
        first.observe(t)
    first.save(tmp_path)
    second.restore_(tmp_path)
    assert [replace(second.observe(t), seconds=0.0) for t in stream[11:]] == expected[11:]
    state = whole.weigher.state()  # type: ignore[union-attr]
    version = whole.version
    whole.observe(replace(talk, id="good-more", reward=1.0))
    whole.rollback(version)
    assert whole.weigher.state() == state  # type: ignore[union-attr]


def test_weighing_changes_nothing_until_the_experience_is_learned(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(weigher=SignalWeigher(["surprise"]))
    learner.observe(talk)
    state, before = learner.weigher.state(), coordinates(learner)  # type: ignore[union-attr]
    weighed(learner, replace(talk, id="x"))
    assert learner.weigher.state() == state  # type: ignore[union-attr]
    assert same(coordinates(learner), before)


def test_what_makes_no_sense_is_refused(rig: Make, talk: Trajectory) -> None:
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: SignalWeigher(["suprise"]), "unknown signal 'suprise'"),
        (lambda: SignalWeigher([]), "no signal"),
        (lambda: SignalWeigher(["custom"]), "belong together"),
        (lambda: SignalWeigher(["reward"], priors={"a": 1.0}), "prior is not among"),
        (lambda: SignalWeigher(["prior"], priors={"a": -1.0}), "prior of source 'a'"),
        (lambda: SignalWeigher(quarantine_below=1.0), "quarantine_below"),
        (lambda: rig().learner(weigher=3), "weigher must be a function"),
    ]
    for make, match in cases:
        with pytest.raises(FeatclError, match=match):
            make()
    learner = rig().learner(weigher=lambda trajectory: float("nan"))
    before = coordinates(learner)
    with pytest.raises(FeatclError, match="custom weight must be a finite number"):
        learner.observe(talk)
    assert same(coordinates(learner), before)


def test_a_prior_of_a_source_that_is_none_is_refused() -> None:
    sources = ("home", "code")
    for known in ({"home": 0.5}, {}, {"home": 0.1, "code": 2.0, "chat": 0.5}):
        assert check_priors(known, sources) is None
    words = r"no trajectory comes from 'hoem', .* nothing; did you mean 'home'\? the sources are code, home"
    with pytest.raises(FeatclError, match=rf"weighing\.priors: {words}$"):
        check_priors({"home": 0.5, "hoem": 0.5}, sources)
    note = check_priors({"hoem": 0.5}, sources, complete=False)
    assert note is not None
    assert re.search(rf"{words}, as far as is known$", note)
    assert "the sources are not known" in str(check_priors({"x": 1.0}, ()))
