"""Which part of a source a trajectory belongs to is decided by its id."""

from __future__ import annotations

from featcl.streams import Trajectory
from featcl.streams.split import by_source, id_share, split_source


def some(n: int, source: str = "s", start: int = 0) -> list[Trajectory]:
    return [Trajectory(id=f"{source}-{i}", source=source, text="a b") for i in range(start, start + n)]


def test_the_parts_are_disjoint_whole_and_of_about_the_asked_size() -> None:
    trajectories = some(2000)
    split = split_source(trajectories, holdout=0.2, calibration=0.1)
    ids = [{t.id for t in part} for part in (split.train, split.heldout, split.calibration)]
    assert sum(len(part) for part in ids) == len(set.union(*ids)) == 2000
    assert abs(len(ids[1]) - 400) < 5 * (2000 * 0.2 * 0.8) ** 0.5, "five standard deviations of a binomial"
    assert abs(len(ids[2]) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    order = [t.id for t in trajectories]
    assert [t.id for t in split.train] == [id for id in order if id in ids[0]], "the order of the stream is kept"


def test_a_part_does_not_depend_on_the_others() -> None:
    few, many = (split_source(some(n), holdout=0.2, calibration=0.1) for n in (500, 1000))
    assert {t.id for t in few.heldout} <= {t.id for t in many.heldout}
    assert {t.id for t in few.calibration} <= {t.id for t in many.calibration}


def test_small_sources_still_have_something_to_learn_and_to_score() -> None:
    for n, sizes in ((1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1))):
        for start in range(0, 50, 5):
            split = split_source(some(n, start=start), holdout=0.2, calibration=0.1)
            assert tuple(map(len, (split.train, split.heldout, split.calibration))) == sizes


def test_sources_in_order_of_appearance() -> None:
    mixed = [*some(2, "b"), *some(1, "a"), *some(1, "b", start=5)]
    assert {name: len(group) for name, group in by_source(mixed).items()} == {"b": 3, "a": 1}
    assert list(by_source(mixed)) == ["b", "a"]


def test_shares_are_uniform() -> None:
    shares = [id_share(f"id{i}") for i in range(4000)]
    assert all(0 <= share < 1 for share in shares)
    for tenth in range(10):
        assert abs(sum(tenth / 10 <= share < (tenth + 1) / 10 for share in shares) - 400) < 80
