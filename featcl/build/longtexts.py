"""The long texts that a memory is trained on: conversations of the laboratory, or files cut to pieces."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from featcl.build.files import paths_of
from featcl.config import MemoryTrainingConfig, RunConfig
from featcl.errors import FeatclError
from featcl.features.provenance import Digests, refuse_overlap
from featcl.features.tokens import Text, read_documents
from featcl.files import digest_json
from featcl.lab.long import LongConversation, Part, long_conversations
from featcl.learning.longtext import LongText, cut, pieces
from featcl.learning.memorizing import LongTexts
from featcl.streams import Chat

TALK = (1, 2, 3)  # exchanges between what is told and what is asked; as many for all texts of a step
TRIES = 1000  # conversations that are drawn for one that fits


def long_texts(config: RunConfig, wanted: MemoryTrainingConfig, chat: Chat, *, unseen: Digests) -> LongTexts:
    """What a run trains its memory on.

    Args:
        config: The run's.
        wanted: Its `memory.train`.
        chat: The chat form of the model.
        unseen: Digests of what is taught and scored later, which no file may hold.

    Raises:
        FeatclError: If there is nothing to train on, or too little.
    """
    if wanted.texts is not None:
        return _texts_of_files(wanted, chat, seed=config.seed, unseen=unseen)
    if config.model.startswith("lab/"):
        return lab_texts(wanted, chat, seed=config.seed)
    raise FeatclError(f"memory.train.texts: null is for the laboratory's models, not {config.model}; name files")


def lab_texts(wanted: MemoryTrainingConfig, chat: Chat, *, seed: int) -> LongTexts:
    """Long conversations of the laboratory: facts, other talk, a question; no held-out fact is ever trained on."""

    def batch(step: int) -> Sequence[LongText]:
        between = random.Random(f"{seed}/{step}").choice(TALK)
        return _conversations(wanted, chat, f"{seed}/{step}", between, count=wanted.batch, part="train", asked=2)

    share = -(-wanted.heldout // len(TALK))
    heldout = [_conversations(wanted, chat, "all", n, count=share, part="heldout", asked=1) for n in TALK]
    digest = digest_json([wanted.model_dump(mode="json", exclude={"steps", "lr"}), _ids(heldout), _ids([batch(0)])])
    return LongTexts(batch, heldout, asked=True, digest=digest)


def _conversations(
    wanted: MemoryTrainingConfig, chat: Chat, seed: str, between: int, *, count: int, part: Part, asked: int
) -> list[LongText]:
    """The first so many that fit the context, and whose windows fit the window."""
    drawn = long_conversations(seed, part=part, between=(between, between), asked=asked)
    texts = (in_windows(conversation, chat) for conversation in islice(drawn, TRIES * count))
    fitting = (
        text for text in texts
        if len(text) <= wanted.context and max(map(len, text.windows)) <= wanted.window
    )  # fmt: skip
    found = list(islice(fitting, count))
    if len(found) < count:
        raise FeatclError(
            f"memory.train: no long conversation of the laboratory with {between} exchanges between fits a context of "
            f"{wanted.context} and windows of {wanted.window} tokens; 112 and 48 have room"
        )
    return found


def in_windows(conversation: LongConversation, chat: Chat) -> LongText:
    """A long conversation as tokens; what the assistant says are the targets."""
    ends = [len(chat.encode(conversation.messages(n + 1)).input_ids) for n in range(len(conversation.windows))]
    return cut(chat.encode(conversation.messages()), ends, start=chat.start_id)


def _texts_of_files(wanted: MemoryTrainingConfig, chat: Chat, *, seed: int, unseen: Digests) -> LongTexts:
    """Pieces of `context` tokens; of every file the last fifth is held out."""
    given: dict[str, Sequence[Text]] = {
        path: read_documents(path, chat.tokenizer) for path in paths_of(wanted.texts)
    }  # fmt: skip
    refuse_overlap({f"memory.train.texts ({path})": texts for path, texts in given.items()}, unseen, chat.tokenizer)
    parts = [list(_pieces(texts, wanted, chat)) for texts in given.values()]
    learned = [piece for found in parts for piece in found[: len(found) - len(found) // 5]]
    heldout = [piece for found in parts for piece in found[len(found) - len(found) // 5 :]][: wanted.heldout]
    if len(learned) < wanted.batch or not heldout:
        raise FeatclError(
            f"memory.train.texts: {', '.join(map(str, given))}: {len(learned) + len(heldout)} pieces of "
            f"{wanted.context} tokens, a step needs {wanted.batch} and one in five is held out; give more text"
        )
    return LongTexts(
        partial(_drawn, learned, wanted.batch, seed), [heldout], asked=False, digest=digest_json(_ids([learned]))
    )


def _drawn(texts: Sequence[LongText], count: int, seed: int, step: int) -> Sequence[LongText]:
    return random.Random(f"{seed}/{step}").sample(texts, count)


def _pieces(texts: Sequence[Text], wanted: MemoryTrainingConfig, chat: Chat) -> Iterator[LongText]:
    for text in texts:
        if isinstance(text, str) and len(text.encode()) + 1 < wanted.context:
            continue  # fewer tokens than bytes
        ids = chat.encode_text(text).input_ids if isinstance(text, str) else list(text)
        yield from pieces(ids, window=wanted.window, context=wanted.context, start=chat.start_id)


def _ids(groups: Sequence[Sequence[LongText]]) -> list[list[list[int]]]:
    return [[window.input_ids for text in texts for window in text.windows] for texts in groups]
