"""Cartridges: what was seen becomes a trained prefix of keys and values, much smaller than the texts themselves.

    start     Z = keys and values of the first p tokens of the corpus
    study     conversations x that the model has with itself, with a random part c of the corpus in front of it
    train     min over Z of  Σ_x Σ_i KL( model(· | c, x_<i) ‖ model(· | Z, x_<i) )        Z's first token stays as it is

The weights do not move; the prefix then acts in every forward pass, as if the corpus stood in front. It comes before a
prompt's own start token, as the corpus does for the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.conversing import converse
from featcl.methods.method import Cost, View
from featcl.methods.outside import Outside, in_front
from featcl.methods.prefix import Prefix, attached, read_prefix
from featcl.methods.texts import FORMS, Texts, pieces
from featcl.objectives.experience import Experience, Student, divergence_sum
from featcl.objectives.scoring import TokenBatch, pack_group
from featcl.streams.chat import Chat, Encoded
from featcl.streams.messages import Message

BATCH = 8  # conversations per step


@dataclass(frozen=True, eq=False)
class Lesson:
    """Conversations as the student reads them, and what the teacher, with the corpus in front, makes of them."""

    batch: TokenBatch
    seen: Tensor


class Cartridge(Outside):
    """Keeps the stream's texts as a corpus and trains a prefix on it, at the end of each task.

    Args:
        tokens: p, length of the prefix; fewer where the corpus is shorter.
        samples: Conversations that the model has with itself.
        steps: Of Adam, each on a batch of 8 of them; 0 leaves the prefix as it starts.
        lr: Of Adam.
        chunk: Tokens of the corpus in front of a conversation, at most; None: as many as leave room for it.
        every: Train also after so many experiences; None: at the end of a task only.
        max_new_tokens: Longest turn of a conversation.
        form: What the corpus holds of a trajectory, as for `InContext`.
        budget_bytes: Of the corpus.
        joiner: Stands between two texts.

    Raises:
        FeatclError: For a number out of range or an unknown form; with a learner whose context the prefix would fill.

    Source: Eyuboglu et al. 2025, arXiv:2506.06266, sections 3 and 4. PEFT has the same prefix (CARTRIDGE), but applies
    it in PeftModel.forward alone, which neither scoring nor decoding here goes through.
    """

    name = "cartridge"

    def __init__(
        self,
        *,
        tokens: int = 64,
        samples: int = 64,
        steps: int = 100,
        lr: float = 1e-2,
        chunk: int | None = None,
        every: int | None = None,
        max_new_tokens: int = 32,
        form: str = "exchanges",
        budget_bytes: int = 1 << 20,
        joiner: str = "\n",
    ) -> None:
        checks.count(self.name, tokens=tokens, samples=samples, chunk=chunk, every=every, max_new_tokens=max_new_tokens)
        checks.choice(self.name, FORMS, form=form)
        checks.positive(self.name, lr=lr)
        if not isinstance(steps, int) or steps < 0:
            raise FeatclError(f"cartridge: steps must be a whole number, at least 0, got {steps!r}")
        self.tokens, self.samples, self.steps, self.lr, self.every = tokens, samples, steps, lr, every
        self.chunk, self.max_new_tokens, self.form, self.joiner = chunk, max_new_tokens, form, joiner
        self.texts = Texts(budget_bytes=budget_bytes, owner=self.name)
        self.prefix: Prefix | None = None
        self._unread = self._studies = self._forward = self._backward = 0

    def refuse(self, view: View) -> None:
        """A prefix that is as long as the model's context."""
        if self.tokens >= view.student.max_length:
            raise FeatclError(
                f"cartridge: a prefix of {self.tokens} tokens leaves nothing of the model's context of "
                f"{view.student.max_length}; give fewer tokens"
            )

    def taken(self) -> int:
        """The prefix's."""
        return 0 if self.prefix is None else self.prefix.tokens

    @contextmanager
    def around(self, view: View) -> Iterator[None]:
        """The prefix acts, once there is one."""
        if self.prefix is None:
            yield
            return
        with attached(view.student.scorer.causal, self.prefix):
            yield

    def remember_(self, experience: Experience, view: View) -> None:
        """Add to the corpus; train, if it is time."""
        self.texts.add_(pieces(experience.trajectory, self.form), experience.trajectory.id)
        self._unread += 1
        if self.every is not None and self._unread >= self.every:
            self.study_(view)

    def end_task_(self, task: str, experiences: Sequence[Experience], view: View) -> None:
        """Train on all there is, if there is something new."""
        if self._unread:
            self.study_(view)

    def study_(self, view: View) -> None:
        """Make a prefix of the present corpus."""
        student = view.student
        ids = corpus_ids(student.chat, self.joiner.join(each.text for each in self.texts.kept))[: self.tokens]
        prefix = read_prefix(student.scorer.causal, ids)
        self._forward += len(ids)
        if self.steps and prefix.rest.shape[3]:
            prefix = self._trained(prefix, self._lessons(view), student)
        self.prefix = Prefix(prefix.sink.detach(), prefix.rest.detach())
        self._unread, self._studies = 0, self._studies + 1

    def _lessons(self, view: View) -> list[Lesson]:
        """Conversations of the model with itself on random parts of the corpus, in batches."""
        student, purpose = view.student, f"cartridge/{self._studies}"
        parts = [self._part(student, view.generator(f"{purpose}/part/{place}")) for place in range(self.samples)]
        written = converse(
            student, parts, max_new_tokens=self.max_new_tokens, generator=view.generator(f"{purpose}/converse")
        )
        self._forward += written.tokens
        if not written.conversations:
            raise FeatclError("cartridge: the model says nothing about the corpus, so there is nothing to study")
        pairs = []
        for place, messages in zip(written.places, written.conversations, strict=True):
            own, before = student.chat.encode(messages, mask="all"), corpus_ids(student.chat, parts[place])
            told = Encoded([*before, *own.input_ids], [False] * len(before) + own.loss_mask)
            pairs.append((own, told))
        return [self._lesson(pairs[start : start + BATCH], student) for start in range(0, len(pairs), BATCH)]

    def _part(self, student: Student, generator: torch.Generator) -> str:
        """Texts of the corpus in random order, as many as leave room for a conversation."""
        order = torch.randperm(len(self.texts.kept), generator=generator).tolist()
        texts = [self.texts.kept[place].text for place in order]
        question: list[Message] = [{"role": "user", "content": "a"}]
        room = student.max_length - 4 * self.max_new_tokens - 32
        if self.chunk is not None:
            room = min(room, len(student.chat.prompt(question)) + self.chunk)
        asked = in_front(student.chat, question, texts, room=room, joiner=self.joiner)
        if len(asked) == 1:
            raise FeatclError(
                f"cartridge: no text of the corpus fits {room} tokens; use shorter turns or a larger chunk"
            )
        return asked[0]["content"]

    def _lesson(self, pairs: Sequence[tuple[Encoded, Encoded]], student: Student) -> Lesson:
        own, told = (pack_group(group, device=student.scorer.device) for group in zip(*pairs, strict=True))
        self._forward += told.input_ids.numel()
        with torch.no_grad():
            return Lesson(own, student.scorer.hidden(told))

    @torch.enable_grad()
    def _trained(self, prefix: Prefix, lessons: Sequence[Lesson], student: Student) -> Prefix:
        """Context distillation into the prefix; gradients reach nothing else."""
        rest = prefix.rest.clone().requires_grad_()
        optimizer = torch.optim.Adam([rest], lr=self.lr)
        for step in range(self.steps):
            lesson = lessons[step % len(lessons)]
            loss = distance(Prefix(prefix.sink, rest), lesson, student)
            [rest.grad] = torch.autograd.grad(loss, [rest])
            optimizer.step()
            self._forward += lesson.batch.input_ids.numel()
            self._backward += lesson.batch.input_ids.numel()
        return Prefix(prefix.sink, rest)

    def cost(self) -> Cost:
        """Corpus and prefix; studying."""
        prefix = 0 if self.prefix is None else self.prefix.nbytes
        return Cost(self.texts.nbytes + prefix, self._forward, self._backward)

    def state(self) -> dict[str, Any]:
        """The corpus, and counters."""
        counters = [self._unread, self._studies, self._forward, self._backward]
        return {"texts": self.texts.state(), "counters": counters}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back; `load_tensors_` has to follow."""
        self.texts.load_state_(state["texts"])
        self._unread, self._studies, self._forward, self._backward = state["counters"]
        self.prefix = None

    def tensors(self) -> dict[str, Tensor]:
        """The prefix."""
        return {} if self.prefix is None else {"sink": self.prefix.sink, "rest": self.prefix.rest}

    def load_tensors_(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `tensors` back."""
        self.prefix = Prefix(tensors["sink"], tensors["rest"]) if "rest" in tensors else None


def corpus_ids(chat: Chat, text: str) -> list[int]:
    """A corpus as the model reads it in front of a conversation: a system message, or a user's where there is none."""
    return chat.encode([{"role": "system", "content": text}], mask="none").input_ids


def distance(prefix: Prefix, lesson: Lesson, student: Student) -> Tensor:
    """Mean KL(with the corpus ‖ with the prefix) over the tokens of the conversations, in nats."""
    scorer = student.scorer
    with attached(scorer.causal, prefix):
        hidden = scorer.hidden(lesson.batch)
    return divergence_sum(hidden, lesson.seen, scorer, scorer, alpha=0.0) / lesson.batch.tokens
