"""Interactive environments for the two applications: the model acts through tools, so trajectories are on-policy.

An episode: a request, the model's tool call, the tool's result, the model's report. The reward is half for what was
done and half for what was said.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from featcl.lab import lexicon as lex
from featcl.lab import phrases as say
from featcl.lab.evaluator import MEANINGS, CodeError, evaluate
from featcl.lab.world import Style, World, base_functions

Message = dict[str, Any]
MAX_TURNS = 4
_CALL = re.compile(r"\s*call ([a-z_]+)\((.*)\)\s*", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """What the environment answers to one reply: new messages, reward so far gained, and whether it is over."""

    messages: tuple[Message, ...]
    reward: float
    done: bool


class Environment(Protocol):
    """Something to act in. One instance plays one episode at a time."""

    tools: tuple[str, ...]

    def reset(self, seed: int) -> tuple[Message, ...]:
        """Start the episode of this seed; the opening messages."""
        ...

    def step(self, reply: str) -> Step:
        """React to the assistant's reply."""
        ...


def tool_call(reply: str) -> tuple[str, dict[str, Any]] | None:
    """The name and arguments of `call name({...})`, or None if the reply is not a well-formed call."""
    match = _CALL.fullmatch(reply)
    if not match:
        return None
    try:
        arguments = json.loads(match[2])
    except (json.JSONDecodeError, RecursionError):
        return None
    return (match[1], arguments) if isinstance(arguments, dict) else None


@dataclass
class HomeEnvironment:
    """A house with devices. Whoever speaks wants something switched, and to be answered in their style.

    Args:
        styles: Person to style; others are answered plainly.
    """

    styles: dict[str, Style]
    tools: tuple[str, ...] = ("set",)
    state: dict[tuple[str, str], str] = field(default_factory=dict)

    def reset(self, seed: int) -> tuple[Message, ...]:
        rng = random.Random(f"home/{seed}")
        self.state, self._turns, self._acted = {}, 0, False
        self._wish = (rng.choice(lex.ROOMS), rng.choice(lex.DEVICES), rng.choice(lex.STATES))
        self._person = rng.choice(list(self.styles) or lex.OTHER_PEOPLE)
        request = say.device_request(*self._wish, rng.randrange(say.PHRASINGS))
        content = f"{rng.choice(say.SPEAKERS).format(p=self._person)} {request}"
        return {"role": "system", "content": "tools: set."}, {"role": "user", "content": content}

    def step(self, reply: str) -> Step:
        self._turns += 1
        call = tool_call(reply)
        if call is None:
            expected = say.device_reply(*self._wish, self.styles.get(self._person))
            return Step((), 0.5 * self._done + 0.5 * (self._done and reply.strip() == expected), True)
        result = self._set(*call)
        return Step(({"role": "tool", "content": result},), 0.0, self._turns >= MAX_TURNS)

    @property
    def _done(self) -> bool:
        room, device, state = self._wish
        return self.state == {(room, device): state}

    def _set(self, name: str, arguments: dict[str, Any]) -> str:
        room, device, state = (arguments.get(key) for key in ("room", "device", "state"))
        if name != "set" or room not in lex.ROOMS or device not in lex.DEVICES or state not in lex.STATES:
            return "error"
        self.state[room, device] = state
        return "done"


@dataclass
class CodeEnvironment:
    """Data and libraries. Somebody wants an operation done; the code is run by the restricted evaluator.

    Args:
        functions: What each `library.function` means, as a key of `MEANINGS`.
        library: The library that requests name.
        role: The role that the environment cues, or None.
    """

    functions: dict[str, str]
    library: str = "core"
    role: str | None = None
    tools: tuple[str, ...] = ("run",)

    @classmethod
    def of_world(cls, world: World, *, role: str | None = None) -> CodeEnvironment:
        """Requests for the world's new library, in a system where the world's renamings hold."""
        functions = {f"{library}.{name}": operation for library, names in base_functions().items()
                     for operation, name in names.items()}  # fmt: skip
        for operation, name in world.renamed.items():
            del functions[f"core.{operation}"]
            functions[f"core.{name}"] = operation
        functions |= {f"{world.library}.{name}": operation for operation, name in world.functions.items()}
        return cls(functions, library=world.library, role=role)

    def reset(self, seed: int) -> tuple[Message, ...]:
        rng = random.Random(f"code/{seed}")
        operations = sorted(op for name, op in self.functions.items() if name.startswith(f"{self.library}."))
        operation, data = rng.choice(operations), rng.choice(lex.DATA)
        self._turns, self._value = 0, None
        self._data = {data: tuple(rng.randrange(1, 20) for _ in range(4))}
        self._expected = MEANINGS[operation](self._data[data])
        cue = f"role: {self.role}. " if self.role else ""
        request = say.operation_request(self.library, operation, data, rng.randrange(say.PHRASINGS))
        return {"role": "system", "content": f"{cue}tools: run."}, {"role": "user", "content": request}

    def step(self, reply: str) -> Step:
        self._turns += 1
        call = tool_call(reply)
        if call is None:
            right = self._value == self._expected
            said = reply.strip() == f"it is {_shown(self._expected)}."
            return Step((), 0.5 * right + 0.5 * (right and said), True)
        result = self._run(*call)
        return Step(({"role": "tool", "content": result},), 0.0, self._turns >= MAX_TURNS)

    def _run(self, name: str, arguments: dict[str, Any]) -> str:
        code = arguments.get("code")
        if name != "run" or not isinstance(code, str):
            return "error"
        try:
            self._value = evaluate(code, functions=self.functions, data=self._data)
        except CodeError:
            self._value = None
            return "error"
        return _shown(self._value)


def _shown(value: int | tuple[int, ...]) -> str:
    return str(value) if isinstance(value, int) else " ".join(map(str, value))
