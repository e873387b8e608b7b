"""One run at work: its position, matrix and records, and how all of it is saved and restored."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from featcl.build import Experiment, acting_rounds
from featcl.errors import FeatclError
from featcl.evaluation import ScoreMatrix
from featcl.evaluation.cost import stored_bytes
from featcl.evaluation.desiderata import report_card
from featcl.evaluation.measures import ACTING, EVALUATION, LEARNING, MEMORY, Place
from featcl.evaluation.result import RunResult
from featcl.evaluation.segments import answering_in
from featcl.evaluation.summary import long_rows, matrix_summary
from featcl.evaluation.task_end import task_end_record
from featcl.files import append_bytes, digest_json, read_state, write_json
from featcl.learning import UpdateStats
from featcl.learning.guard import Stopped
from featcl.learning.ledger import RunLedger
from featcl.plan import BeginTask, EndTask, Step, Update
from featcl.streams import Trajectory
from featcl.streams.environments import Planned
from featcl.tracking import JsonlTracker, RunNames, Trackers, cut_back, open_backends
from featcl.tracking.ahead import Begun, WriteAhead
from featcl.tracking.environment import environment
from featcl.tracking.folder import RunFolder
from featcl.tracking.interrupt import Interruptible
from featcl.tracking.jsonl import read_rows
from featcl.tracking.names import TOKENS_SEEN
from featcl.tracking.progress import progress_bar, say
from featcl.tracking.report import draw_plots, write_report
from featcl.tracking.report_card import card_table

COUNTERS = ("position", "phase", "left_out", "quarantined", "stopped", "recall", "updates_before", "tokens_before")
QUARANTINE = "quarantine.jsonl"
MEMORIZED = "memory.safetensors"
T = TypeVar("T")


class Session:
    """What changes while a run goes on: position, matrix, records; it saves and restores all of it.

    Args:
        experiment: The run's objects, at their start.
        folder: Where it writes; a checkpoint in it is continued.
        interrupt: Keeps Ctrl-C out of what must not be torn.
    """

    def __init__(self, experiment: Experiment, folder: RunFolder, interrupt: Interruptible) -> None:
        self.experiment = experiment
        self.learner, self.measures = experiment.learner, experiment.measures
        self.folder = folder
        self.interrupt = interrupt
        self.position = self.phase = self.left_out = self.quarantined = 0
        self.stopped: str | None = None
        self.recall: dict[str, dict[str, float]] = {}
        self.updates_before = self.tokens_before = 0  # of tasks after which learning started again
        self.start = experiment.learner.present if experiment.config.stream.setting == "alone" else None
        self.rounds = acting_rounds(experiment.config, experiment.learner, folder.path / "episodes")
        material = experiment.material
        self.matrix = ScoreMatrix(material.columns, len(material.tasks), material.board.measure)
        history: tuple[dict[str, Any], ...] = ()
        self.ahead = WriteAhead(folder.path / "state" / "ahead.json")
        self.begun: Begun | None = None
        self.closing = False
        with interrupt.protected():
            state = folder.state
            found = {**environment(), **experiment.facts}
            if state is None:
                folder.start(found)
                self._save_directions()
            frames = experiment.config.tracking.ledger == "coordinates"
            self.ledger = RunLedger(folder.path / "ledger", experiment.adapter, frames=frames)
            if state is not None:
                history = self._restore(state)
                self._say_resumed(folder.resume(found, update=self.learner.version))
        self.learner.ledger = self.ledger
        self.tracker = self._open_trackers(history)
        self._saved = (time.monotonic(), self.position)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Save the state on Ctrl-C and on bad input, so that nothing is lost."""
        if kind is None:
            return
        if issubclass(kind, KeyboardInterrupt | FeatclError) and not self.interrupt.torn and not self.closing:
            self._save()
        self._close(kind)
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
            trajectory = self._experience(step)
            before = self.measures.before_update(trajectory, step.task) if step.new else {}
            self._begin(trajectory, only_copy=isinstance(step.trajectory, Planned))
            with self.measures.phase(LEARNING):
                stats, stopped = _unless_stopped(partial(self.learner.observe, trajectory))
            self._record(stats, step.task, before)
            self.position += 1
            self.stopped = None if stopped is None else str(stopped)
        if stopped is not None:
            raise stopped
        if self._due():
            self._save()

    def _begin(self, trajectory: Trajectory, *, only_copy: bool) -> None:
        """The write-ahead record; what was begun before an interruption is the same experience again."""
        record = trajectory.to_record()
        if self.begun is not None and self.begun.position == self.position:
            if self.begun.digest != digest_json(record):
                raise FeatclError(
                    f"{self.folder.path}: experience {self.position} was {self.begun.trajectory.get('id')!r} when the "
                    f"run was interrupted, and is now {trajectory.id!r} or has other contents: restore the stream, or "
                    "start anew with --overwrite"
                )
            self.begun = None
        self.ahead.begin(self.position, record, only_copy=only_copy)

    def _record(self, stats: UpdateStats, task: str, before: Mapping[str, float] | None = None) -> None:
        """What one experience did, in metrics.jsonl; and where it was quarantined or alarmed, there too."""
        record = stats.record()
        seconds = record.pop("seconds")
        self.left_out += stats.tokens_left_out
        kind = "quarantined" if stats.quarantined else "postponed" if stats.postponed else "update"
        record |= {**(before or {}), **self.measures.spent(), "seconds/update": seconds}
        self._log({"kind": kind, **record, "task": task, "phase": self.phase})
        if stats.quarantined:
            self.quarantined += 1
            entry = {"id": stats.trajectory, "task": task, "source": stats.source, "reason": stats.quarantined,
                     "position": self.position, **stats.measures}  # fmt: skip
            with open(self.folder.path / QUARANTINE, "ab", buffering=0) as file:
                append_bytes(file, json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        if stats.alarm:
            self.ledger.note("alarm", stats.alarm)
            say(f"alarm after {stats.trajectory!r}: {stats.alarm}")

    def _due(self) -> bool:
        """Whether it is time to save; when that is changes no number."""
        wanted, (moment, position) = self.experiment.config.checkpoint, self._saved
        many = wanted.updates is not None and self.position - position >= wanted.updates
        return many or time.monotonic() - moment > wanted.seconds

    def _experience(self, step: Update) -> Trajectory:
        """The step's trajectory; where the model acts, its episode, played when its round is due."""
        with self.measures.phase(ACTING) if self.rounds is not None else nullcontext():
            return self._learned(step.phase, step.trajectory)

    def start_again(self) -> None:
        """Back to the base, with nothing learned; the next task is learned as if it were the only one."""
        with self.interrupt.protected():
            self.updates_before += self.learner.version
            self.tokens_before += self.learner.tokens
            assert self.start is not None
            self.learner.rollback(self.start)
            if self.experiment.canaries is not None:
                self.experiment.canaries.restart_()
            self.position += 1
        self._save()

    def begin_task(self, step: BeginTask) -> None:
        """Methods hear that a task begins."""
        with self.interrupt.protected():
            start = time.perf_counter()
            with self.measures.phase(LEARNING):
                self.learner.begin_task(step.task, upcoming=step.upcoming)
            self._log_methods("begin", step.task, time.perf_counter() - start)
            self.position += 1

    def end_task(self, step: EndTask) -> None:
        """What waits is learned, and methods hear that a task ends."""
        self._flush_learner(step.task)
        trajectories = [self._learned(*each) for each in step.learned]
        with self.interrupt.protected():
            start = time.perf_counter()
            with self.measures.phase(LEARNING):
                done, stopped = _unless_stopped(partial(self.learner.end_task, step.task, trajectories))
            seconds = time.perf_counter() - start
            for stats in done if isinstance(done, tuple) else (done,):
                self._record(stats, step.task)
                seconds -= stats.seconds
            self.stopped = None if stopped is None else str(stopped)
            if stopped is None:
                self._log_methods("end", step.task, seconds)
                self.position += 1
        if stopped is not None:
            raise stopped

    def _learned(self, phase: int, trajectory: Trajectory | Planned) -> Trajectory:
        if isinstance(trajectory, Trajectory):
            return trajectory
        assert self.rounds is not None
        return self.rounds.trajectory(trajectory, phase=phase)

    def _log_methods(self, when: str, task: str, seconds: float) -> None:
        """What the methods need, where a task begins or ends."""
        costs = {f"methods/{name}/{key}": value for name, cost in self._costs().items() for key, value in cost.items()}
        record = {**costs, **self.measures.spent(), "seconds/methods": seconds}
        self._log({"kind": "methods", "when": when, "task": task, **record})

    def _costs(self) -> dict[str, dict[str, int]]:
        """Method -> bytes stored now, and tokens read beside the updates' own."""
        return {name: asdict(cost) for name, cost in self.learner.cost().items()}

    def memorize(self) -> None:
        """One step of the memory's training."""
        training = self.experiment.memorizing
        assert training is not None
        with self.interrupt.protected():
            start = time.perf_counter()
            with self.measures.phase(MEMORY):
                done = training.step_()
            record = {"memory/step": training.done, "memory/train_kl": done.loss, "memory/grad_norm": done.grad_norm}
            self._log({"kind": "memory_step", **record, "seconds/memory": time.perf_counter() - start})
            self.position += 1
        if self._due():
            self._save()

    def measure_memory(self, when: str) -> None:
        """What the memory is worth on held-out long texts, before its training and after; then it is on disk."""
        training = self.experiment.memorizing
        assert training is not None
        with self.interrupt.protected():
            start = time.perf_counter()
            with self.measures.phase(EVALUATION):
                self.recall[when] = training.measure()
            seconds = time.perf_counter() - start
            self._log({"kind": "memory", "when": when, **self.recall[when], "seconds/memory": seconds})
            self.position += 1
        self._save()

    def check_canaries(self) -> None:
        """Losses, flips and forgetting on the small fixed set."""
        with self.interrupt.protected():
            start = time.perf_counter()
            assert self.experiment.canaries is not None
            with self.measures.phase(EVALUATION):
                reading = self.experiment.canaries.score(self.experiment.adapter.model, self._answering())
            seconds = time.perf_counter() - start
            self._log({"kind": "canaries", **reading.record(), "seconds/canaries": seconds})
            self.ledger.note("canaries", reading.record())
            self.position += 1

    def smoke(self) -> None:
        """The few items of lm-evaluation-harness."""
        with self.interrupt.protected():
            start = time.perf_counter()
            with self.measures.phase(EVALUATION):
                found = self.measures.smoke()
            self._log({"kind": "harness", **found, "seconds/harness": time.perf_counter() - start})
            self.position += 1

    def evaluate(self, row: str) -> None:
        """One row of R and what else is measured with it, and the state on disk."""
        self._flush_learner(row)
        start, number = time.perf_counter(), len(self.matrix.rows)
        material = self.experiment.material
        with ExitStack() as kept:
            with self.measures.phase(EVALUATION):
                scores = material.board.score(self.experiment.adapter.model, self._answering())
                reading = self.measures.at_row(Place(row, number, last=number == len(material.tasks)))
                kept.enter_context(self.interrupt.protected())  # what is counted is also recorded
            self.matrix = self.matrix.with_row(row, scores)
            self.matrix.save(self.folder.path / "R.json")
            for name, (columns, rows) in reading.tables.items():
                self.tracker.table(name, columns, rows)
            record = {**task_end_record(self.matrix, general=material.general), **reading.record}
            record |= {**self.measures.totals(), "seconds/evaluation": time.perf_counter() - start}
            self._log({"kind": "evaluation", "row": row, **record})
            self.measures.write(self.folder.path)
            self.position += 1
        self._save()

    def _answering(self) -> Any:
        """How questions are answered with the run's methods; None where none of them has a say."""
        return answering_in(self.learner.answering(), self.experiment.material.segments)

    def _flush_learner(self, task: str) -> None:
        """The step of experiences that wait for others, so that what is scored has learned from all of them."""
        if not self.learner.pending:
            return
        with self.interrupt.protected():
            with self.measures.phase(LEARNING):
                stats, stopped = _unless_stopped(self.learner.flush)
            assert stats is not None
            self._record(stats, task)
            self.stopped = None if stopped is None else str(stopped)
        if stopped is not None:
            raise stopped

    def finish(self) -> RunResult:
        """Adapter, tables, pictures, summary, report."""
        path = self.folder.path
        self.closing = True  # the last evaluation has saved the state
        with self.interrupt.protected():
            self.learner.save_adapter(path / "adapter")
            if self.learner.memory is not None:
                self.learner.memory.save(path / "memory")
            adapter = self.experiment.adapter
            if adapter.spans() and (features := adapter.report(20).to_dicts()):
                self.tracker.table("features", list(features[0]), [list(row.values()) for row in features])
            self.tracker.table("R", ("row", "column", "score"), long_rows(self.matrix))
            self._flush()
            self.measures.write(path)
            pictures = draw_plots(path)
            for picture in pictures.values():
                self.tracker.image(f"plots/{picture.stem}", picture)
            summary = self._summary()
            if len(self.matrix.rows) > 1:
                card = card_table(report_card(path, summary=summary).to_dict())
                self.tracker.table("report_card", card.columns, card.rows)
            self.tracker.finish(summary)
            write_report(path, summary=summary, pictures=pictures)
            self._close()
            write_json(path / "summary.json", summary)  # the last of all: with it, the run is finished
        return RunResult.load(path)

    def _summary(self) -> dict[str, Any]:
        """The final numbers; no times, so that the same seed gives the same file."""
        adapter, material = self.experiment.adapter, self.experiment.material
        config, stored = self.experiment.config, stored_bytes(self.folder.path)
        return {
            "study": config.study,
            "arm": config.arm,
            "seed": config.seed,
            "config_digest": config.digest,
            **{key: self.experiment.facts[key] for key in ("model_digest", "stream_digest", "directions_digest")},
            **matrix_summary(self.matrix, material.probes, alone=config.stream.setting == "alone"),
            **({"relations": relations} if (relations := material.relations.to_dict()) else {}),
            "delta_norm": adapter.delta_norm(),
            "trained_parameters": sum(parameter.numel() for parameter in adapter.parameters()),
            "leak": self.measures.leak.report(),
            "updates": self.updates_before + self.learner.version,
            "tokens": self.tokens_before + self.learner.tokens,
            "tokens_left_out": self.left_out,
            "quarantined": self.quarantined,
            **({"alarms": self.learner.guard.alarms} if self.learner.guard is not None else {}),
            **({"memory": self._memory()} if self.learner.memory is not None else {}),
            **({"methods": self._costs()} if self.learner.methods else {}),
            "stored_bytes": {name: stored[name] for name in ("adapter", "memory") if name in stored},
            **self.measures.summary(),
        }

    def _memory(self) -> dict[str, Any]:
        """Sizes, and what it was worth on held-out long texts."""
        memory = self.learner.memory
        trained = sum(parameter.numel() for parameter in memory.parameters())
        return {"trained_parameters": trained, "state_bytes": memory.memory.initial_state(1).nbytes, **self.recall}

    # --- records and state

    def _log(self, record: Mapping[str, Any]) -> None:
        tokens = self.tokens_before + self.learner.tokens
        self.tracker.log({**record, TOKENS_SEEN: tokens}, self.updates_before + self.learner.version)

    def _open_trackers(self, history: Sequence[Mapping[str, Any]]) -> Trackers:
        config, path = self.experiment.config, self.folder.path
        self.metrics = JsonlTracker(path / "metrics.jsonl")
        names, wanted = RunNames.of(config.to_dict()), config.tracking
        others = open_backends(path, names, wandb=wanted.wandb, backends=wanted.backends, history=history)
        return Trackers(self.metrics, *others)

    def _flush(self) -> None:
        self.metrics.flush(sync=True)

    def _close(self, kind: type[BaseException] | None = None) -> None:
        """Close what is open; on a disk that takes no more, its own error stands."""
        with suppress(OSError) if kind is not None and issubclass(kind, OSError) else nullcontext():
            self.tracker.finish({})
        self.measures.close()
        self.ledger.close()
        self.ahead.close()

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
            self._saved = (time.monotonic(), self.position)

    def _write(self, target: Path) -> None:
        canaries = self.experiment.canaries
        self.learner.save(target / "learner")
        if self.experiment.memorizing is not None:
            self.experiment.memorizing.save(target / MEMORIZED)
        if self.matrix.rows:
            self.matrix.save(target / "R.json")
        session = {name: getattr(self, name) for name in COUNTERS}
        best = None if canaries is None else canaries.state_dict()
        quarantine = self.folder.path / QUARANTINE
        session |= {
            "lines": self.metrics.lines,
            "ledger": self.ledger.position(),
            "quarantine": quarantine.stat().st_size if quarantine.is_file() else 0,
            "canaries": best,
            "measures": self.measures.state(),
        }
        write_json(target / "session.json", session)

    def _restore(self, state: Path) -> tuple[dict[str, Any], ...]:
        """Go on from a checkpoint; returns the records up to it."""
        session = read_state(state / "session.json", *COUNTERS, "lines", "ledger", "quarantine", "canaries")
        for name in COUNTERS:
            setattr(self, name, session[name])
        if (state / "R.json").is_file():
            self.matrix = ScoreMatrix.load(state / "R.json")
        self.measures.resume_(session.get("measures", {}), self.matrix.rows, partial(read_rows, self.folder.path))
        if self.experiment.memorizing is not None:
            self.experiment.memorizing.restore_(state / MEMORIZED)
        self.learner.reconfigure(**self.experiment.phases[self.phase])  # says which teachers the state is asked for
        self.learner.restore_(state / "learner")
        self.ledger.cut_back_(session["ledger"])
        quarantine = self.folder.path / QUARANTINE
        if quarantine.is_file():  # a power cut may have left less of it than the checkpoint knew: never pad with zeros
            os.truncate(quarantine, min(quarantine.stat().st_size, session["quarantine"]))
        self.begun = self.ahead.read()
        if self.experiment.canaries is not None:
            self.experiment.canaries.load_state_dict(session["canaries"])
        return cut_back(self.folder.path / "metrics.jsonl", lines=session["lines"]).kept

    def _say_resumed(self, differs: Sequence[str]) -> None:
        """That the run goes on, what it was doing, and why its last bits may not be those of an uninterrupted run."""
        begun = self.begun
        ended = "was interrupted" + (f", while learning from {begun.trajectory.get('id')!r}" if begun else "")
        if self.stopped is not None:
            ended = f"was stopped by its guard ({self.stopped})"
        say(f"{self.folder.path} {ended}; going on after {self.learner.version} updates")
        if differs:
            say(f"resumed under other conditions ({'; '.join(differs)}): the numbers may differ in their last bits "
                "from those of a run that was not interrupted")  # fmt: skip


def _unless_stopped(update: Callable[[], T]) -> tuple[T | UpdateStats, Stopped | None]:
    """What an update measured, and the guard's word if it stopped after it: an update it is all the same."""
    try:
        return update(), None
    except Stopped as stopped:
        if stopped.stats is None:
            raise
        return stopped.stats, stopped
