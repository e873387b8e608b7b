"""The main job: a model learns from a stream, and what it learns and forgets is measured all the time.

`featcl.run(config)` works because this module can be called; `featcl.run.RunResult` is what it returns.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.build import Experiment, build
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.evaluation import ScoreMatrix
from featcl.evaluation.board import without_columns
from featcl.evaluation.result import RunResult
from featcl.features.tokens import token_batches, token_windows
from featcl.files import write_json
from featcl.streams import Trajectory
from featcl.tracking import JsonlTracker, Trackers, WandbRun, cut_back, open_wandb
from featcl.tracking.environment import environment
from featcl.tracking.folder import RunFolder
from featcl.tracking.interrupt import Interruptible
from featcl.tracking.names import TOKENS_SEEN
from featcl.tracking.progress import progress_bar, say, waiting
from featcl.tracking.report import draw_plots, write_report

CHECKPOINT_SECONDS = 30.0  # between evaluations; after each one the state is saved in any case
PROBE_TOKENS = 128  # of each text on which the leak is measured


def run(config: RunConfig, *, overwrite: bool = False) -> RunResult:
    """Learn from the stream of a config; write `results/<study>/<arm>/seed-<n>/`.

    A finished run of the same config is returned as it is; one that was interrupted goes on where it stopped, to the
    same final numbers.

    Args:
        config: What to run.
        overwrite: Start anew, and replace what lies in the folder whatever config it belongs to.

    Raises:
        FeatclError: Bad input, or the folder holds the results of another config.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, with the state saved.
    """
    folder = RunFolder(config.folder, config.to_dict(), digest=config.digest, overwrite=overwrite)
    with folder, Interruptible() as interrupt:
        if folder.finished:
            say(f"{folder.path} holds this run, finished; --overwrite would run it again")
            return RunResult.load(folder.path)
        with waiting("loading the model, selecting features, attaching the adapter"):
            experiment = build(config, quarantine=folder.path / "quarantine.jsonl")
        with Session(experiment, folder, interrupt) as session:
            for step in session.remaining(plan(experiment)):
                match step:
                    case Update():
                        session.learn(step)
                    case CheckCanaries():
                        session.check_canaries()
                    case Evaluate():
                        session.evaluate(step.row)
            return session.finish()


# --- the order of things -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """Learn from one trajectory, in one phase of one task."""

    task: str
    phase: int
    trajectory: Trajectory


@dataclass(frozen=True)
class CheckCanaries:
    """Look at the small fixed set between evaluations."""


@dataclass(frozen=True)
class Evaluate:
    """Score every column of R; `row` is "base" or the task just trained."""

    row: str


Step = Update | CheckCanaries | Evaluate


def plan(experiment: Experiment) -> Iterator[Step]:
    """Every step of a run in order; a resumed run skips those that are done."""
    canaries = experiment.config.evaluation.canaries
    updates = 0
    yield Evaluate("base")
    for task in experiment.material.tasks:
        for phase, limit in enumerate(experiment.experiences):
            for trajectory in task.trajectories[:limit]:
                yield Update(task.name, phase, trajectory)
                updates += 1
                if canaries is not None and experiment.canaries is not None and updates % canaries.every == 0:
                    yield CheckCanaries()
        yield Evaluate(task.name)


# --- one run at work ---------------------------------------------------------------------------------------------


class Session:
    """What changes while a run goes on: position, matrix, records; it saves and restores all of it.

    Args:
        experiment: The run's objects, at their start.
        folder: Where it writes; a checkpoint in it is continued.
        interrupt: Keeps Ctrl-C out of what must not be torn.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, interrupt: Interruptible) -> None:
        self.experiment = experiment
        self.learner = experiment.learner
        self.folder = folder
        self.interrupt = interrupt
        self.position = self.phase = self.left_out = 0
        material = experiment.material
        self.matrix = ScoreMatrix(material.columns, len(material.tasks), material.board.measure)
        history: tuple[dict[str, Any], ...] = ()
        with interrupt.protected():
            state = folder.state
            folder.start({**environment(), **experiment.facts})
            if state is not None:
                history = self._restore(state)
                say(f"{folder.path} was interrupted after {self.learner.version} updates; going on from there")
            else:
                self._save_directions()
        self.tracker = self._open_trackers(history)
        self._saved = time.monotonic()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Save the state on Ctrl-C and on bad input, so that nothing is lost."""
        if kind is None:
            return
        if issubclass(kind, KeyboardInterrupt | FeatclError) and not self.interrupt.torn:
            self._save()
        self.tracker.finish({})
        if issubclass(kind, KeyboardInterrupt):
            saved = "the last checkpoint is" if self.interrupt.torn else "the state is saved"
            raise KeyboardInterrupt(f"{saved} in {self.folder.path}; the same command goes on from there") from error

    def remaining(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The steps that are not done yet, with a progress bar on a terminal."""
        todo = list(steps)
        with progress_bar(len(todo), done=self.position) as advance:
            for step in todo[self.position :]:
                yield step
                advance(step.task if isinstance(step, Update) else None)

    def learn(self, step: Update) -> None:
        """One update."""
        with self.interrupt.protected():
            if step.phase != self.phase:
                self.learner.reconfigure(**self.experiment.phases[step.phase])
                self.phase = step.phase
            stats = self.learner.observe(step.trajectory)
            record = stats.record()
            seconds = record.pop("seconds")
            self.left_out += stats.tokens_left_out
            self._log({"kind": "update", **record, "task": step.task, "phase": step.phase, "seconds/update": seconds})
            self.position += 1
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self._save()

    def check_canaries(self) -> None:
        """Losses, flips and forgetting on the small fixed set."""
        with self.interrupt.protected():
            start = time.perf_counter()
            assert self.experiment.canaries is not None
            reading = self.experiment.canaries.score(self.experiment.adapter.model)
            seconds = time.perf_counter() - start
            self._log({"kind": "canaries", **reading.record(), "seconds/canaries": seconds})
            self.position += 1

    def evaluate(self, row: str) -> None:
        """One row of R, and the state on disk."""
        start = time.perf_counter()
        scores = self.experiment.material.board.score(self.experiment.adapter.model)
        with self.interrupt.protected():
            self.matrix = self.matrix.with_row(row, scores)
            self.matrix.save(self.folder.path / "R.json")
            values = dict(zip(self.matrix.columns, self.matrix.values[-1].tolist(), strict=True))
            record = {f"R/{column}": value for column, value in values.items()}
            seconds = time.perf_counter() - start
            self._log({"kind": "evaluation", "row": row, **record, "seconds/evaluation": seconds})
            self.position += 1
        self._save()

    def finish(self) -> RunResult:
        """Adapter, tables, pictures, summary, report."""
        path = self.folder.path
        with self.interrupt.protected():
            self.learner.save_adapter(path / "adapter")
            features = self.experiment.adapter.report(20).to_dicts()
            if features:
                self.tracker.table("features", list(features[0]), [list(row.values()) for row in features])
            self.tracker.table("R", ("row", "column", "score"), _long(self.matrix))
            self._flush()
            for picture in draw_plots(path).values():
                self.tracker.image(f"plots/{picture.stem}", picture)
            summary = self._summary()
            self.tracker.finish(summary)
            write_json(path / "summary.json", summary)
            write_report(path)
        return RunResult.load(path)

    def _summary(self) -> dict[str, Any]:
        """The final numbers; no times, so that the same seed gives the same file."""
        adapter, material = self.experiment.adapter, self.experiment.material
        config, matrix = self.experiment.config, self.matrix
        return {
            "study": config.study,
            "arm": config.arm,
            "seed": config.seed,
            "config_digest": config.digest,
            **{key: self.experiment.facts[key] for key in ("model_digest", "stream_digest", "directions_digest")},
            "measure": matrix.measure,
            "metrics": without_columns(matrix, material.probes).metrics().to_dict(),
            "probes": {column: _last(matrix, column) for column in material.probes},
            "delta_norm": adapter.delta_norm(),
            "trained_parameters": sum(parameter.numel() for parameter in adapter.parameters()),
            "leak": self._leak(),
            "updates": self.learner.version,
            "tokens": self.learner.tokens,
            "tokens_left_out": self.left_out,
        }

    def _leak(self) -> dict[str, float]:
        """What the update writes outside the chosen span, on texts of the calibration split."""
        tokenizer = self.learner.student.chat.tokenizer
        texts = self.experiment.material.probe_texts
        windows = [
            window for text in texts for window in list(token_windows(tokenizer, [text], context=PROBE_TOKENS))[:1]
        ]
        batch = next(iter(token_batches(windows, tokenizer))).to(self.experiment.adapter.model.device)
        found = self.experiment.adapter.leak(batch.input_ids, batch.attention_mask)
        return {name: getattr(found, name) for name in ("leak", "rescale", "total_change_outside")}

    # --- records and state

    def _log(self, record: Mapping[str, Any]) -> None:
        self.tracker.log({**record, TOKENS_SEEN: self.learner.tokens}, self.learner.version)

    def _open_trackers(self, history: Sequence[Mapping[str, Any]]) -> Trackers:
        config, path = self.experiment.config, self.folder.path
        self.metrics = JsonlTracker(path / "metrics.jsonl")
        names = WandbRun(config.tracking.project, config.study, str(config.arm), config.seed, config.to_dict())
        wandb = open_wandb(path, names, mode=config.tracking.wandb, history=history)
        return Trackers(self.metrics, *([wandb] if wandb else []))

    def _flush(self) -> None:
        self.metrics.flush(sync=True)

    def _save_directions(self) -> None:
        chosen = self.experiment.directions
        sets = chosen.items() if isinstance(chosen, Mapping) else [("", chosen)]
        for layer, directions in sets:
            directions.save(self.folder.path / "directions" / f"{layer}")

    def _save(self) -> None:
        """A checkpoint of everything the next step depends on."""
        with self.interrupt.protected():
            self._flush()
            self.folder.save_state(self._write)
            self._saved = time.monotonic()

    def _write(self, target: Path) -> None:
        canaries = self.experiment.canaries
        self.learner.save(target / "learner")
        if self.matrix.rows:
            self.matrix.save(target / "R.json")
        session = {"position": self.position, "phase": self.phase, "left_out": self.left_out}
        best = None if canaries is None else canaries.state_dict()
        write_json(target / "session.json", {**session, "lines": self.metrics.lines, "canaries": best})

    def _restore(self, state: Path) -> tuple[dict[str, Any], ...]:
        """Go on from a checkpoint; returns the records up to it."""
        session = json.loads((state / "session.json").read_text(encoding="utf-8"))
        self.position, self.phase, self.left_out = (session[key] for key in ("position", "phase", "left_out"))
        if (state / "R.json").is_file():
            self.matrix = ScoreMatrix.load(state / "R.json")
        self.learner.restore_(state / "learner")
        self.learner.reconfigure(**self.experiment.phases[self.phase])
        if self.experiment.canaries is not None:
            self.experiment.canaries.load_state_dict(session["canaries"])
        return cut_back(self.folder.path / "metrics.jsonl", lines=session["lines"]).kept


def _last(matrix: ScoreMatrix, column: str) -> float:
    return float(matrix.values[-1, matrix.columns.index(column)])


def _long(matrix: ScoreMatrix) -> list[list[Any]]:
    """R as rows of (row, column, score)."""
    values = matrix.values.tolist()
    return [[row, column, values[i][j]] for i, row in enumerate(matrix.rows) for j, column in enumerate(matrix.columns)]


class _CallableModule(types.ModuleType):
    """`featcl.run` is a module and, since the name is also the function's, callable as that function."""

    def __call__(self, config: RunConfig, *, overwrite: bool = False) -> RunResult:
        return run(config, overwrite=overwrite)


sys.modules[__name__].__class__ = _CallableModule
