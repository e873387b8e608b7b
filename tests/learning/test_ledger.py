"""The ledger: what was appended comes back bit for bit; a change to it is found; blame sums up; revert subtracts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from featcl.adapters import constrain
from featcl.adapters.feature_map import FeatureKey, FeatureMap
from featcl.errors import FeatclError
from featcl.features import Directions
from featcl.learning import Learner
from featcl.learning.blame import blame_feature, blame_measure, feature_keys
from featcl.learning.deltas import layout_of, pack, same, unpack
from featcl.learning.history import History
from featcl.learning.ledger import EVERY, FRAMES, LINES, RunLedger
from featcl.learning.revert import Reverts, distance, distances
from featcl.streams import Trajectory
from featcl.studies.ledger import log_run

Make = Callable[..., Any]
KINDS = ("write", "read", "both", "residual", "shift", "scale", "none")


def learned(rig: Make, talk: Trajectory, folder: Path, updates: int = 5, **options: Any) -> tuple[Any, Any]:
    """A learner with a ledger after some updates, and the coordinates of every version."""
    made = rig(**{"kind": "both", **options})
    learner = made.learner(ledger=RunLedger(folder, made.adapter, clock=lambda: 1e9))
    versions = [made.adapter.coordinates()]
    for number in range(updates):
        learner.observe(_other(talk, number))
        versions.append(made.adapter.coordinates())
    return learner, versions


def _other(talk: Trajectory, number: int) -> Trajectory:
    messages = (*talk.messages[:-1], {"role": "assistant", "content": f"hello {number * 7 % 10}"})
    return replace(talk, id=f"talk-{number}", messages=messages)


# --- frames


def test_frames_are_exact_and_small() -> None:
    generator = torch.Generator().manual_seed(0)
    before = {"b": torch.randn(40, 64, generator=generator), "a": torch.zeros(7)}
    step = 1e-3 * torch.randn(40, 64, generator=generator)
    after = {"b": before["b"] + step, "a": torch.tensor([0.0, -0.0, math.inf, math.nan, 1e-45, -1e-38, 3.0])}
    layout = layout_of(after)
    alone, difference = pack(after), pack(after, before)
    for frame, base in ((alone, None), (difference, before)):
        found = unpack(frame, layout, base)
        assert all(torch.equal(found[n].view(torch.int32), after[n].view(torch.int32)) for n in after)
    plain = sum(tensor.numel() * 4 for tensor in after.values())
    assert len(difference) < 0.85 * plain < len(alone), "a small update is smaller than what it changes"
    with pytest.raises(FeatclError, match="does not fit its layout"):
        unpack(difference, layout[:1], before)


def test_sums_of_floats_would_not_be_exact() -> None:
    """The control: before + (after - before) is another number."""
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 1000, generator=generator)
    assert not torch.equal(before + (after - before), after)


# --- what comes back


@pytest.mark.parametrize("kind", KINDS)
def test_every_version_comes_back(rig: Make, talk: Trajectory, tmp_path: Path, kind: str) -> None:
    learner, versions = learned(rig, talk, tmp_path, kind=kind)
    history = History(tmp_path)
    assert history.head == learner.version == 5
    for number, coordinates in enumerate(versions):
        assert same(history.coordinates(number), coordinates)
    moves = list(history.moves())
    assert [move.record["trajectories"] for move in moves] == [[f"talk-{n}"] for n in range(5)]
    assert all(same(m.before, b) and same(m.after, a) for m, b, a in zip(moves, versions, versions[1:], strict=False))
    record = history.record(3)
    assert record["when"] == 1e9
    assert record["objective"] == "sft"
    assert record["kl"] > 0
    assert record["moved"] == pytest.approx(distance(versions[2], versions[3]), rel=1e-5)
    assert len(record["top"]) == 3


def test_the_map_says_what_the_report_says(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    for kind, constraint in (
        ("both", {}),
        ("both", {"rank": 2}),
        ("none", {}),
        ("write", {"training": "train_both_factors"}),
    ):
        made = rig(kind=kind, constraint=constraint)
        made.learner().observe(talk)
        made.adapter.request  # noqa: B018 (it is a LoRA)
        meaning = FeatureMap.of(made.adapter)
        meaning.save(tmp_path / "map.safetensors")
        found = FeatureMap.load(tmp_path / "map.safetensors").vectors(made.adapter.coordinates())
        rows = made.adapter.report(100).rows
        assert len(rows) == len(found)
        for row in rows:
            strength = float(found[FeatureKey(1, row.feature, row.role)].norm())
            assert strength == pytest.approx(row.strength, rel=1e-4), (kind, constraint)


def test_the_map_of_hooks_says_what_the_report_says(rig: Make, talk: Trajectory) -> None:
    for kind in ("residual", "shift", "scale"):
        made = rig(kind=kind)
        made.learner().observe(talk)
        found = FeatureMap.of(made.adapter).vectors(made.adapter.coordinates())
        written: dict[int, float] = {}
        for link in made.adapter.report(1000).rows:
            written[link.writes] = written.get(link.writes, 0.0) + link.strength**2
        for feature, square in written.items():
            assert float(found[FeatureKey(1, feature, "write")].norm()) == pytest.approx(square**0.5, rel=1e-4)


def test_long_ledgers_have_frames_that_stand_alone(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    _, versions = learned(rig, talk, tmp_path, updates=EVERY + 3, kind="shift")
    history = History(tmp_path)
    assert [r["version"] for r in history.records if r["kind"] == "start"] == [0, EVERY]
    for number in (1, EVERY, EVERY + 1, EVERY + 3):
        assert same(history.coordinates(number), versions[number])


def test_it_is_compact(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    """Coordinates only: less than the trained numbers themselves per version, all provenance included."""
    _, versions = learned(rig, talk, tmp_path, updates=20)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    plain = sum(tensor.numel() * 4 for tensor in versions[0].values())
    assert size < 21 * plain + 60_000
    assert (tmp_path / FRAMES).stat().st_size < 19 * plain


# --- rolled back, continued, cut back, damaged


def test_what_was_rolled_back_is_off_the_line(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learner, versions = learned(rig, talk, tmp_path)
    learner.rollback(2)
    assert History(tmp_path).head == 2
    learner.observe(_other(talk, 9))
    history = History(tmp_path)
    assert [r["trajectories"][0] for r in history.versions] == ["talk-0", "talk-1", "talk-9"]
    assert same(history.coordinates(2), versions[2])
    assert same(history.coordinates(3), learner.adapter.coordinates())
    with pytest.raises(FeatclError, match=r"no version v5, it was rolled back; there are v1 to v3"):
        history.coordinates(5)


def test_cut_back_and_continued_is_the_same_ledger(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    _, versions = learned(rig, talk, tmp_path / "whole")
    made = rig()
    ledger = RunLedger(tmp_path / "cut", made.adapter, clock=lambda: 1e9)
    learner = made.learner(ledger=ledger)
    for number in range(2):
        learner.observe(_other(talk, number))
    position = ledger.position()
    learner.save(tmp_path / "state")
    for number in range(2, 4):
        learner.observe(_other(talk, number))
    ledger.close()

    again = rig()
    ledger = RunLedger(tmp_path / "cut", again.adapter, clock=lambda: 1e9)
    ledger.cut_back_(position)
    learner = again.learner(ledger=ledger)
    learner.restore_(tmp_path / "state")
    for number in range(2, 5):
        learner.observe(_other(talk, number))
    history = History(tmp_path / "cut")
    for number in range(6):
        assert same(history.coordinates(number), versions[number])
    (tmp_path / "cut" / FRAMES).write_bytes(b"")
    with pytest.raises(FeatclError, match=r"deltas\.bin: 0 bytes, but the checkpoint counts on"):
        ledger.cut_back_(position)


def test_a_torn_end_is_cut_off(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    _, versions = learned(rig, talk, tmp_path)
    lines = tmp_path / LINES
    lines.write_bytes(lines.read_bytes()[:-20])
    history = History(tmp_path)
    assert history.torn is not None
    assert "line 6 is cut off" in history.torn
    assert history.head == 4
    made = rig()
    made.adapter.load_coordinates_(versions[4])
    ledger = RunLedger(tmp_path, made.adapter)
    assert ledger.head == 4
    assert History(tmp_path).torn is None, "taken off when it is continued"


def test_changes_are_found(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learned(rig, talk, tmp_path)
    path, frames = tmp_path / LINES, tmp_path / FRAMES
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for damaged in (
        whole.replace("talk-2", "talk-3"),
        "".join([*lines[:2], *lines[3:]]),
        "".join([lines[0], lines[2], lines[1], *lines[3:]]),
    ):
        path.write_text(damaged)
        with pytest.raises(FeatclError, match=r"ledger\.jsonl:\d: this line was changed, or one before it is missing"):
            History(tmp_path)
    path.write_text(whole)
    assert History(tmp_path).head == 5, "negative control"
    data = bytearray(frames.read_bytes())
    data[len(data) // 2] ^= 1
    frames.write_bytes(bytes(data))
    with pytest.raises(FeatclError, match=r"the frame of v\d at byte \d+ was damaged"):
        list(History(tmp_path).moves())


@pytest.mark.parametrize("full", ["_frames", "_lines"])
def test_a_full_disk_leaves_the_ledger_whole(
    rig: Make, talk: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    learner, _ = learned(rig, talk, tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / LINES, tmp_path / FRAMES)}

    class Full:
        """A file on a disk that takes ten more bytes."""

        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 10

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if not self.left:
                raise OSError(28, "No space left on device")
            self.left = 0
            return self.file.write(data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(learner.ledger, full, Full(getattr(learner.ledger, full)))
        with pytest.raises(OSError, match="No space left"):
            learner.observe(_other(talk, 8))
    assert {path.name: path.read_bytes() for path in (tmp_path / LINES, tmp_path / FRAMES)} == before
    learner.observe(_other(talk, 8))
    assert same(History(tmp_path).coordinates(6), learner.adapter.coordinates())


@pytest.mark.parametrize("lost", ["frames", "lines"])
def test_what_a_power_cut_damages_after_a_checkpoint_is_cut_off(
    rig: Make, talk: Trajectory, tmp_path: Path, lost: str
) -> None:
    """Only what a checkpoint counts on was forced onto the disk; of the rest, any part may be missing."""
    learner, _ = learned(rig, talk, tmp_path)
    assert isinstance(learner.ledger, RunLedger)
    position = learner.ledger.position()
    learner.save(tmp_path / "state")
    for number in range(5, 7):
        learner.observe(_other(talk, number))
    learner.ledger.close()
    path = tmp_path / (FRAMES if lost == "frames" else LINES)
    size, whole = position[path.name], path.read_bytes()
    path.write_bytes(whole[:size] if lost == "frames" else whole[:size] + b"\0\0\0\n" + whole[size + 4 :])
    made = rig()
    with pytest.raises(FeatclError, match=r"shorter than|was changed"):
        RunLedger(tmp_path, made.adapter).note("x", 1)
    ledger = RunLedger(tmp_path, made.adapter, clock=lambda: 1e9)
    ledger.cut_back_(position)
    again = made.learner(ledger=ledger)
    again.restore_(tmp_path / "state")
    for number in range(5, 7):
        again.observe(_other(talk, number))
    ledger.close()
    history = History(tmp_path)
    assert same(history.coordinates(7), learner.adapter.coordinates())
    assert [record["version"] for record in history.versions] == list(range(1, 8))
    lines = tmp_path / LINES
    lines.write_text(lines.read_text().replace("talk-2", "talk-3"))
    with pytest.raises(FeatclError, match="was changed"):
        RunLedger(tmp_path, made.adapter).cut_back_(position)


def test_a_checkpoint_of_another_ledger_is_refused(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learner, _ = learned(rig, talk, tmp_path / "one", 3)
    assert isinstance(learner.ledger, RunLedger)
    position = learner.ledger.position()
    learner, _ = learned(rig, replace(talk, source="work"), tmp_path / "two", 3)
    assert isinstance(learner.ledger, RunLedger)
    with pytest.raises(FeatclError, match="not the ledger that the checkpoint counts on"):
        learner.ledger.cut_back_({**position, LINES: (tmp_path / "two" / LINES).stat().st_size})


def test_a_ledger_is_of_one_choice_of_directions(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    """Continued with other directions under the same number, what was written would mean something else."""
    learned(rig, talk, tmp_path, 2)
    map_of = tmp_path / "features-0.safetensors"
    before = map_of.read_bytes()
    made = rig()
    made.adapter.remove()
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(5))
    made.adapter = constrain(made.model, Directions.from_vectors(vectors, layer=1), kind="both")
    learner = made.learner(ledger=RunLedger(tmp_path, made.adapter))
    with pytest.raises(FeatclError, match="this ledger is of other directions"):
        learner.observe(talk)
    assert learner.version == 0
    assert map_of.read_bytes() == before
    same_again = rig()
    same_again.learner(ledger=RunLedger(tmp_path, same_again.adapter)).observe(talk)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / map_of.name).write_bytes(before)  # of a part that was cut off: no frame refers to it
    made.learner(ledger=RunLedger(tmp_path / "new", made.adapter)).observe(talk)
    assert (tmp_path / "new" / map_of.name).read_bytes() != before


# --- blame


def test_shares_of_a_feature_sum_to_its_change(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learner, versions = learned(rig, talk, tmp_path)
    history = History(tmp_path)
    blame = blame_feature(history, 2, role="write")
    meaning = FeatureMap.of(learner.adapter)
    key = FeatureKey(1, 2, "write")
    rows = [meaning.vectors(coordinates)[key] for coordinates in versions]
    assert blame.total == pytest.approx(float((rows[-1] - rows[0]).norm()), rel=1e-6)
    assert sum(share.amount for share in blame.shares) == pytest.approx(blame.total, rel=1e-6)
    moved = {share.trajectory: share.moved for share in blame.shares}
    for number in range(5):
        assert moved[f"talk-{number}"] == pytest.approx(float((rows[number + 1] - rows[number]).norm()), rel=1e-4)
    both = blame_feature(history, 2)
    assert both.total > blame.total, "reading counts too where no side is asked for"
    with pytest.raises(FeatclError, match="feature 77 is not among the chosen ones, which are 0, 1, 2, 3"):
        feature_keys(history, 77)


def test_an_experience_learned_twice_has_one_share(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learner, _ = learned(rig, talk, tmp_path)
    learner.observe(_other(talk, 1))
    share = next(s for s in blame_feature(History(tmp_path), 0).shares if s.trajectory == "talk-1")
    assert share.versions == (2, 6)


def test_shares_of_a_number_sum_to_its_change(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    _, versions = learned(rig, talk, tmp_path)

    def measure(coordinates: Any) -> float:
        return float(sum(tensor.double().square().sum() for tensor in coordinates.values()))

    blame = blame_measure(History(tmp_path), measure, of="size", unit="square")
    assert blame.before == measure(versions[0])
    assert blame.after == measure(versions[-1])
    assert sum(share.amount for share in blame.shares) == pytest.approx(blame.total)
    assert len(blame.shares) == 5


def test_what_was_noted_of_a_version_is_not_said_of_the_next_with_its_number(
    rig: Make, talk: Trajectory, tmp_path: Path
) -> None:
    learner, _ = learned(rig, talk, tmp_path / "ledger", 1)
    assert isinstance(learner.ledger, RunLedger)
    learner.ledger.note("canaries", {"canary/loss_home": 2.0})
    for number in (1, 2):
        learner.observe(_other(talk, number))
    learner.ledger.note("canaries", {"canary/loss_home": 3.0})
    learner.ledger.note("alarm", "forgetting")
    learner.rollback(2)
    learner.observe(_other(talk, 3))
    found = {entry.learned: entry for entry in log_run(tmp_path, everything=True).entries}
    assert (found["talk-3"].version, found["talk-3"].canaries, found["talk-3"].note) == (3, None, "")
    assert (found["talk-2"].version, found["talk-2"].canaries, found["talk-2"].note) == (3, {"home": 1.0}, "forgetting")
    assert not found["talk-2"].on_line


@pytest.mark.parametrize("how", ["consolidate", "change_directions"])
@pytest.mark.parametrize("kind", ["both", "residual"])
def test_features_are_not_compared_across_a_change(
    rig: Make, talk: Trajectory, tmp_path: Path, kind: str, how: str
) -> None:
    """What was learned before it is frozen, or means other directions: v4 has no update of its own."""
    learner, versions = learned(rig, talk, tmp_path, 3, kind=kind)
    history = History(tmp_path)
    history.require_one_era(0, 3)
    total = blame_feature(history, 0).total
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))
    learner.consolidate() if how == "consolidate" else learner.change_directions(
        Directions.from_vectors(vectors, layer=1)
    )
    start = learner.adapter.coordinates()
    for number in range(3, 5):
        learner.observe(_other(talk, number))
    history = History(tmp_path)
    line = "between v{} and {}, at v4, directions were changed, or what was learned was frozen"
    for pair, later in (((0, 6), "v6"), ((3, 5), "v5"), ((0, None), "the head")):
        with pytest.raises(FeatclError, match=line.format(pair[0], later)):
            history.require_one_era(*pair)
    with pytest.raises(FeatclError, match=line.format(0, "the head")):
        blame_feature(history, 0)
    with pytest.raises(FeatclError, match=line.format(0, "the head")):
        blame_measure(history, lambda _: 0.0, of="x", unit="y")
    with pytest.raises(FeatclError, match="v2 was made before directions were changed"):
        learner.revert(2)
    history.require_one_era(4, 6)
    history.require_one_era(0, 3)
    assert same(history.coordinates(4), start), "where it begins anew can be read, and compared with"
    assert same(history.coordinates(3), versions[3])
    learner.revert(6)
    learner.rollback(4)
    learner.observe(_other(talk, 7))
    History(tmp_path).require_one_era(4)
    assert total > 0


def test_what_is_noted_before_the_first_update_is_in_nobodys_way(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    made = rig()
    ledger = RunLedger(tmp_path, made.adapter)
    learner = made.learner(ledger=ledger)
    ledger.note("canaries", {"canary/loss_home": 2.0})
    with pytest.raises(FeatclError, match="nothing was learned yet"):
        History(tmp_path).coordinates(0)
    learner.observe(talk)
    ledger.note("canaries", {"canary/loss_home": 1.0})
    history = History(tmp_path)
    history.require_one_era(0, 1)
    assert history.features(0).layers == (1,)
    assert history.notes("canaries") == [
        (None, {"canary/loss_home": 2.0}),
        (history.line[1], {"canary/loss_home": 1.0}),
    ]


# --- revert


@pytest.mark.parametrize("kind", ["both", "residual"])
def test_revert_subtracts_exactly(rig: Make, talk: Trajectory, tmp_path: Path, kind: str) -> None:
    learner, versions = learned(rig, talk, tmp_path, kind=kind, updates=12)
    done = learner.revert(2)  # kept only in the ledger by now
    assert (done.of, done.version, done.how, done.later) == (2, 13, "exact", 10)
    now = learner.adapter.coordinates()
    for name, tensor in versions[-1].items():
        expected = tensor.double() - (versions[2][name].double() - versions[1][name].double())
        torch.testing.assert_close(now[name].double(), expected, rtol=0, atol=2e-7)
    assert done.removed == pytest.approx(distance(versions[1], versions[2]))
    history = History(tmp_path)
    assert history.head == 13
    assert history.record(13)["of"] == 2
    assert same(history.coordinates(13), now)
    learner.rollback(12)
    assert same(learner.adapter.coordinates(), versions[12]), "a revert is a version, which can be rolled back"


def test_an_update_is_subtracted_once(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    """Unless the revert itself is taken back; kept in memory or only in the ledger, before and after a restart."""
    learner, versions = learned(rig, talk, tmp_path / "ledger", updates=10)
    assert learner.revert(9).version == 11
    assert learner.revert(2).version == 12
    once = learner.adapter.coordinates()
    position = learner.ledger.position()
    learner.save(tmp_path)

    def refused(learner: Any) -> None:
        size = (tmp_path / "ledger" / LINES).stat().st_size
        for version, by in ((9, 11), (2, 12)):
            with pytest.raises(FeatclError, match=f"v{version} was already taken back, by v{by}; to put it in again"):
                learner.revert(version)
        assert learner.version == 12
        assert same(learner.adapter.coordinates(), once)
        assert (tmp_path / "ledger" / LINES).stat().st_size == size

    refused(learner)
    learner.ledger.close()
    made = rig()
    again = made.learner(ledger=RunLedger(tmp_path / "ledger", made.adapter, clock=lambda: 1e9))
    again.ledger.cut_back_(position)
    again.restore_(tmp_path)
    refused(again)
    again.revert(11)  # v9 is in again
    for name, tensor in again.adapter.coordinates().items():
        expected = versions[10][name].double() - (versions[2][name].double() - versions[1][name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-7)
    again.revert(9)
    again.rollback(13)  # the second revert of v9 has not happened
    assert again.revert(9).version == 14


def test_reverts_of_reverts() -> None:
    found = Reverts({9: 5})
    assert found.taken_back_by(5) == 9
    found.add_(12, of=9)
    assert (found.taken_back_by(5), found.taken_back_by(9)) == (None, 12)
    found.add_(13, of=12)
    assert (found.taken_back_by(5), found.taken_back_by(9), found.taken_back_by(12)) == (9, None, 13)
    again = Reverts()
    again.load_state_(json.loads(json.dumps(found.state())))
    with pytest.raises(FeatclError, match="v5 was already taken back, by v9; to put it in again, revert v9"):
        again.refuse(5)
    again.refuse(9)


def test_revert_says_where_it_is_approximate(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learner, _ = learned(rig, talk, tmp_path, kind="none")
    assert learner.revert(2).how.startswith("approximate: the trained factors enter as a product")


def test_revert_without_ledger(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner()
    for number in range(12):
        learner.observe(_other(talk, number))
    learner.revert(11)
    with pytest.raises(FeatclError, match="v2 is not kept, and there is no ledger"):
        learner.revert(2)


def test_a_version_made_by_a_revert_can_teach(rig: Make, talk: Trajectory) -> None:
    learner = rig().learner(objective=["sft", {"name": "preference", "teacher": "version:4", "missing": "skip"}])
    for number in range(3):
        learner.observe(_other(talk, number))
    learner.revert(2)
    reverted = learner.adapter.coordinates()
    learner.observe(_other(talk, 3))
    with learner.student.teachers.named("version:4").in_place():
        assert same(learner.adapter.coordinates(), reverted)
    assert not same(learner.adapter.coordinates(), reverted), "the control"


def test_the_distance_to_never_having_seen_it(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    """Subtracting the last of all updates is as good as never seeing it; an early one leaves what came of it."""
    learner, versions = learned(rig, talk, tmp_path, updates=6)
    head = learner.adapter.coordinates()
    ratios = {}
    for left_out in (0, 3, 5):
        other = rig().learner()
        for number in (n for n in range(6) if n != left_out):
            other.observe(_other(talk, number))
        never = other.adapter.coordinates()
        found = distances(head, versions[left_out], versions[left_out + 1], never)
        assert found.kept == pytest.approx(distance(head, never))
        ratios[left_out] = found.ratio
    assert ratios[5] < 1e-5
    assert ratios[3] > 1e-3
    assert ratios[0] > 1e-3


def test_lines_are_plain_json(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learned(rig, replace(talk, source="\ud800 odd"), tmp_path, updates=1)
    records = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert records[1]["source"] == "\ud800 odd"
    assert History(tmp_path).head == 1


def test_lines_alone_tell_what_was_learned_and_refuse_the_rest(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    made = rig(kind="both")
    whole = RunLedger(tmp_path / "whole", made.adapter, clock=lambda: 1e9)
    lines = RunLedger(tmp_path / "lines", made.adapter, frames=False, clock=lambda: 1e9)
    learner = made.learner(ledger=lines)
    before = made.adapter.coordinates()
    stats = learner.observe(talk)
    whole.append(stats, before, made.adapter.coordinates(), trajectories=(talk.id,))
    kept = {"at", "bytes", "digest", "check"}
    [mine], [theirs] = (History(tmp_path / name).versions for name in ("lines", "whole"))
    assert dict(mine) | {k: theirs[k] for k in kept} == dict(theirs)
    assert (tmp_path / "lines" / FRAMES).stat().st_size == 0 < (tmp_path / "whole" / FRAMES).stat().st_size
    for refused in (lambda: History(tmp_path / "lines").coordinates(1), lambda: lines.delta(1)):
        with pytest.raises(FeatclError, match="without coordinates"):
            refused()
    assert History(tmp_path / "whole").coordinates(1)


def test_an_update_is_subtracted_once_also_without_a_ledger(rig: Make, talk: Trajectory, tmp_path: Path) -> None:
    learner = rig().learner()
    for number in range(4):
        learner.observe(_other(talk, number))
    learner.revert(3)
    once = learner.adapter.coordinates()
    learner.save(tmp_path)
    made = rig()
    again = Learner.load(tmp_path, made.model, made.tokenizer, made.adapter)
    for each in (learner, again):
        with pytest.raises(FeatclError, match="v3 was already taken back, by v5; to put it in again, revert v5"):
            each.revert(3)
        assert each.version == 5
        assert same(each.adapter.coordinates(), once)
        each.revert(5)
        each.revert(3)
        each.rollback(4)
        each.revert(3)  # the reverts have not happened
