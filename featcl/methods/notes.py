"""A notes adapter: the weights learn to write and to read notes, and never the facts that the notes are about.

    the first tasks     read:   its own note among others in front, the conversation to be answered from them
                        write:  conversation, "write a note" → the note
    all later tasks     the weights stand still; the model writes a note of each conversation, and reads the notes that
                        fit a question

In training what is to be said stands in the notes, so that there is nothing to gain from remembering it; the later
tasks test the skill on facts that no gradient has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.in_context import ROOM_FOR_REPLY
from featcl.methods.method import Cost, View
from featcl.methods.outside import in_front, with_messages
from featcl.methods.replay import check_share
from featcl.methods.retrieval import Retrieval
from featcl.methods.texts import pieces
from featcl.methods.tokens import again, tokens_read
from featcl.methods.writing import written
from featcl.objectives.experience import Experience
from featcl.streams.messages import Message
from featcl.streams.trajectory import Trajectory

ASK = "write a note of what is worth keeping."


class Notes(Retrieval):
    """Trains writing and reading notes on the first tasks; from then on only notes are written.

    Args:
        training_tasks: So many tasks train the weights; one that comes again is one of them.
        write_share: Share of an update in training that is writing, in (0, 1).
        form: What is a good note of a trajectory, in training: as for `InContext`.
        by: How notes are found: `bm25` or `embedding`.
        k: Notes in front of a prompt at most; in training one's own and others at random.
        budget_bytes: Of all notes.
        joiner: Stands between two notes.
        max_new_tokens: Longest note that the model writes.

    Raises:
        FeatclError: For a number out of range, an unknown form or search; or in training for raw text, of which no
            note can be written in a conversation.

    Source: ours; notes beside fixed weights: Packer et al. 2023, MemGPT, arXiv:2310.08560.
    """

    name = "notes"

    def __init__(
        self,
        *,
        training_tasks: int = 1,
        write_share: float = 0.5,
        form: str = "auto",
        by: str = "bm25",
        k: int = 8,
        budget_bytes: int = 1 << 20,
        joiner: str = "\n",
        max_new_tokens: int = 64,
        reply_tokens: int = ROOM_FOR_REPLY,
    ) -> None:
        super().__init__(by=by, k=k, form=form, budget_bytes=budget_bytes, joiner=joiner, reply_tokens=reply_tokens)
        checks.count(self.name, training_tasks=training_tasks, max_new_tokens=max_new_tokens)
        self.training_tasks, self.max_new_tokens = training_tasks, max_new_tokens
        self.write_share = check_share(self.name, write_share)
        self._tasks: tuple[str, ...] = ()  # different ones, in the order in which they began
        self._backward = 0
        self.frozen = False

    @property
    def training(self) -> bool:
        """Whether the weights learn in the present task."""
        return not self.frozen

    def begin_task_(self, task: str, view: View, upcoming: Sequence[Experience] = ()) -> None:
        """Train in the first tasks, and stand still in all others."""
        self._tasks = tuple(dict.fromkeys((*self._tasks, task)))
        self.frozen = task not in self._tasks[: self.training_tasks]

    # --- in training

    def learned(self, trajectory: Trajectory, view: View) -> Trajectory:
        """Reading: the conversation with its own note among others in front."""
        if not self.training or not trajectory.messages:
            return super().learned(trajectory, view)
        own = pieces(trajectory, self.form)
        others = [each.text for each in self.texts.kept if each.text not in own]
        generator = view.generator(f"notes/{trajectory.id}")
        chosen = [others[place] for place in torch.randperm(len(others), generator=generator)[: self.k - 1].tolist()]
        shown = in_front(
            view.student.chat, trajectory.messages, [*own, *chosen], room=view.student.max_length, joiner=self.joiner
        )
        return with_messages(trajectory, shown)

    def beside(self, experience: Experience, view: View) -> Sequence[Experience]:
        """Writing: the conversation, and its note as the reply; nothing else of it is a target."""
        trajectory = experience.trajectory
        if not trajectory.messages:
            raise FeatclError(f"notes: {trajectory.id!r} is raw text, of which no note is written; give conversations")
        note = self.joiner.join(pieces(trajectory, self.form))
        messages = [*_untaught(trajectory.messages), {"role": "user", "content": ASK}]
        exercise = with_messages(trajectory, (*messages, {"role": "assistant", "content": note}))
        weight = self.write_share / (1.0 - self.write_share) * experience.weight
        found = again(exercise, view, weight=weight, purpose="notes")
        self._forward += tokens_read(found.batches)
        self._backward += tokens_read(found.batches)
        return (found,)

    def remember_(self, experience: Experience, view: View) -> None:
        """Keep the good note, in training; then the one that the model writes."""
        trajectory = experience.trajectory
        texts = pieces(trajectory, self.form) if self.training else [self.write(trajectory, view)]
        self.keep_(texts, trajectory.id, view)

    def write(self, trajectory: Trajectory, view: View) -> str:
        """The model's own note of a trajectory; raw text is read to it as a user's turn."""
        messages: Sequence[Message] = trajectory.messages or ({"role": "user", "content": trajectory.text},)
        asked = [*messages, {"role": "user", "content": ASK}]
        text, tokens = written(view.student, asked, max_new_tokens=self.max_new_tokens, tools=trajectory.tools)
        self._forward += tokens
        return text

    def cost(self) -> Cost:
        """The notes; writing them, and the exercises."""
        return Cost(self.texts.nbytes, self._forward, self._backward)

    def state(self) -> dict[str, Any]:
        """The notes, and how many tasks there were."""
        return {**super().state(), "tasks": list(self._tasks), "frozen": self.frozen, "backward": self._backward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        super().load_state_(state)
        self._tasks, self.frozen, self._backward = tuple(state["tasks"]), state["frozen"], state["backward"]


def _untaught(messages: Sequence[Message]) -> list[Message]:
    """The same messages, none of which is learned from."""
    return [{**message, "weight": 0} for message in messages]
