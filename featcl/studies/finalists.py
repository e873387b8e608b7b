"""From screening to the final stage: the few settings that are worth many seeds, as a folder of deltas.

Screening runs every arm of `experiments/NAME` with one seed on the development world. `experiments/NAME_final` then
holds, each with three seeds at its best rate and that rate's neighbours, on the world that nothing was tuned on:

    the best settings along chosen features, the best rival, and of each control the best setting; `frozen` as it is

Best is the largest acc + general_change of a setting's trials. The folder is files like those of any study, to be
read, changed and swept; nothing else remembers what was screened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from featcl.config import _set
from featcl.errors import FeatclError
from featcl.files import digest_json, write_text
from featcl.studies.arms import Arm, study_arms
from featcl.studies.grids import _labels
from featcl.studies.table import study_table

FREE = ("none", "full", "osf", "mixture")  # kinds that no features bound: the rivals
CONTROLS = ("random", "pca")  # bases, whose best setting is taken
BEST, SEEDS = 3, (0, 1, 2)
RATE = "learner.lr"
TUNED = (RATE, "methods.0.")  # a method without a rate has a strength of its own
SUFFIX = "_final"


@dataclass(frozen=True)
class Finalist:
    """One setting at its best trial.

    Attributes:
        arm: The trial.
        role: `ours`, `rival`, `random`, `pca` or `frozen`.
        score: acc + general_change.
        trials: Of how many this is the best.
        tried: Their rates.
    """

    arm: Arm
    role: str
    score: float
    trials: int
    tried: tuple[float, ...]


def finalists(study: str | Path, *, output: str | Path = "results", best: int = BEST) -> tuple[Finalist, ...]:
    """The settings of a screened study that go on.

    Args:
        study: Folder of configs.
        output: Where its runs wrote.
        best: How many settings along chosen features.

    Raises:
        FeatclError: If a trial has not finished, or there is none of a role.
    """
    arms = study_arms(study)
    rows = {row["arm"]: row for row in study_table(study, output=output).rows}
    if missing := [arm.name for arm in arms if not rows[arm.name]["seeds"]]:
        raise FeatclError(
            f"{study}: {len(missing)} of {len(arms)} trials have not finished ({missing[0]}); finalists are chosen "
            "among all of them, with as many trials each"
        )
    settings: dict[str, list[Arm]] = {}
    for arm in arms:
        settings.setdefault(setting(arm), []).append(arm)
    ranked: dict[str, list[Finalist]] = {}
    for trials in settings.values():
        if (role := role_of(trials[0])) is not None:
            ranked.setdefault(role, []).append(_best(trials, rows, role))
    chosen: list[Finalist] = []
    for role, count in (("ours", best), ("rival", 1), *((basis, 1) for basis in CONTROLS), ("frozen", 1)):
        if role not in ranked:
            raise FeatclError(f"{study}: no arm is {role}; a study has ours, a rival, {', '.join(CONTROLS)} and frozen")
        chosen += sorted(ranked[role], key=lambda each: -each.score)[:count]
    return tuple(chosen)


def setting(arm: Arm) -> str:
    """What an arm is but for what is tuned: file and values of its grid without the rate, or a method's strength."""
    fixed = {key: value for key, value in arm.values.items() if not key.startswith(TUNED)}
    return digest_json([arm.path.stem, arm.family, fixed])


def role_of(arm: Arm) -> str | None:
    """`ours`, `rival`, `frozen`, or the control that it is; None of a control that goes no further."""
    adapter = arm.config.adapter
    if arm.family == "frozen":
        return "frozen"
    if adapter.kind in FREE:
        return "rival"
    if adapter.basis == "chosen":
        return "ours"
    return adapter.basis if adapter.basis in CONTROLS else None


def _best(trials: Sequence[Arm], rows: Mapping[str, Any], role: str) -> Finalist:
    """The trial with the largest acc + general_change; a tie goes to the smaller rate."""

    def score(arm: Arm) -> float:
        metrics = rows[arm.name]["metrics"]
        values = [metrics[name]["mean"] for name in ("acc", "general_change") if name in metrics]
        if not values:
            raise FeatclError(f"{arm.name}: its summary has neither acc nor general_change, by which trials are ranked")
        return sum(values)

    first = max(sorted(trials, key=lambda arm: arm.config.learner.lr), key=score)
    tried = tuple(sorted({arm.config.learner.lr for arm in trials}))
    return Finalist(first, role, score(first), len(trials), tried)


def neighbours(rate: float, tried: Sequence[float]) -> list[float]:
    """A rate between its neighbours: those tried, and beyond the first or the last the next of 1, 3, 10, 30, …"""
    lower = [other for other in tried if other < rate]
    upper = [other for other in tried if other > rate]
    ladder = [float(f"{digit}e{power}") for power in range(-9, 4) for digit in (1, 3)]
    below = max(lower) if lower else max(step for step in ladder if step < rate / 1.5)
    above = min(upper) if upper else min(step for step in ladder if step > rate * 1.5)
    return [below, rate, above]


def write_finalists(study: str | Path, chosen: Sequence[Finalist], *, overwrite: bool = False) -> Path:
    """The folder beside the study, an arm for each finalist and a README to be completed.

    Args:
        study: Folder of the screened study.
        chosen: From `finalists`.
        overwrite: Replace configs that lie there.

    Raises:
        FeatclError: If the folder holds configs, or the stream has no second world.
    """
    study = Path(study)
    folder = study.with_name(study.name + SUFFIX)
    if any(folder.glob("*.yaml")) and not overwrite:
        raise FeatclError(f"{folder} holds configs already; --overwrite replaces them")
    if any(each.arm.config.stream.name is None for each in chosen):
        raise FeatclError(f"{study}: a stream from files has no unseen world; write the final stage by hand")
    for old in folder.glob("*.yaml"):
        old.unlink()
    for each in chosen:
        write_text(folder / f"{_stem(each)}.yaml", _delta(each, study))
    if not (folder / "README.md").is_file():
        write_text(folder / "README.md", _readme(study, chosen))
    return folder


def _stem(finalist: Finalist) -> str:
    labels = dict(finalist.arm.values)
    labels.pop(RATE, None)
    return ".".join([finalist.arm.family, *_labels(labels)])


def _delta(finalist: Finalist, study: Path) -> str:
    """The file: what its trial had of the grid's values, and a grid of rates and seeds."""
    arm = finalist.arm
    data: dict[str, Any] = {"base": f"../{study.name}/{arm.path.name}", "study": study.name + SUFFIX}
    data["stream"] = {"world": "unseen"}
    grid: dict[str, Any] = {}
    for key, value in arm.values.items():
        if key == RATE:
            grid[key] = neighbours(arm.config.learner.lr, finalist.tried)
            continue
        grid[key] = None  # no axis any more
        if key.startswith("methods."):
            data["methods"] = [method.model_dump() for method in arm.config.methods]
        else:
            data = _set(data, key.split("."), value)
    data["grid"] = {**grid, "seed": list(SEEDS)}
    where = f" at {arm.name}, the best of {finalist.trials}" if finalist.trials > 1 else ""
    about = f"# {finalist.role}: acc + general_change {finalist.score:.3f} in screening{where}."
    return f"{about}\n{yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)}"


def _readme(study: Path, chosen: Sequence[Finalist]) -> str:
    runs = sum(len(SEEDS) * (3 if RATE in each.arm.values else 1) for each in chosen)
    names = ", ".join(f"`{_stem(each)}` ({each.role})" for each in chosen)
    return (
        f"# {study.name}{SUFFIX}\n\n**Question.** That of [{study.name}](../{study.name}/README.md), of its best "
        f"settings: {names}.\n\n**Budget.** {runs} runs, within that of {study.name}.\n\n**Prediction.** That of "
        f"{study.name}, made before any run.\n\n**Finding.** Not run yet.\n"
    )
