"""How questions are answered with methods: what the model is asked, and under which state of the adapter.

    asked = answering.asked(messages)                          contexts in front; outside of any block
    for places, state in answering.grouped(conversations, tasks):
        with state:                                            the adapter that answers these, everything around it
            … score or generate the conversations at these places

Where no method answers otherwise (`answering.plain`), what is asked is the conversation itself, and there is one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from featcl.errors import FeatclError
from featcl.methods.method import Method, View, overrides
from featcl.streams.messages import Message

Keys = tuple[str | None, ...]  # one per method that routes
Group = tuple[tuple[int, ...], AbstractContextManager[None]]


class Answering:
    """What methods do where the model is asked.

    Args:
        methods: The learner's, in the order in which they act.
        view: The learner, as methods see it.
    """

    def __init__(self, methods: Sequence[Method], view: View) -> None:
        self.methods, self.view = tuple(methods), view
        self._contexts = [method for method in methods if overrides(method, "context")]
        self._arounds = [method for method in methods if overrides(method, "around")]
        self._routers = [method for method in methods if overrides(method, "route")]

    @property
    def plain(self) -> bool:
        """Whether no method has a say: the model is asked as it is."""
        return not (self._contexts or self._arounds or self._routers)

    @property
    def same_prompts(self) -> bool:
        """Whether the model is asked the conversations themselves."""
        return not self._contexts

    @property
    def taken(self) -> int:
        """Tokens of the model's context that are not there for a question and its answer."""
        return sum(method.taken() for method in self._arounds)

    def asked(self, messages: Sequence[Message], task: str | None = None) -> Sequence[Message]:
        """What the model is asked in place of a conversation; `messages` itself where nothing is put in front."""
        for method in self._contexts:
            messages = method.context(messages, self.view)
        return messages

    def grouped(
        self, conversations: Sequence[Sequence[Message]], tasks: Sequence[str | None] | None = None
    ) -> list[Group]:
        """Which questions are answered under which adapter.

        Args:
            conversations: The questions, as they were before `asked`.
            tasks: Where each comes from; None: nobody knows.

        Returns:
            Places and a block, in which the adapter they are routed to is the present one and all that methods put
            around a forward pass acts. Together the places are all of them, each once. A block can be entered once.

        Raises:
            FeatclError: If there is not one task per conversation.
        """
        known = [None] * len(conversations) if tasks is None else list(tasks)
        if len(known) != len(conversations):
            raise FeatclError(f"{len(conversations)} conversations and {len(known)} tasks: give one for each")
        if not self._routers:
            return [(tuple(range(len(conversations))), self.around())]
        groups: dict[Keys, list[int]] = {}
        for place, (messages, task) in enumerate(zip(conversations, known, strict=True)):
            keys = tuple(method.route(messages, task, self.view) for method in self._routers)
            groups.setdefault(keys, []).append(place)
        return [(tuple(places), self._under(keys)) for keys, places in groups.items()]

    def of(self, messages: Sequence[Message], task: str | None = None) -> AbstractContextManager[None]:
        """The block in which one conversation is answered."""
        [(_, state)] = self.grouped([messages], [task])
        return state

    @contextmanager
    def around(self) -> Iterator[None]:
        """Inside the block what methods put around a forward pass acts, and the present adapter answers."""
        with ExitStack() as stack:
            for method in self._arounds:
                stack.enter_context(method.around(self.view))
            yield

    @contextmanager
    def _under(self, keys: Keys) -> Iterator[None]:
        """The same, with these adapters in place of the present one."""
        with ExitStack() as stack:
            for method, key in zip(self._routers, keys, strict=True):
                if key is not None:
                    stack.enter_context(method.routed(key, self.view))
            stack.enter_context(self.around())
            yield
