"""A learner that acts: its present version plays episodes, and learns from what it did.

    for trajectory in featcl.environment_stream(learner, environments, seeds=range(1000)):
        learner.observe(trajectory)

Episodes are played in rounds, one round when the one before it is learned, so that the acting version is at most one
round old. A round is a function of (seed of the learner, version, episode seeds), and with a folder it is on disk
before its first trajectory is learned: a resumed stream reads it instead of playing it with a later version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.files import write_text
from featcl.learning.asked import as_said, asked_environments
from featcl.learning.randomness import derived_generator
from featcl.objectives.advantages import with_group_rewards
from featcl.streams.acting import ActingSettings, act
from featcl.streams.environments import Environment, Planned
from featcl.streams.trajectory import Trajectory


def act_now(
    learner: Any,
    environments: Sequence[Environment],
    seeds: Sequence[int],
    *,
    source: str = "environment",
    purpose: str = "act",
    **settings: Any,
) -> list[Trajectory]:
    """Episodes of the learner's present version; learns nothing. `Learner.act` is this.

    Args:
        learner: Whose version acts.
        environments: Instances that may be played at the same time.
        seeds: Of the episodes; one that is given several times is sampled as often.
        source: Names the trajectories.
        purpose: Another purpose draws otherwise from the same version and seeds.
        settings: Of `ActingSettings`; `max_length` is at most what the learner reads.

    Returns:
        One trajectory per seed; those of one seed know each other's rewards, as the objective `policy` needs.

    Raises:
        FeatclError: For an unknown setting, or what `act` refuses.
    """
    chosen, answering = _settings(learner, settings), learner.answering()
    name = hashlib.sha256(json.dumps([source, list(seeds)]).encode("utf-8", "surrogatepass")).hexdigest()
    asked, openings = asked_environments(environments, answering)
    with answering.around():
        played = act(
            learner.student.scorer.causal,
            learner.student.chat,
            asked,
            seeds,
            settings=chosen,
            generator=derived_generator(learner.seed, name, f"{purpose}/{learner.version}"),
            source=source,
            version=learner.version,
        )
    return with_group_rewards([as_said(trajectory, openings) for trajectory in played])


@dataclass
class EnvironmentStream:
    """Trajectories of the learner's present version, round after round; iterating goes on where it stopped.

    Attributes:
        learner: Who acts, and is to observe what comes out before it asks for more.
        environments: Instances that may be played at the same time.
        seeds: Of the episodes, in order; may be endless.
        source: Names the trajectories.
        samples: Episodes per seed, next to each other, as group-relative objectives need.
        folder: Where rounds are written before they are learned from; None keeps nothing.
        position: Trajectories handed out so far; give the number learned to go on with a resumed learner.
        settings: Of `ActingSettings`.
    """

    learner: Any
    environments: Sequence[Environment]
    seeds: Iterator[int]
    source: str = "environment"
    samples: int = 1
    folder: Path | None = None
    position: int = 0
    settings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise FeatclError(f"environment stream: samples must be at least 1, got {self.samples}")
        if not self.environments:
            raise FeatclError("environment stream: at least one environment is needed")
        self._round: list[Trajectory] = []
        self._number, behind = divmod(self.position, self.round_size)
        for _ in range(self._number):
            list(islice(self.seeds, self.seeds_per_round))
        if behind:
            self._round = self._next_round()[behind:]

    @property
    def seeds_per_round(self) -> int:
        """As many as fill the environments."""
        return -(-len(self.environments) // self.samples)

    @property
    def round_size(self) -> int:
        """Trajectories of a full round."""
        return self.seeds_per_round * self.samples

    def __iter__(self) -> EnvironmentStream:
        return self

    def __next__(self) -> Trajectory:
        if not self._round:
            self._round = self._next_round()
        if not self._round:
            raise StopIteration
        self.position += 1
        return self._round.pop(0)

    def _next_round(self) -> list[Trajectory]:
        seeds = [seed for seed in islice(self.seeds, self.seeds_per_round) for _ in range(self.samples)]
        number, self._number = self._number, self._number + 1
        return play_round(self.learner, self.environments, seeds, name=f"{number:08d}", folder=self.folder,
                          source=self.source, **(self.settings or {})) if seeds else []  # fmt: skip


def environment_stream(
    learner: Any,
    environments: Sequence[Environment],
    *,
    seeds: Any,
    source: str = "environment",
    samples: int = 1,
    folder: str | Path | None = None,
    position: int = 0,
    **settings: Any,
) -> EnvironmentStream:
    """Trajectories that the learner's present version plays, to be observed one after the other.

    Args:
        learner: Who acts; call `learner.observe` on each trajectory before the next is asked for.
        environments: Instances, played at the same time: the batch of a round.
        seeds: Of the episodes: a sequence or iterator of whole numbers, endless if wanted.
        source: Names the trajectories.
        samples: Episodes per seed; they share `meta["group"]`.
        folder: Rounds are written there before they are learned from, one JSONL file each.
        position: Trajectories that were already learned, for a stream that is resumed.
        settings: Of `ActingSettings`: max_turns, max_new_tokens, temperature, max_length.

    Raises:
        FeatclError: For an unknown setting or a value out of range.
    """
    _settings(learner, settings)
    where = None if folder is None else Path(folder)
    return EnvironmentStream(learner, environments, iter(seeds), source, samples, where, position, settings)


def play_round(
    learner: Any,
    environments: Sequence[Environment],
    seeds: Sequence[int],
    *,
    name: str,
    folder: Path | None = None,
    source: str = "environment",
    **settings: Any,
) -> list[Trajectory]:
    """The episodes of one round: read, if they were played before, else played by the present version and written.

    Args:
        learner: Whose version acts.
        environments: Instances that may be played at the same time.
        seeds: Of the episodes.
        name: Of the round, and of its file.
        folder: Where rounds are kept; None keeps nothing.
        source: Names the trajectories.
        settings: Of `ActingSettings`.

    Raises:
        FeatclError: If the file of this round holds something else.
    """
    path = None if folder is None else folder / f"{name}.jsonl"
    if path is not None and path.is_file():
        return _read_round(path, seeds)
    played = learner.act(environments, seeds, source=source, purpose=f"act/{name}", **settings)
    if path is not None:
        write_text(path, "".join(_line(trajectory) for trajectory in played))
    return played


class Rounds:
    """The episodes of a run, played when they are due, round by round.

    Args:
        learner: Whose present version acts.
        tasks: Task -> its `make()` and `seeds`.
        folder: Where rounds are written before they are learned from.
        at_once: Episodes that are played together: a round.
        samples: Episodes per seed, in one round.
        source: Names the trajectories.
        settings: Of `ActingSettings`.
    """

    def __init__(
        self,
        learner: Any,
        tasks: Mapping[str, Any],
        folder: Path | None,
        *,
        at_once: int = 8,
        samples: int = 1,
        source: str = "environment",
        **settings: Any,
    ) -> None:
        self.learner, self.tasks, self.folder, self.samples = learner, dict(tasks), folder, samples
        self.source, self.settings = source, settings
        self.size = max(1, at_once // samples)
        self._environments: dict[str, list[Environment]] = {}
        self._round: tuple[str, list[Trajectory]] | None = None

    def trajectory(self, planned: Planned, *, phase: int = 0) -> Trajectory:
        """The episode in this place; its whole round is played if it is the first one asked for."""
        number, place = divmod(planned.index, self.size * self.samples)
        name = f"{planned.task}-{phase}-{number:06d}"
        if self._round is None or self._round[0] != name:
            self._round = name, self._played(planned.task, number, name)
        return self._round[1][place]

    def _played(self, task: str, number: int, name: str) -> list[Trajectory]:
        seeds = self.tasks[task].seeds[number * self.size : (number + 1) * self.size]
        if task not in self._environments:
            self._environments[task] = [self.tasks[task].make() for _ in range(self.size * self.samples)]
        repeated = [seed for seed in seeds for _ in range(self.samples)]
        return play_round(self.learner, self._environments[task], repeated, name=name, folder=self.folder,
                          source=self.source, **self.settings)  # fmt: skip


def _read_round(path: Path, seeds: Sequence[int]) -> list[Trajectory]:
    """A round that was written; the file is whole or absent, so anything else was put there by somebody."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        found = [Trajectory.from_record(json.loads(line)) for line in lines]
    except (ValueError, OSError) as error:
        raise FeatclError(f"{path}: not a round of episodes ({error}); remove it to play them again") from error
    if [trajectory.meta.get("seed") for trajectory in found] != list(seeds):
        raise FeatclError(f"{path}: holds other episodes than those of this round; remove it to play them again")
    return found


def _line(trajectory: Trajectory) -> str:
    return json.dumps(trajectory.to_record(), ensure_ascii=True, sort_keys=True) + "\n"


def _settings(learner: Any, settings: dict[str, Any]) -> ActingSettings:
    known = ActingSettings.__dataclass_fields__
    if unknown := sorted(set(settings) - set(known)):
        raise FeatclError(f"acting has no setting {unknown[0]!r}; there is {', '.join(known)}")
    longest = learner.student.max_length - learner.answering().taken
    return ActingSettings(**{**settings, "max_length": min(settings.get("max_length", longest), longest)})
