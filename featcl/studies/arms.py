"""A study is a folder of configs; each YAML file in it is an arm."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from featcl.config import RunConfig
from featcl.errors import FeatclError


@dataclass(frozen=True)
class Arm:
    """One config of a study.

    Attributes:
        path: Its YAML file.
        config: What the file says, deltas resolved.
    """

    path: Path
    config: RunConfig

    @property
    def name(self) -> str:
        """The file's stem, unless the file names the arm."""
        return self.config.arm or self.path.stem

    def with_seed(self, seed: int) -> RunConfig:
        """The same arm under another seed."""
        return self.config.model_copy(update={"seed": seed})


def study_arms(folder: str | Path) -> tuple[Arm, ...]:
    """The arms of a study; `base.yaml` first, the others by name.

    Raises:
        FeatclError: If the folder is missing, holds no config, or its configs belong to several studies.
        ConfigError: If one of them cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FeatclError(f"{folder}: no such study; give a folder of configs such as experiments/quickstart")
    paths = sorted(folder.glob("*.yaml"), key=lambda path: (path.stem != "base", path.stem))
    if not paths:
        raise FeatclError(f"{folder}: holds no .yaml config")
    arms = tuple(Arm(path, RunConfig.load(path)) for path in paths)
    studies = sorted({arm.config.study for arm in arms})
    if len(studies) > 1:
        raise FeatclError(
            f"{folder}: its configs belong to several studies, {', '.join(studies)}; give each its folder"
        )
    return arms


def seed_folders(arm_folder: Path) -> dict[int, Path]:
    """seed -> folder of the run, for every run of an arm that is on disk."""
    found = ((re.fullmatch(r"seed-(\d+)", path.name), path) for path in arm_folder.glob("seed-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))
