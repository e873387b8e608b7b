"""A study is a folder: README.md, and configs that are its arms, each a delta over `base.yaml` or a grid of such."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.studies.grids import expand


@dataclass(frozen=True)
class Arm:
    """One config of a study.

    Attributes:
        path: Its YAML file.
        config: What the file says, deltas resolved.
        family: The name without the values of its grid: what the arms of one file have in common.
        seeds: Under which the study runs it: those of the file's grid, else its own `seed`.
        values: Key -> value of its place in the file's grid.
    """

    path: Path
    config: RunConfig
    family: str
    seeds: tuple[int, ...]
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's stem, unless the file names the arm; then the values of its grid."""
        return self.config.arm or self.path.stem

    def with_seed(self, seed: int) -> RunConfig:
        """The same arm under another seed."""
        return self.config.model_copy(update={"seed": seed})


def study_arms(folder: str | Path, overrides: Sequence[str] = ()) -> tuple[Arm, ...]:
    """The arms of a study; those of `base.yaml` first, the others by name of their file, grids in their own order.

    Args:
        folder: Of the study.
        overrides: `key=value` for all of its arms.

    Raises:
        FeatclError: If the folder is missing or holds no config, its configs belong to several studies or outputs, or
            two arms have one name.
        ConfigError: If one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FeatclError(f"{folder}: no such study; give a folder of configs such as experiments/quickstart")
    paths = sorted(folder.glob("*.yaml"), key=lambda path: (path.stem != "base", path.stem))
    if not paths:
        raise FeatclError(f"{folder}: holds no .yaml config")
    arms = tuple(Arm(path, p.config, p.family, p.seeds, p.values) for path in paths for p in expand(path, overrides))
    for key in ("study", "output"):
        found = sorted({getattr(arm.config, key) for arm in arms})
        if len(found) > 1:
            several = {"study": "studies", "output": "outputs"}[key]
            raise FeatclError(
                f"{folder}: its configs belong to several {several}, {', '.join(found)}; give each its folder"
            )
    _refuse_twins(folder, arms)
    return arms


def _refuse_twins(folder: Path, arms: Sequence[Arm]) -> None:
    seen: dict[str, Arm] = {}
    for arm in arms:
        other = seen.setdefault(arm.name, arm)
        if other is not arm:
            both = (
                f"{other.path.name} and {arm.path.name}" if other.path != arm.path else f"the grid of {arm.path.name}"
            )
            raise FeatclError(f"{folder}: two arms are called {arm.name!r}, from {both}; every arm has its own name")


def chosen_arms(arms: Sequence[Arm], names: Sequence[str] | None) -> tuple[Arm, ...]:
    """Those that are asked for, by name or by the name of their file; all of them for None.

    Raises:
        FeatclError: For a name that none has.
    """
    if names is None:
        return tuple(arms)
    known = {arm.name for arm in arms} | {arm.family for arm in arms}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"no arm {unknown[0]!r}" if unknown else "no arm is named"
        raise FeatclError(f"--arms: {what}; there are {', '.join(dict.fromkeys(arm.name for arm in arms))}")
    return tuple(arm for arm in arms if arm.name in names or arm.family in names)


def seed_folders(arm_folder: Path) -> dict[int, Path]:
    """seed -> folder of the run, for every run of an arm that is on disk."""
    found = ((re.fullmatch(r"seed-(\d+)", path.name), path) for path in arm_folder.glob("seed-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))
