"""A skill file: short rules, written from feedback, counted as they help or harm, and read before every answer.

    lesson of a trajectory       its feedback, else its note (meta["context"]), one rule per sentence; or one that the
                                 model writes from them
    a rule that is there         helpful + 1
    a new rule                   joins the file
    a judged trajectory          rules in play, most of whose words occur in it: helpful + 1 (reward > 0), harmful + 1
                                 (reward < 0)
    a file beyond its budget     the rule with the smallest helpful − harmful goes, of equals the oldest

Rules are never written anew as a whole, so that what was learned is not lost by being summarised again and again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from featcl.errors import FeatclError
from featcl.methods import checks
from featcl.methods.bm25 import words
from featcl.methods.in_context import ROOM_FOR_REPLY
from featcl.methods.method import Cost, View
from featcl.methods.outside import Outside, in_front
from featcl.methods.texts import note, sentences
from featcl.methods.writing import written
from featcl.objectives.experience import Experience
from featcl.streams.messages import Message
from featcl.streams.texts import message_text
from featcl.streams.trajectory import Trajectory

WRITERS = ("feedback", "model")
ASK = "write one short rule for next time from this feedback: "


@dataclass(frozen=True)
class Rule:
    """One line of the file.

    Attributes:
        text: As it is read.
        helpful, harmful: How often it was confirmed, or was in play when the reward was good or bad.
    """

    text: str
    helpful: int = 0
    harmful: int = 0

    @property
    def nbytes(self) -> int:
        """Of its line in the file."""
        return len(self.line.encode("utf-8", "surrogatepass")) + 1

    @property
    def line(self) -> str:
        """With its counts."""
        return f"- [+{self.helpful} -{self.harmful}] {self.text}"


class SkillFile(Outside):
    """Keeps a file of rules, and puts it in front of every prompt.

    Args:
        budget_bytes: Of the whole file.
        writer: `feedback`: rules are what was said; `model`: the model writes one from it.
        joiner: Stands between two rules in the prompt.
        max_new_tokens: Longest rule that the model writes.
        reply_tokens: Kept free for the reply.
        frozen: Whether the weights stand still.

    Raises:
        FeatclError: For an unknown writer or a budget of zero.

    Source: Zhang et al. 2025, Agentic Context Engineering, arXiv:2510.04618 (itemised rules with counters, changed
    one by one); rules from feedback: Shinn et al. 2023, Reflexion, arXiv:2303.11366.
    """

    name = "skill_file"

    def __init__(
        self,
        *,
        budget_bytes: int = 4096,
        writer: str = "feedback",
        joiner: str = "\n",
        max_new_tokens: int = 48,
        reply_tokens: int = ROOM_FOR_REPLY,
        frozen: bool = True,
    ) -> None:
        checks.choice(self.name, WRITERS, writer=writer)
        checks.count(self.name, budget_bytes=budget_bytes, max_new_tokens=max_new_tokens, reply_tokens=reply_tokens)
        self.budget_bytes, self.writer, self.joiner = budget_bytes, writer, joiner
        self.max_new_tokens, self.reply_tokens, self.frozen = max_new_tokens, reply_tokens, frozen
        self.rules: tuple[Rule, ...] = ()  # oldest first
        self._forward = 0

    @property
    def file(self) -> str:
        """The file as Markdown; its bytes are what the budget bounds."""
        return "".join(f"{rule.line}\n" for rule in self.rules)

    def uses(self, trajectory: Trajectory) -> bool:
        """What was said about a reply is a rule, and a reward counts, whatever the reply was worth."""
        return self.frozen and bool(trajectory.feedback or trajectory.reward)

    def context(self, messages: Sequence[Message], view: View) -> Sequence[Message]:
        """The conversation with the rules in front; where not all fit, those that helped most."""
        order = sorted(range(len(self.rules)), key=lambda place: (_worth(self.rules[place]), place), reverse=True)
        room = view.student.max_length - self.reply_tokens
        texts = [self.rules[place].text for place in order]
        return in_front(view.student.chat, messages, texts, room=room, joiner=self.joiner)

    def remember_(self, experience: Experience, view: View) -> None:
        """Count the rules in play, and add what there is to learn."""
        trajectory = experience.trajectory
        if trajectory.reward:
            self._judge_(trajectory)
        if lesson := trajectory.feedback or note(trajectory):
            written = lesson if self.writer == "feedback" else self._write_(trajectory, lesson, view)
            for text in sentences(written):
                self._add_(text, trajectory.id)

    def _judge_(self, trajectory: Trajectory) -> None:
        said = set(words(" ".join(message_text(message) for message in trajectory.messages) + (trajectory.text or "")))
        good = (trajectory.reward or 0.0) > 0
        self.rules = tuple(
            replace(rule, helpful=rule.helpful + good, harmful=rule.harmful + (not good))
            if _in_play(rule, said)
            else rule
            for rule in self.rules
        )
        self._cut_()  # counts have digits too

    def _add_(self, text: str, source: str) -> None:
        known = {rule.text.casefold(): rule for rule in self.rules}
        if (rule := known.get(text.casefold())) is not None:
            self.rules = (*(each for each in self.rules if each is not rule), replace(rule, helpful=rule.helpful + 1))
        else:
            rule = Rule(text)
            if rule.nbytes > self.budget_bytes:
                raise FeatclError(
                    f"skill_file: a rule of {source!r} has {rule.nbytes} bytes, the file's budget is "
                    f"{self.budget_bytes}"
                )
            self.rules = (*self.rules, rule)
        self._cut_()

    def _cut_(self) -> None:
        while sum(rule.nbytes for rule in self.rules) > self.budget_bytes:
            worst = min(range(len(self.rules)), key=lambda place: (_worth(self.rules[place]), place))
            self.rules = (*self.rules[:worst], *self.rules[worst + 1 :])

    def _write_(self, trajectory: Trajectory, lesson: str, view: View) -> str:
        """What the present model makes of it."""
        asked = [*trajectory.messages, {"role": "user", "content": f"{ASK}{lesson}"}]
        text, tokens = written(view.student, asked, max_new_tokens=self.max_new_tokens)
        self._forward += tokens
        return text

    def cost(self) -> Cost:
        """The file, and what was read and written to write rules."""
        return Cost(sum(rule.nbytes for rule in self.rules), self._forward)

    def state(self) -> dict[str, Any]:
        """The rules."""
        return {"rules": [[rule.text, rule.helpful, rule.harmful] for rule in self.rules], "forward": self._forward}

    def load_state_(self, state: Mapping[str, Any]) -> None:
        """Put `state` back."""
        self.rules, self._forward = tuple(Rule(*rule) for rule in state["rules"]), state["forward"]


def _worth(rule: Rule) -> int:
    return rule.helpful - rule.harmful


def _in_play(rule: Rule, said: set[str]) -> bool:
    """Whether at least half of its words were said."""
    own = set(words(rule.text))
    return bool(own) and 2 * len(own & said) >= len(own)
