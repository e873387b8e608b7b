"""Tuning: from the trials of one folder to the numbers that the arms of a study are run with.

A file of trials is an arm of the study once more, on the development world and with a grid:

    base: ../rivals/ewc.yaml
    study: rivals_tuning
    stream: {world: development}
    grid: {learner.lr: [3.0e-4, 1.0e-3, 3.0e-3], methods.0.strength: [10.0, 100.0, 1000.0]}

Every arm has as many trials as every other. The best one by

    score = learning_accuracy - forgetting_max_past + general_change        (acquired, less what was forgotten)

is taken; where a stream has no task before another, nothing is forgotten of one. Its values are written into the arm's
own file, and what was tried into `tuning.json` beside it, so that the study says by itself how it was tuned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from featcl.config import RunConfig, _set
from featcl.errors import FeatclError
from featcl.files import read_state, write_json, write_text
from featcl.studies.arms import Arm, seed_folders, study_arms
from featcl.studies.points import FinishedRun

FILE = "tuning.json"
CRITERION = "learning_accuracy - forgetting_max_past + general_change"
WIDTH = 118  # of a line that is written


@dataclass(frozen=True)
class Trial:
    """One place of an arm's grid.

    Attributes:
        values: Key -> value.
        score: By the criterion, mean over seeds; None: it did not finish, or gave no number.
    """

    values: Mapping[str, Any]
    score: float | None


@dataclass(frozen=True)
class TunedArm:
    """What was tried for one arm.

    Attributes:
        trials: All, in the order of the grid.
        chosen: The values of the best; of equals the first.
        at_edge: Axes with at least three numbers, of which the best has the smallest or largest: more might be better.
    """

    trials: tuple[Trial, ...]
    chosen: Mapping[str, Any]
    at_edge: tuple[str, ...]


@dataclass(frozen=True)
class Tuning:
    """What was tried for every arm of a study.

    Attributes:
        arms: By the stem of the arm's file.
        world: Of the trials' stream.
        seeds: Of the trials.
    """

    arms: Mapping[str, TunedArm]
    world: str
    seeds: tuple[int, ...]

    @classmethod
    def load(cls, study: str | Path) -> Tuning | None:
        """What lies in a study's folder; None where it was not tuned.

        Raises:
            FeatclError: If the file is damaged.
        """
        path = Path(study) / FILE
        if not path.is_file():
            return None
        found = read_state(path, "arms", "world", "seeds")
        try:
            arms = {name: _read_arm(arm) for name, arm in found["arms"].items()}
            return cls(arms, str(found["world"]), tuple(found["seeds"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise FeatclError(f"{path}: damaged ({type(error).__name__}: {error}); tune again") from error

    def save(self, study: str | Path) -> Path:
        """Write `tuning.json`; the same bytes for the same trials."""
        arms = {name: asdict(arm) for name, arm in self.arms.items()}
        path = Path(study) / FILE
        write_json(path, {"criterion": CRITERION, "world": self.world, "seeds": list(self.seeds), "arms": arms})
        return path

    def trials(self, arm: str, config: RunConfig) -> int | None:
        """How many trials an arm had; None where it had none, or runs with other values than the chosen ones."""
        if arm not in self.arms:
            return None
        wanted = config.to_dict()
        same = all(_at(wanted, key) == value for key, value in self.arms[arm].chosen.items())
        return len(self.arms[arm].trials) if same else None

    def note(self) -> str:
        """What the column of trials means, in a line."""
        seeds = ", ".join(map(str, self.seeds))
        return (
            f"trials: settings tried on the world {self.world} with seed {seeds}; the best by {CRITERION} is what the "
            f"arm is run with ({FILE}). – means none, or values that are not the chosen ones."
        )


def tune(trials: str | Path, study: str | Path, *, output: str | Path | None = None, failed: bool = False) -> Tuning:
    """Choose the best trial of every arm, and write its values into the study.

    Args:
        trials: Folder of trials, such as `experiments/rivals_tuning`; `featcl sweep` runs them.
        study: Folder of the study.
        output: Where the trials wrote; the configs' own by default.
        failed: Trials that have not finished count as failed; they are an error by default.

    Returns:
        What was chosen; `tuning.json` and the arms' files in the study's folder hold the same.

    Raises:
        FeatclError: If a trial has not finished, all of an arm's failed, arms have different numbers of trials, seeds
            or worlds, a world is the study's own, or a file of trials has no arm of the study as its base.
    """
    trials, study = Path(trials), Path(study)
    groups = _by_arm(study_arms(trials), study)
    _check_equal(groups, study)
    found = {name: _tuned(name, arms, output, failed=failed) for name, arms in groups.items()}
    first = next(iter(groups.values()))[0]
    tuning = Tuning(dict(sorted(found.items())), first.config.stream.world, first.seeds)
    for name, arm in tuning.arms.items():
        write_values_(study / f"{name}.yaml", arm.chosen)
    tuning.save(study)
    return tuning


def _by_arm(arms: Sequence[Arm], study: Path) -> dict[str, list[Arm]]:
    """Stem of the study's file -> its trials."""
    groups: dict[str, list[Arm]] = {}
    files: dict[str, Path] = {}
    for arm in arms:
        base = (yaml.safe_load(arm.path.read_text(encoding="utf-8")) or {}).get("base")
        target = None if base is None else (arm.path.parent / base).resolve()
        if target is None or target.parent != study.resolve():
            raise FeatclError(f"{arm.path}: its base is {base!r}; trials have an arm of {study} as their base")
        if files.setdefault(target.stem, arm.path) != arm.path:
            raise FeatclError(f"{arm.path} and {files[target.stem]} both hold trials of {target.name}; one file each")
        groups.setdefault(target.stem, []).append(arm)
    return groups


def _check_equal(groups: Mapping[str, Sequence[Arm]], study: Path) -> None:
    """As many trials for every arm, with the same seeds, on a world that the study does not report."""
    facts = {name: (len(arms), arms[0].seeds, arms[0].config.stream.world) for name, arms in groups.items()}
    for what, index in (("trials", 0), ("seeds", 1), ("world", 2)):
        values = {name: fact[index] for name, fact in facts.items()}
        first = next(iter(values))
        other = next((name for name, value in values.items() if value != values[first]), None)
        if other is not None:
            raise FeatclError(
                f"tuning: {first} has {what} {values[first]}, {other} has {values[other]}; all arms are tuned alike"
            )
    world = next(iter(facts.values()))[2]
    if any(arm.config.stream.world == world for arm in study_arms(study)):
        raise FeatclError(f"tuning: {study} reports on the world {world}, on which its arms would have been tuned")


def _tuned(name: str, arms: Sequence[Arm], output: str | Path | None, *, failed: bool) -> TunedArm:
    scores = [_score(arm, output) for arm in arms]
    missing = [arm.name for arm, (_, finished) in zip(arms, scores, strict=True) if not finished]
    if missing and not failed:
        raise FeatclError(
            f"tuning: {len(missing)} of {len(arms)} trials of {name} have not finished ({', '.join(missing[:3])} …); "
            f"featcl sweep {arms[0].path.parent} goes on, or count them as failed"
        )
    trials = tuple(Trial(dict(arm.values), score) for arm, (score, _) in zip(arms, scores, strict=True))
    known = [trial for trial in trials if trial.score is not None]
    if not known:
        raise FeatclError(f"tuning: none of the {len(trials)} trials of {name} gave a score")
    best = max(known, key=lambda trial: trial.score or 0.0)
    return TunedArm(trials, best.values, _at_edge(trials, best))


def _score(arm: Arm, output: str | Path | None) -> tuple[float | None, bool]:
    """Mean over seeds, and whether all of them have finished under this very config."""
    place = Path(arm.config.output if output is None else output) / arm.config.study / arm.name
    folders, scores = seed_folders(place), []
    for seed in arm.seeds:
        folder = folders.get(seed)
        if folder is None or not (folder / "summary.json").is_file():
            return None, False
        run = FinishedRun.read(folder)
        if run.files.summary.get("config_digest") != arm.with_seed(seed).digest:
            return None, False
        scores.append(score(run))
    return (fmean(scores) if all(map(math.isfinite, scores)) else None), True


def score(run: FinishedRun) -> float:
    """The criterion for one run; NaN where it acquired no number."""
    forgotten = run.metric("forgetting_max_past")
    lost = run.metric("general_change")
    return run.metric("learning_accuracy") - (0.0 if math.isnan(forgotten) else forgotten) + (
        0.0 if math.isnan(lost) else lost
    )  # fmt: skip


def _at_edge(trials: Sequence[Trial], best: Trial) -> tuple[str, ...]:
    found = []
    for key, value in best.values.items():
        tried = {trial.values[key] for trial in trials if isinstance(trial.values[key], int | float)}
        if len(tried) >= 3 and value in (min(tried), max(tried)):
            found.append(key)
    return tuple(found)


def write_values_(path: Path, values: Mapping[str, Any]) -> None:
    """Set dotted keys in an arm's file; the comments above it stay, and where nothing changes, so does the file.

    Raises:
        FeatclError: If a key leads through a list that the file does not hold.
    """
    text = path.read_text(encoding="utf-8")
    own: dict[str, Any] = yaml.safe_load(text) or {}
    changed = own
    for key, value in values.items():
        head, *rest = key.split(".")
        if any(part.isdigit() for part in rest) and head not in changed:
            raise FeatclError(f"{path}: {key} was tuned, and this file has no {head}; write it there")
        changed = _set(changed, [head, *rest], value)
    if changed != own:
        comments = [line for line in text.splitlines() if line.startswith("#")]
        write_text(path, "\n".join([*comments, *(_line(key, value) for key, value in changed.items())]) + "\n")


def _line(key: str, value: Any) -> str:
    """One key of a config with all of its value."""
    written = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=WIDTH, allow_unicode=True)
    return f"{key}: {written.removesuffix('...' + chr(10)).strip()}"


def _at(value: Any, key: str) -> Any:
    """What a resolved config has at a dotted key."""
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list | tuple) else (value or {}).get(part)
    return value


def _read_arm(arm: Mapping[str, Any]) -> TunedArm:
    trials = tuple(Trial(each["values"], each["score"]) for each in arm["trials"])
    return TunedArm(trials, arm["chosen"], tuple(arm["at_edge"]))
