"""The memory study: how much of a long conversation is still known at its end, by whom.

    python -m featcl.studies.memory_recall experiments/memory

Every config of the folder is an arm: its `memory` is trained and then asked. Beside them stand, made from the base
config, the model with a truncated context, with the full one, with a memory before training, and with a LoRA of as many
numbers as the base config's state, updated on the same text. One JSON file per arm and seed is kept; what is there
already is not run again. Tests, by gap, are the same for all: differences are paired by test.

Intervals are percentiles of a bootstrap in which seeds and, within each gap, tests are drawn with replacement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcl.errors import FeatclError
from featcl.files import digest_json, write_json
from featcl.studies.arms import Arm, study_arms
from featcl.studies.memory_arms import GAPS, TAUGHT, ArmResult, Bench

READERS = ("truncated", "full", "untrained")
LORA = "lora"
RESAMPLES = 4000
ITEMS = 48  # of each gap
Answers = np.ndarray  # [seed, test]


@dataclass(frozen=True)
class RecallRow:
    """One arm over its seeds.

    Attributes:
        arm: Its name.
        seeds: Those that are there.
        recall: Gap -> share of right replies.
        near: Over the gaps that memories are trained on, with the interval.
        far: Over longer gaps, with the interval.
        more: The base arm's `near` minus this arm's, with the interval; paired.
        more_far: The same of `far`.
        means: Means over seeds of what else was measured.
    """

    arm: str
    seeds: tuple[int, ...]
    recall: Mapping[int, float]
    near: tuple[float, float, float]
    far: tuple[float, float, float]
    more: tuple[float, float, float]
    more_far: tuple[float, float, float]
    means: Mapping[str, float]


@dataclass(frozen=True)
class RecallTable:
    """All arms of the study.

    Attributes:
        study: Its name.
        base: The arm that the others are compared with.
        tests: How many of each gap.
        rows: The arms.
    """

    study: str
    base: str
    tests: int
    rows: tuple[RecallRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def print(self) -> None:
        """To standard output."""
        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.study}: share of right replies")
        names = ["arm", *(f"gap {gap}" for gap in GAPS), "near", "far", f"{self.base} is better by", "closed", "held"]
        for name in names:
            table.add_column(name, justify="left" if name == "arm" else "right")
        for row in self.rows:
            gaps = [f"{row.recall[gap]:.2f}" for gap in GAPS]
            closed = row.means.get("closed")
            table.add_row(
                row.arm, *gaps, _shown(row.near), _shown(row.far), "" if row.arm == self.base else _shown(row.more),
                "" if closed is None else f"{closed:.2f}", f"{row.means.get('held', 0):.0f}",
            )  # fmt: skip
        console = Console(width=150, markup=False)
        console.print(table)
        console.print(
            f"near: gaps {TAUGHT}; far: the longer ones. Intervals of 95 %, paired. closed: share of the divergence "
            f"to the full context that is gone. held: numbers that hold what was told. {self.tests} tests a gap.",
            style="dim",
        )


def run_study(
    folder: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    only: Sequence[str] = (),
    items: int = ITEMS,
    output: str | Path = "results",
    say: Callable[[str], None] = print,
) -> RecallTable:
    """Run what is missing of the study, and compare.

    Args:
        folder: Of configs with a `memory`, the base one `base.yaml`.
        seeds: Of the memories' slow weights and training texts.
        only: Arms that are run; all by default. The table has all that are there.
        items: Tests of each gap.
        output: Results lie in `output/<study>/recall/<arm>/seed-<n>.json`.
        say: Where progress goes, a line at a time.

    Raises:
        FeatclError: For an unknown arm, a config without memory, or no test or seed.
    """
    if items < 1 or not seeds:
        raise FeatclError(f"the memory study needs at least one test of each gap and one seed, not {items} and {seeds}")
    arms = study_arms(folder)
    if without := [arm.name for arm in arms if arm.config.memory is None]:
        raise FeatclError(f"{folder}: {without[0]} has no memory; every arm of this study has one")
    names = [*READERS, LORA, *(arm.name for arm in arms)]
    if unknown := sorted(set(only) - set(names)):
        raise FeatclError(f"{folder}: no arm {unknown[0]!r}; there are {', '.join(names)}")
    place = _Place(Path(output) / arms[0].config.study / "recall", arms, items)
    bench: Bench | None = None
    for seed in seeds:
        for name in names:
            if (only and name not in only) or place.read(name, seed) is not None:
                continue
            bench = bench or Bench(arms[0].config, items=items)
            for found, result in _run(bench, arms, name, seed).items():
                place.write(found, seed, result)
                say(f"{found}, seed {seed}: {_mean(result):.3f} right ({result.seconds:.0f} s)")
    return place.table(names, seeds)


def _run(bench: Bench, arms: Sequence[Arm], name: str, seed: int) -> dict[str, ArmResult]:
    """One arm; those without a memory of their own come together."""
    base = arms[0].with_seed(seed)
    if name in READERS:
        return bench.readers(base)
    if name == LORA:
        return {LORA: bench.lora(seed, numbers=bench.held(base))}
    [arm] = [arm for arm in arms if arm.name == name]
    return {name: bench.trained(arm.with_seed(seed))}


class _Place:
    """Where the results lie; one that another config left does not count."""

    def __init__(self, folder: Path, arms: Sequence[Arm], items: int) -> None:
        self.folder, self.arms, self.items = folder, {arm.name: arm for arm in arms}, items
        self.base = arms[0]

    def read(self, name: str, seed: int) -> ArmResult | None:
        """A result that is there, or None."""
        try:
            found = json.loads(self._file(name, seed).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if found.pop("digest", None) != self._digest(name, seed):
            return None
        return ArmResult(**{**found, "right": {int(gap): right for gap, right in found["right"].items()}})

    def write(self, name: str, seed: int, result: ArmResult) -> None:
        """Keep a result, atomically."""
        write_json(self._file(name, seed), {**asdict(result), "digest": self._digest(name, seed)})

    def _file(self, name: str, seed: int) -> Path:
        return self.folder / name / f"seed-{seed}.json"

    def _digest(self, name: str, seed: int) -> str:
        """Of what decides the numbers: of a config only its memory, and what that is made of."""
        config = self.arms.get(name, self.base).with_seed(seed)
        content = config.to_dict()
        assert config.memory is not None
        chosen = [content["stream"], content["features"]] if config.memory.kind == "features" else []
        parts = [content["model"], content["memory"], content["runtime"]["float32_matmul"], *chosen]
        return digest_json([*parts, config.seed, self.items, list(GAPS)])

    def table(self, names: Sequence[str], seeds: Sequence[int]) -> RecallTable:
        """The arms that are there, compared with the base arm."""
        found = {
            name: {seed: result for seed in seeds if (result := self.read(name, seed)) is not None} for name in names
        }
        found = {name: results for name, results in found.items() if results}
        base = found.get(self.base.name, {})
        rows = tuple(_row(name, results, base) for name, results in found.items())
        return RecallTable(self.base.config.study, self.base.name, self.items, rows)


def _row(name: str, results: Mapping[int, ArmResult], base: Mapping[int, ArmResult]) -> RecallRow:
    far = tuple(gap for gap in GAPS if gap not in TAUGHT)
    common = [seed for seed in results if seed in base]
    nothing = (float("nan"), float("nan"), float("nan"))
    first = next(iter(results.values()))
    return RecallRow(
        arm=name,
        seeds=tuple(results),
        recall={gap: float(np.mean(_answers(results, list(results), (gap,)))) for gap in first.right},
        near=interval(_answers(results, list(results), TAUGHT), groups=len(TAUGHT)),
        far=interval(_answers(results, list(results), far), groups=len(far)),
        more=_difference(base, results, common, TAUGHT) if common else nothing,
        more_far=_difference(base, results, common, far) if common else nothing,
        means={
            **{key: float(np.mean([r.measures[key] for r in results.values()])) for key in first.measures},
            **{key: float(np.mean([r.numbers[key] for r in results.values()])) for key in first.numbers},
            "seconds": float(np.mean([r.seconds for r in results.values()])),
        },
    )


def _difference(
    one: Mapping[int, ArmResult], other: Mapping[int, ArmResult], seeds: Sequence[int], gaps: Sequence[int]
) -> tuple[float, float, float]:
    return interval(_answers(one, seeds, gaps) - _answers(other, seeds, gaps), groups=len(gaps))


def _answers(results: Mapping[int, ArmResult], seeds: Sequence[int], gaps: Sequence[int]) -> Answers:
    """[seed, test], the tests of one gap next to each other."""
    return np.array([[right for gap in gaps for right in results[seed].right[gap]] for seed in seeds], dtype=float)


def interval(values: Answers, *, groups: int, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean of [seed, test] with a 95 % bootstrap interval over seeds and, within equal groups, tests.

    Args:
        values: For a paired difference, the differences.
        groups: Equal groups of neighbouring tests; each keeps its size.
        resamples: Of the bootstrap.
    """
    draw = np.random.default_rng(0)
    seeds, tests = values.shape
    size = tests // groups
    rows = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)  # how often each was drawn
    columns = np.hstack([draw.multinomial(size, np.full(size, 1 / size), size=resamples) for _ in range(groups)])
    means = np.einsum("rs,st,rt->r", rows, values, columns, optimize=True) / (seeds * tests)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def _mean(result: ArmResult) -> float:
    return float(np.mean([right for group in result.right.values() for right in group]))


def _shown(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 2 on bad input, with one line."""
    parser = argparse.ArgumentParser(
        prog="python -m featcl.studies.memory_recall", description="The memory study; see its module."
    )
    parser.add_argument("folder", nargs="?", default="experiments/memory", help="of configs, one an arm")
    parser.add_argument("--seeds", default="0,1,2", help="such as 0,1,2")
    parser.add_argument("--arms", default="", help="only these, such as base,lora; all by default")
    parser.add_argument("--items", type=int, default=ITEMS, help="tests of each gap")
    parser.add_argument("--output", default="results", help="where results lie")
    parser.add_argument("--json", action="store_true", help="the table as JSON on standard output")
    given = parser.parse_args(arguments)
    try:
        table = run_study(
            given.folder,
            seeds=[int(seed) for seed in given.seeds.split(",") if seed],
            only=[arm for arm in given.arms.split(",") if arm],
            items=given.items,
            output=given.output,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except (FeatclError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the arms that are done", file=sys.stderr)
        return 130
    if given.json:
        print(json.dumps(table.to_json(), indent=1))
    else:
        table.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
