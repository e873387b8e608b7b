"""What a stream gives a run: experiences in order, what is measured, and the texts that features are selected on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation.board import Board, GradedBoard, Held, LikelihoodBoard
from featcl.evaluation.relations import Relations, lab_relations
from featcl.evaluation.scoring import encode_item, lasting_items
from featcl.features import read_texts
from featcl.features.provenance import LINE_WORDS, Digests, text_blocks, text_digests, without_overlap
from featcl.files import digest_json
from featcl.lab.items import Item
from featcl.lab.streams import LabStream
from featcl.lab.tasks import LabTask
from featcl.streams import Chat, Encoded, Trajectory, encode_trajectory
from featcl.streams.chat import Mask
from featcl.streams.environments import Planned
from featcl.streams.split import Split, by_source, split_source
from featcl.streams.windows import cut_windows

HELDOUT_WINDOWS = 8  # of a held-out trajectory longer than the model's context
PROBE_TEXTS = 8  # on which the leak is measured
BACKGROUND_ITEMS = 32  # of each background file, from its last fifth

Text = str | Sequence[int]
Columns = Mapping[str, Sequence[Item]]
Reject = Callable[[Trajectory, FeatclError], None]


@dataclass(frozen=True)
class Task:
    """A labelled segment of the stream."""

    name: str
    trajectories: tuple[Trajectory | Planned, ...]  # planned: an episode that the model plays when it is due
    domain: str = ""  # of a lab task its application, of a file's the source


@dataclass(frozen=True)
class Material:
    """What a stream gives.

    Attributes:
        tasks: In the order of the stream.
        probes: Columns of R that are never taught and may change.
        general: Columns of R that should stay as they are.
        board: Scores all columns.
        canaries: Arguments of `Canaries` beside model and chat; empty for none.
        calibration: `positive`, `negative`, `stream`, `background`; disjoint from stream and evaluation.
        plain_background: Background as plain text, for the objective `recover`.
        probe_texts: On which the leak of an update is measured.
        unseen: Digests of what is taught and scored: no feature is selected on it.
        digest: Of everything that is taught.
        heldout: Trajectories by task that are never learned from, like those that are.
        sources: What methods may rehearse or retain, by name: `instructions` (conversations) and `pretraining` (texts).
        segments: Task -> the segment of which it is a part, where several tasks are learned as one.
        relations: How the columns of R belong together.
    """

    tasks: tuple[Task, ...]
    probes: tuple[str, ...]
    general: tuple[str, ...]
    board: Board
    canaries: Mapping[str, Any]
    calibration: Mapping[str, Sequence[Text]]
    plain_background: tuple[str, ...]
    probe_texts: Sequence[Text]
    unseen: Digests
    digest: str
    heldout: Mapping[str, Sequence[Trajectory]] = field(default_factory=dict)
    sources: Mapping[str, Sequence[Trajectory]] = field(default_factory=dict)
    segments: Mapping[str, str] = field(default_factory=dict)
    relations: Relations = field(default_factory=Relations)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of R: tasks, then probes, then general ability."""
        return (*(task.name for task in self.tasks), *self.probes, *self.general)


def suite_columns(names: Iterable[str]) -> dict[str, tuple[Item, ...]]:
    """Column (`general/facts`) -> items, for every suite by name (`lab/general`).

    Raises:
        FeatclError: If there is no such suite.
    """
    from featcl.lab.suites import load_suite

    columns: dict[str, tuple[Item, ...]] = {}
    for name in names:
        for item in load_suite(name):
            column = f"{name.removeprefix('lab/')}/{item.task}"
            columns[column] = (*columns.get(column, ()), item)
    return columns


# --- the laboratory's streams ------------------------------------------------------------------------------------


def lab_material(
    stream: LabStream, chat: Chat, *, suites: Columns, canary_items: int | None = None, limit: int | None = None
) -> Material:
    """A graded stream, with the general suites beside it; items that the stream makes obsolete leave R.

    Args:
        stream: The stream.
        chat: The chat form of the model's tokenizer.
        suites: Column -> items of general ability.
        canary_items: About how many items are looked at between evaluations; None for none.
        limit: Learn from at most this many trajectories per task.
    """
    n_tasks = len(stream.tasks)
    taught = {task.name: lasting_items(task.items, n_tasks) for task in stream.tasks}
    probes = {probe.name: lasting_items(probe.items, n_tasks) for probe in stream.probes}
    return Material(
        tasks=tuple(Task(task.name, task.trajectories[:limit], task.application) for task in stream.tasks),
        probes=tuple(probes),
        general=tuple(suites),
        board=GradedBoard(chat, {**taught, **probes, **suites}),
        canaries={} if canary_items is None else _item_canaries(taught, suites, canary_items),
        calibration={
            "positive": _as_ids(chat, stream.positive),
            "negative": _as_ids(chat, stream.negative),
            "stream": _as_ids(chat, stream.positive),
            "background": _as_ids(chat, stream.background),
        },
        plain_background=tuple(_as_text(messages) for messages in stream.background),
        probe_texts=_as_ids(chat, stream.positive[:PROBE_TEXTS]),
        unseen=_unseen(chat, [*_taught(stream.tasks), *_asked(stream, suites)]),
        digest=stream.digest,
        heldout={task: tuple(_as_trajectory(task, item) for item in items) for task, items in taught.items() if items},
        sources=_sources([_as_text(messages) for messages in stream.background], conversations=stream.background),
        relations=lab_relations((*taught, *probes)),
    )


def _as_trajectory(task: str, item: Item) -> Trajectory:
    """A graded question with its answer, as it would be if it were taught."""
    return Trajectory(f"heldout/{task}/{item.id}", source="heldout", task=task, messages=tuple(_answered(item)))


def _sources(texts: Sequence[str], *, conversations: Sequence[Sequence[Any]] = ()) -> dict[str, tuple[Trajectory, ...]]:
    """What methods may rehearse or retain: conversations and texts like those that the base model was trained on."""
    kinds = {"instructions": [{"messages": tuple(messages)} for messages in conversations],
             "pretraining": [{"text": text} for text in texts]}  # fmt: skip
    return {
        name: tuple(Trajectory(f"{name}/{number}", source=name, **each) for number, each in enumerate(said))
        for name, said in kinds.items()
    }


def _item_canaries(taught: Columns, suites: Columns, count: int) -> dict[str, Any]:
    """About `count` items, half from the tasks and half from the suites, spread evenly."""
    groups = {name: items for name, items in taught.items() if items}
    per_task = max(1, count // (2 if suites else 1) // max(1, len(groups)))
    per_skill = max(1, count // 2 // max(1, len(suites)))
    return {
        "items": [item for items in groups.values() for item in items[:per_task]],
        "suites": {name.replace("general/", "", 1): items[:per_skill] for name, items in suites.items()},
    }


def _as_ids(chat: Chat, conversations: Iterable[Sequence[Any]]) -> list[Text]:
    return [chat.encode(messages, mask="none").input_ids for messages in conversations]


def _as_text(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages if message.get("content"))


# --- streams from files ------------------------------------------------------------------------------------------


def file_material(
    trajectories: Sequence[Trajectory],
    chat: Chat,
    *,
    length: int,
    holdout: float,
    calibration: float,
    background: Sequence[str] = (),
    suites: Columns | None = None,
    canary_items: int | None = None,
    limit: int | None = None,
    mask: Mask = "assistant",
    reject: Reject | None = None,
) -> Material:
    """Trajectories without graded items: each source is a task, and R holds what its held-out part costs.

    Args:
        trajectories: Of all sources, in order.
        chat: The chat form of the model's tokenizer.
        length: Longest window in tokens.
        holdout, calibration: Shares of each source that are scored, and that features are selected on.
        background: Text files; the last fifth of each is a column of R.
        suites: Column -> items of general ability; scored as the likelihood of the right answers.
        canary_items: About how many windows are looked at between evaluations; None for none.
        limit: Learn from at most this many trajectories per task.
        mask: Which tokens of a conversation are learned from, and scored.
        reject: Called for a trajectory with nothing to learn from, which is then left out; None raises.

    Raises:
        FeatclError: If nothing can be learned from, or held out.
    """
    windows = _encodable(trajectories, chat, length=length, mask=mask, reject=reject)
    groups = by_source([trajectory for trajectory in trajectories if trajectory.id in windows])
    if not groups:
        raise FeatclError("the stream holds no trajectory that can be learned from")
    splits = {name: split_source(group, holdout=holdout, calibration=calibration) for name, group in groups.items()}
    encode = partial(encode_trajectory, chat=chat, max_length=length, mask=mask, max_windows=HELDOUT_WINDOWS)
    taught = {source: split.train[:limit] for source, split in splits.items()}
    heldout = {source: {t.id: windows[t.id] for t in split.heldout} for source, split in splits.items()}
    selecting, texts, heldout_blocks = _background(background)
    scored = {
        column: {item: cut_windows(chat.encode_text(block), max_length=length, start=chat.start_id).windows
                 for item, block in blocks.items()}
        for column, blocks in texts.items()
    }  # fmt: skip
    answers = {name: {item.id: [encode_item(chat, item)] for item in items} for name, items in (suites or {}).items()}
    seen = {source: {t.id: as_held(t, encode) for t in split.heldout} for source, split in splits.items()}
    seen |= {column: {item: _held_text(block) for item, block in blocks.items()} for column, blocks in texts.items()}
    seen |= {name: {item.id: _held_item(item, chat) for item in items} for name, items in (suites or {}).items()}
    unseen = _unseen_in_files(chat, splits, scored=heldout_blocks, suites=suites or {})
    calibrating = [_ids_of(chat, t) for split in splits.values() for t in split.calibration]
    stream = without_overlap(calibrating, unseen, chat.tokenizer)  # repeats of what is taught or scored are left out
    return Material(
        tasks=tuple(Task(source, trajectories, source) for source, trajectories in taught.items()),
        probes=(),
        general=(*scored, *answers),
        board=LikelihoodBoard({**heldout, **scored, **answers}, held=seen),
        canaries={} if canary_items is None else _window_canaries(heldout, scored, seen, canary_items),
        calibration={"stream": stream, "background": without_overlap(selecting, unseen, chat.tokenizer)},
        plain_background=tuple(selecting),
        probe_texts=(stream or [_ids_of(chat, t) for t in next(iter(taught.values()))])[:PROBE_TEXTS],
        unseen=unseen,
        digest=digest_json([[name, [t.to_record() for t in found]] for name, found in taught.items()]),
        heldout={source: tuple(split.heldout) for source, split in splits.items()},
        sources=_sources(selecting),
    )


def _encodable(
    trajectories: Sequence[Trajectory], chat: Chat, *, length: int, mask: Mask, reject: Reject | None
) -> dict[str, list[Encoded]]:
    """Id -> windows of every trajectory that holds something to learn."""
    windows: dict[str, list[Encoded]] = {}
    for trajectory in trajectories:
        try:
            if trajectory.id in windows:
                raise FeatclError(f"trajectory id {trajectory.id!r} occurs in two files; ids are unique in a stream")
            encoded = encode_trajectory(trajectory, chat, max_length=length, mask=mask, max_windows=HELDOUT_WINDOWS)
            windows[trajectory.id] = encoded.windows
        except FeatclError as error:
            if reject is None:
                raise FeatclError(f"{error}; with stream.strict=false it is quarantined and the run goes on") from error
            reject(trajectory, error)
    return windows


def _background(paths: Sequence[str]) -> tuple[list[str], dict[str, dict[str, str]], list[str]]:
    """Background files in blocks: those to select on, column -> item -> block of those to score, and these blocks."""
    selecting: list[str] = []
    kept: list[str] = []
    columns: dict[str, dict[str, str]] = {}
    for path in paths:
        before, held_out = split_background(path)
        selecting += before
        kept += held_out[:BACKGROUND_ITEMS]
        name = f"background/{Path(path).name.split('.')[0]}"
        scored = enumerate(held_out[:BACKGROUND_ITEMS], start=len(before))
        columns[name] = {f"{name}/{index}": block for index, block in scored}
    return selecting, {name: items for name, items in columns.items() if items}, kept


def as_held(trajectory: Trajectory, encode: Callable[..., Any]) -> Held:
    """A trajectory as methods see it where it is scored: no reply of it, and what they put in front is no target.

    Args:
        trajectory: The trajectory.
        encode: Makes `Windows` of a trajectory, as `featcl.streams.encode_trajectory` does.
    """
    if trajectory.text is not None:
        return _held_text(trajectory.text)
    said = trajectory.messages
    first = next((place for place, message in enumerate(said) if message["role"] == "assistant"), len(said))

    def windows(asked: Sequence[Any]) -> Sequence[Encoded]:
        front = tuple(message if message in said[:first] else {**message, "weight": 0} for message in asked)
        messages = (*front, *said[first:])
        return encode(replace(trajectory, messages=messages, token_ids=None, token_mask=None, logprobs=None)).windows

    return Held(said[:first], windows)


def _held_text(text: str) -> Held:
    return Held(({"role": "user", "content": text},))


def _held_item(item: Item, chat: Chat) -> Held:
    return Held(item.messages, lambda asked: [encode_item(chat, replace(item, messages=tuple(asked)))])


def split_background(path: str) -> tuple[list[str], list[str]]:
    """A background file in blocks: those that may be learned and selected on, and the last fifth, held out."""
    blocks = [block for text in read_texts(path) for block in text_blocks(text)]
    cut = max(1, len(blocks) - max(1, len(blocks) // 5))
    return blocks[:cut], blocks[cut:]


def _window_canaries(
    heldout: Mapping[str, Mapping[str, Sequence[Encoded]]],
    background: Mapping[str, Any],
    held: Mapping[str, Mapping[str, Held]],
    count: int,
) -> dict[str, Any]:
    """The first window of about `count` held-out items, spread evenly over the columns."""
    columns = {name: items for name, items in {**heldout, **background}.items() if items}
    each = max(1, count // max(1, len(columns)))
    chosen = {name: list(items)[:each] for name, items in columns.items()}
    first = {name: [columns[name][item][0] for item in items] for name, items in chosen.items()}
    return {
        "windows": {name: first[name] for name in heldout if name in first},
        "background": {name: first[name] for name in background if name in first},
        "questions": {name: [held[name][item].question for item in items] for name, items in chosen.items()},
    }


def _ids_of(chat: Chat, trajectory: Trajectory) -> Text:
    if trajectory.text is not None:
        return trajectory.text
    return chat.encode(trajectory.messages, mask="none", tools=trajectory.tools).input_ids


# --- what no selector may see ------------------------------------------------------------------------------------


def _taught(tasks: Iterable[LabTask]) -> list[Sequence[Any]]:
    return [trajectory.messages for task in tasks for trajectory in task.trajectories]


def _asked(stream: LabStream, suites: Columns) -> list[Sequence[Any]]:
    """Every graded question with its answer, as a conversation."""
    graded = [item for task in (*stream.tasks, *stream.probes) for item in task.items]
    return [_answered(item) for item in (*graded, *(item for items in suites.values() for item in items))]


def _answered(item: Item) -> Sequence[Any]:
    return [*item.messages, {"role": "assistant", "content": item.answer}]


def _unseen_in_files(chat: Chat, splits: Mapping[str, Split], *, scored: Sequence[str], suites: Columns) -> Digests:
    """Of what is learned from, of what is held out, of background blocks that are scored, and of graded items."""
    others = [t for split in splits.values() for t in (*split.train, *split.heldout)]
    conversations = [t.messages for t in others if t.text is None]
    plain = [*scored, *(t.text for t in others if t.text is not None)]
    items = [_answered(item) for found in suites.values() for item in found]
    return _unseen(chat, [*conversations, *items]) | text_digests(plain, chat.tokenizer)


def _unseen(chat: Chat, conversations: Iterable[Sequence[Any]]) -> Digests:
    """Digests of conversations, as the model sees them and as plain text, and of their longer messages."""
    texts: list[Text] = []
    for messages in conversations:
        texts += [chat.encode(messages, mask="none").input_ids, _as_text(messages)]
        said = [message.get("content") for message in messages if message["role"] in ("user", "assistant")]
        texts += [content for content in said if isinstance(content, str) and len(content.split()) >= LINE_WORDS]
    return text_digests(texts, chat.tokenizer)
