"""`featcl chat`: a conversation with a learner, kept in a folder like a run's, so that it can go on another day.

results/<study>/<arm>/chat-<seed>/
  config.json, env.json, metrics.jsonl, adapter/, ledger/, state/     as a run's: `featcl log` and the like work
  chat.jsonl                                             the journal: what was said and judged, before it acts
  history                                                what was typed
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcl.build import Experiment, build
from featcl.build.methods import own_files
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.files import read_state, write_json
from featcl.learning import Learned, Reply, UpdateStats
from featcl.learning.ledger import RunLedger
from featcl.learning.live import OnText
from featcl.models import max_context
from featcl.studies.ledger import RunLog, log_run
from featcl.tracking import JsonlTracker, cut_back
from featcl.tracking.environment import environment
from featcl.tracking.folder import RunFolder, stopping_cleanly
from featcl.tracking.interrupt import Interruptible
from featcl.tracking.names import TOKENS_SEEN
from featcl.tracking.progress import waiting

JOURNAL, HISTORY = "chat.jsonl", "history"


class ChatSession:
    """A learner, the dialogue that it is in, and their folder.

    Args:
        experiment: The run's objects, at their start.
        folder: Where it writes, entered; a chat in it is continued.
        interrupt: Keeps Ctrl-C out of what must not be torn.
        max_new_tokens: Longest reply.
        temperature: Of replies; 0 is greedy.
        system: What the model is told first in every dialogue.

    Attributes:
        messages: The dialogue so far.
        left_out: How many of its first messages are out of the model's sight.
        redone: What the journal held beyond the state, after a crash, and was done again.
        differs: What decides numbers to the last bit and is not as it was when the chat was begun.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        interrupt: Interruptible,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        system: str | None = None,
    ) -> None:
        self.learner = experiment.learner
        self.folder = folder
        self.interrupt = interrupt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.left_out = 0
        self.differs: list[str] = []
        found, state, lines = {**environment(), **experiment.facts}, folder.state, 0
        if state is None:
            for name in (JOURNAL, HISTORY):
                (folder.path / name).unlink(missing_ok=True)
            folder.start(found)
        frames = experiment.config.tracking.ledger == "coordinates"
        self.ledger = RunLedger(folder.path / "ledger", experiment.adapter, frames=frames)
        if state is not None:
            session = read_state(state / "session.json", "lines", "ledger")
            lines = session["lines"]
            self.learner.restore_(state / "learner")
            self.ledger.cut_back_(session["ledger"])
            self.differs = folder.resume(found, update=self.learner.version)
        self.learner.ledger = self.ledger
        cut_back(folder.path / "metrics.jsonl", lines=lines)
        self.metrics = JsonlTracker(folder.path / "metrics.jsonl")
        self.redone = self.learner.record(folder.path / JOURNAL)
        self._log(self.redone.updates)
        self._go_on()
        self.learn()  # what was judged just before a crash

    # --- talking

    def say(self, text: str, *, on_text: OnText | None = None) -> Reply:
        """The reply to one more message of the user; the dialogue is as before if none comes."""
        self.messages.append({"role": "user", "content": text})
        try:
            reply = self.learner.chat(
                self._in_sight(), max_new_tokens=self.max_new_tokens, temperature=self.temperature, on_text=on_text
            )
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": str(reply)})
        return reply

    def judge(self, *, reward: float | None = None, correction: str | None = None, text: str | None = None) -> Learned:
        """Judge the last reply, and learn from it at once; a correction takes its place in the dialogue.

        Raises:
            FeatclError: If nothing was said yet, or the update fails.
        """
        last = self.learner.conversations.last
        if last is None or not self.messages:
            raise FeatclError("there is no reply to judge yet")
        self.learner.feedback(last.id, reward=reward, correction=correction, text=text)
        if correction is not None and self.messages[-1]["role"] == "assistant":
            self.messages[-1] = {"role": "assistant", "content": correction}
        return self.learn()

    def learn(self) -> Learned:
        """Learn from all that was judged; then the state is saved."""
        with self.interrupt.protected():
            try:
                learned = self.learner.learn()
            except FeatclError as error:
                self._log([stats] if (stats := getattr(error, "stats", None)) else [])
                self.save()
                raise
            self._log(learned.updates)
            self.save()
        return learned

    def undo(self) -> int:
        """Take the last update back; returns the version that is restored."""
        with self.interrupt.protected():
            version = self.learner.undo()
            self.save()
        return version

    def new(self) -> None:
        """Begin another dialogue; what was learned stays."""
        self.messages, self.left_out = [], 0

    def log(self) -> RunLog:
        """The versions in force, newest first."""
        return log_run(self.folder.path)

    # --- keeping

    def save(self) -> None:
        """The state on disk, whole or as it was before."""
        with self.interrupt.protected():
            self.metrics.flush(sync=True)
            self.folder.save_state(self._write)

    def close(self, *, torn: bool = False) -> None:
        """State and adapter on disk; nothing more is written.

        Args:
            torn: The learner was interrupted in the middle of a change: what is on disk stays as it is.
        """
        with self.interrupt.protected():
            if not torn:
                self.save()
                self.learner.save_adapter(self.folder.path / "adapter")
            self.metrics.finish({})
            self.ledger.close()

    def _write(self, target: Path) -> None:
        self.learner.save(target / "learner")
        session = {"phase": 0, "lines": self.metrics.lines, "ledger": self.ledger.position()}
        write_json(target / "session.json", session)

    def _log(self, updates: Sequence[UpdateStats]) -> None:
        for stats in updates:
            record = stats.record()
            seconds = record.pop("seconds")
            kind = "quarantined" if stats.quarantined else "update"
            line = {"kind": kind, **record, TOKENS_SEEN: self.learner.tokens, "seconds/update": seconds}
            self.metrics.log(line, self.learner.version)
            if stats.alarm:
                self.ledger.note("alarm", stats.alarm)

    def _go_on(self) -> None:
        """The dialogue of the last reply, as it was left."""
        last = self.learner.conversations.last
        if last is not None:
            told = last.reply if last.correction is None else last.correction
            said = [dict(message) for message in last.messages if message["role"] != "system"]
            self.messages = [*said, {"role": "assistant", "content": told}]

    def _in_sight(self) -> list[Mapping[str, Any]]:
        """The dialogue, without its beginning where it is too long for the model."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        chat, student = self.learner.student.chat, self.learner.student
        room = max_context(student.scorer.causal) - self.max_new_tokens
        while self.left_out < len(self.messages) - 1:
            seen = [*system, *self.messages[self.left_out :]]
            if len(chat.prompt(seen)) <= room:
                return seen
            self.left_out += 2  # a question and its reply
        return [*system, self.messages[-1]]


@contextmanager
def open_chat(config: RunConfig, *, overwrite: bool = False, **settings: Any) -> Iterator[ChatSession]:
    """A session in `<output>/<study>/<arm>/chat-<seed>`, continued where there is one, saved however it ends.

    Args:
        config: Whose model, features, adapter and learner (its first phase) are talked with.
        overwrite: Start anew, and replace what lies in the folder.
        settings: `max_new_tokens`, `temperature`, `system`.

    Raises:
        FeatclError: Bad input, or the folder holds a chat with another config.
        KeyboardInterrupt: On Ctrl-C or SIGTERM, with the state saved.
    """
    if config.memory is not None and config.memory.train is not None:
        raise FeatclError("chat: memory.train is for featcl run; give memory.path, the folder `memory` of such a run")
    path = config.folder.with_name(f"chat-{config.seed}")
    run_folder = RunFolder(path, config.to_dict(), digest=config.digest, overwrite=overwrite)
    with stopping_cleanly(path), run_folder as folder, Interruptible() as interrupt:
        with waiting("loading the model, selecting features, attaching the adapter"):
            files = own_files(folder.path, resumed=folder.state is not None)
            experiment = build(_without_evaluation(config), files=files)
        session = ChatSession(experiment, folder, interrupt, **settings)
        try:
            yield session
        finally:
            session.close(torn=interrupt.torn)


def _without_evaluation(config: RunConfig) -> RunConfig:
    """Nothing is scored here, so nothing is prepared for it."""
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"canaries": None})})
