"""From a config to objects: the only module that knows both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featcl.adapters import ConstrainedAdapter, constrain
from featcl.config import LearnerConfig, RunConfig
from featcl.errors import FeatclError
from featcl.evaluation import Canaries, lasting_items
from featcl.evaluation.board import Board, GradedBoard, LikelihoodBoard
from featcl.evaluation.scoring import encode_item
from featcl.features import (
    Directions,
    load_sae,
    pca_directions,
    random_directions,
    random_features,
    read_texts,
    select_features,
)
from featcl.files import digest_json
from featcl.lab.items import Item
from featcl.learning import Learner
from featcl.models import load_model, max_context, model_digest, resolve_hook
from featcl.streams import Chat, Encoded, Trajectory, encode_trajectory, read_trajectories
from featcl.streams.split import Split, by_source, split_source
from featcl.streams.windows import cut_windows

HELDOUT_WINDOWS = 8  # of a held-out trajectory longer than the model's context
BACKGROUND_BLOCK = 1200  # characters of background text that make one item
BACKGROUND_ITEMS = 32  # of each background file, from its last fifth
LONGEST = 4096  # tokens of a window where the model's context is longer

Text = str | Sequence[int]


@dataclass(frozen=True)
class Task:
    """A labelled segment of the stream."""

    name: str
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True)
class Material:
    """What a stream gives: experiences, what is measured, and the texts that features are selected on.

    Attributes:
        tasks: In the order of the stream.
        probes: Columns of R that are never taught and may change.
        general: Columns of R that should stay as they are.
        board: Scores all columns.
        canaries: Arguments of `Canaries` beside model and chat.
        calibration: `positive`, `negative`, `stream`, `background`; disjoint from stream and evaluation.
        plain_background: Background as plain text, for the objective `recover`.
        digest: Of everything that is taught.
    """

    tasks: tuple[Task, ...]
    probes: tuple[str, ...]
    general: tuple[str, ...]
    board: Board
    canaries: Mapping[str, Any]
    calibration: Mapping[str, Sequence[Text]]
    plain_background: tuple[str, ...]
    digest: str


@dataclass(frozen=True)
class Experiment:
    """Everything a run needs, built from its config.

    Attributes:
        config: What it was built from.
        material: The stream's part.
        adapter, learner: On the model, at the zero start.
        phases: Settings for `Learner.reconfigure`, run in order on each task.
        canaries: Scored between evaluations, or None.
        directions: One set, or one per layer.
        facts: What env.json records beside the machine.
    """

    config: RunConfig
    material: Material
    adapter: ConstrainedAdapter
    learner: Learner
    phases: tuple[Mapping[str, Any], ...]
    canaries: Canaries | None
    directions: Directions | Mapping[int, Directions]
    facts: Mapping[str, Any] = field(default_factory=dict)


def build(config: RunConfig, *, quarantine: str | Path | None = None) -> Experiment:
    """Load, select, constrain: every object of a run, at its start.

    Args:
        config: The run's.
        quarantine: Where malformed lines of a stream that is not strict go.

    Raises:
        FeatclError: Whatever cannot be found, read or combined, in one line.
    """
    apply_runtime(config)
    _check_suites(config)
    model, tokenizer = load_model(config.model, dtype=config.runtime.dtype, device=config.runtime.device)
    chat = Chat(tokenizer)
    if config.stream.path:
        material = _file_material(config, chat, length=min(max_context(model), LONGEST), quarantine=quarantine)
    else:
        material = _lab_material(config, chat)
    facts = {"model_digest": model_digest(model), "stream_digest": material.digest}
    directions, hooks = _directions(config, model, tokenizer, material)
    phases = tuple(_settings(phase) for phase in config.phases or (config.learner,))
    teacher = load_model(config.teacher, device=config.runtime.device) if config.teacher else None
    adapter = constrain(
        model,
        directions,
        kind=config.adapter.kind,
        rank=config.adapter.rank,
        layers=config.adapter.layers,
        protect=Directions.load(config.adapter.protect) if config.adapter.protect else None,
        seed=config.seed,
    )
    learner = Learner(
        model,
        tokenizer,
        adapter,
        **phases[0],
        teacher=teacher,
        background=material.plain_background,
        seed=config.seed,
    )
    canaries = Canaries(adapter.model, chat, **material.canaries) if material.canaries else None
    facts |= {"hooks": hooks, "directions_digest": _digest(directions), "seed": config.seed}
    return Experiment(config, material, adapter, learner, phases, canaries, directions, facts)


def apply_runtime(config: RunConfig) -> None:
    """Set arithmetic and threads for this process."""
    torch.set_float32_matmul_precision(config.runtime.float32_matmul)
    if config.runtime.threads is not None:
        torch.set_num_threads(config.runtime.threads)


def _settings(learner: LearnerConfig) -> dict[str, Any]:
    """The arguments of `Learner.reconfigure`; an objective's options that are null are its own defaults."""
    settings = learner.model_dump(exclude={"objectives"})
    return {"objective": [term.model_dump(exclude_none=True) for term in learner.objectives], **settings}


def _check_suites(config: RunConfig) -> None:
    if not config.model.startswith("lab/") and any(suite.startswith("lab/") for suite in config.evaluation.suites):
        raise FeatclError(
            f"evaluation.suites: lab suites ask what the laboratory's models know, not {config.model}; "
            "use evaluation.suites='[]', or a model such as lab/olmo2"
        )


# --- the stream --------------------------------------------------------------------------------------------------


def _lab_material(config: RunConfig, chat: Chat) -> Material:
    """A graded stream of the laboratory, with the general suites beside it."""
    from featcl.lab.streams import load_stream

    stream = load_stream(
        str(config.stream.name),
        world=config.stream.world,  # type: ignore[arg-type]
        seed=config.seed,
        order=config.stream.order,
        garbage=config.stream.garbage,
        tasks=config.stream.tasks,
    )
    n_tasks, suites = len(stream.tasks), _suites(config)
    taught = {task.name: lasting_items(task.items, n_tasks) for task in stream.tasks}
    probes = {probe.name: lasting_items(probe.items, n_tasks) for probe in stream.probes}
    tasks = tuple(Task(task.name, task.trajectories[: config.stream.limit]) for task in stream.tasks)
    return Material(
        tasks=tasks,
        probes=tuple(probes),
        general=tuple(suites),
        board=GradedBoard(chat, {**taught, **probes, **suites}),
        canaries=_item_canaries(config, taught, suites),
        calibration={
            "positive": _as_ids(chat, stream.positive),
            "negative": _as_ids(chat, stream.negative),
            "stream": _as_ids(chat, stream.positive),
            "background": _as_ids(chat, stream.background),
        },
        plain_background=tuple(_as_text(messages) for messages in stream.background),
        digest=stream.digest,
    )


def _suites(config: RunConfig) -> dict[str, tuple[Item, ...]]:
    """Column (`general/facts`) -> items, for every suite of the config."""
    from featcl.lab.suites import load_suite

    columns: dict[str, tuple[Item, ...]] = {}
    for suite in config.evaluation.suites:
        for item in load_suite(suite):
            column = f"{suite.removeprefix('lab/')}/{item.task}"
            columns[column] = (*columns.get(column, ()), item)
    return columns


def _item_canaries(
    config: RunConfig, taught: Mapping[str, Sequence[Item]], suites: Mapping[str, Sequence[Item]]
) -> dict[str, Any]:
    """About as many items as the config says, half from the tasks and half from the suites, spread evenly."""
    canaries = config.evaluation.canaries
    if canaries is None:
        return {}
    groups = {name: items for name, items in taught.items() if items}
    per_task = max(1, canaries.items // (2 if suites else 1) // max(1, len(groups)))
    per_skill = max(1, canaries.items // 2 // max(1, len(suites)))
    chosen = {"items": [item for items in groups.values() for item in items[:per_task]]}
    return {**chosen, "suites": {name.replace("general/", "", 1): s[:per_skill] for name, s in suites.items()}}


def _file_material(config: RunConfig, chat: Chat, *, length: int, quarantine: str | Path | None) -> Material:
    """Trajectories from files: each source is a task, and R holds what its held-out part costs in nats per token."""
    found = list(_read_stream(config, quarantine))
    windows = _encodable(config, chat, found, length=length, quarantine=quarantine)
    splits: dict[str, Split] = {
        source: split_source(group, holdout=config.stream.holdout, calibration=config.stream.calibration)
        for source, group in by_source([trajectory for trajectory in found if trajectory.id in windows]).items()
    }
    if not splits:
        raise FeatclError(f"stream.path: {config.stream.path} holds no trajectory that can be learned from")
    tasks = tuple(Task(source, split.train[: config.stream.limit]) for source, split in splits.items())
    heldout = {source: {t.id: windows[t.id] for t in split.heldout} for source, split in splits.items()}
    selecting, background = _background(config, chat, length=length)
    suites = {
        column: {item.id: [encode_item(chat, item)] for item in items} for column, items in _suites(config).items()
    }
    stream = [t for split in splits.values() for t in split.calibration] or list(tasks[0].trajectories[:1])
    return Material(
        tasks=tasks,
        probes=(),
        general=(*background, *suites),
        board=LikelihoodBoard({**heldout, **background, **suites}),
        canaries=_window_canaries(config, heldout, background),
        calibration={
            "stream": [_ids_of(chat, trajectory) for trajectory in stream],
            "background": selecting,
        },
        plain_background=tuple(selecting),
        digest=digest_json([[task.name, [t.to_record() for t in task.trajectories]] for task in tasks]),
    )


def _read_stream(config: RunConfig, quarantine: str | Path | None) -> Iterable[Trajectory]:
    paths = (config.stream.path,) if isinstance(config.stream.path, str) else config.stream.path or ()
    for path in paths:
        yield from read_trajectories(path, strict=config.stream.strict, quarantine=quarantine)


def _encodable(
    config: RunConfig, chat: Chat, found: Sequence[Trajectory], *, length: int, quarantine: str | Path | None
) -> dict[str, list[Encoded]]:
    """Id -> windows of every trajectory that holds something to learn; the others are an error, or quarantined."""
    windows: dict[str, list[Encoded]] = {}
    for trajectory in found:
        try:
            if trajectory.id in windows:
                raise FeatclError(f"trajectory id {trajectory.id!r} occurs in two files; ids are unique in a stream")
            encoded = encode_trajectory(trajectory, chat, max_length=length, max_windows=HELDOUT_WINDOWS)
            windows[trajectory.id] = encoded.windows
        except FeatclError as error:
            if config.stream.strict:
                raise FeatclError(f"{error}; with stream.strict=false it is quarantined and the run goes on") from error
            if quarantine is not None:
                _append_line(Path(quarantine), {"id": trajectory.id, "reason": str(error)})
    return windows


def _append_line(path: Path, entry: dict[str, Any]) -> None:
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    if not path.is_file() or line not in path.read_text(encoding="utf-8"):
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(line)


def _background(config: RunConfig, chat: Chat, *, length: int) -> tuple[list[str], dict[str, dict[str, list[Encoded]]]]:
    """Background files in blocks: those to select features on, and column -> item -> windows of those to score.

    The last fifth of each file is scored, at most `BACKGROUND_ITEMS` blocks of it, and never selected on.
    """
    selecting: list[str] = []
    columns: dict[str, dict[str, list[Encoded]]] = {}
    for path in _paths(config.features.background):
        blocks = [block for text in read_texts(path) for block in _blocks(text)]
        cut = max(1, len(blocks) - max(1, len(blocks) // 5))
        selecting += blocks[:cut]
        name = f"background/{Path(path).name.split('.')[0]}"
        scored = enumerate(blocks[cut:][:BACKGROUND_ITEMS], start=cut)
        columns[name] = {
            f"{name}/{index}": cut_windows(chat.encode_text(block), max_length=length, start=chat.start_id).windows
            for index, block in scored
        }
    return selecting, {name: items for name, items in columns.items() if items}


def _blocks(text: str) -> list[str]:
    """Runs of whole lines of about `BACKGROUND_BLOCK` characters."""
    blocks, lines, size = [], [], 0
    for line in text.split("\n"):
        lines.append(line)
        size += len(line) + 1
        if size >= BACKGROUND_BLOCK:
            blocks.append("\n".join(lines))
            lines, size = [], 0
    blocks.append("\n".join(lines))
    return [block for block in blocks if len(block.strip()) > 1]


def _window_canaries(
    config: RunConfig, heldout: Mapping[str, Mapping[str, Sequence[Encoded]]], background: Mapping[str, Any]
) -> dict[str, Any]:
    """The first window of as many held-out items as the config says, spread evenly over the columns."""
    canaries = config.evaluation.canaries
    columns = {name: items for name, items in {**heldout, **background}.items() if items}
    if canaries is None or not columns:
        return {}
    each = max(1, canaries.items // len(columns))
    first = {name: [windows[0] for windows in list(items.values())[:each]] for name, items in columns.items()}
    return {
        "windows": {name: first[name] for name in heldout if name in first},
        "background": {name: first[name] for name in background if name in first},
    }


def _as_ids(chat: Chat, conversations: Iterable[Sequence[Any]]) -> list[Text]:
    return [chat.encode(messages, mask="none").input_ids for messages in conversations]


def _ids_of(chat: Chat, trajectory: Trajectory) -> Text:
    if trajectory.text is not None:
        return trajectory.text
    return chat.encode(trajectory.messages, mask="none").input_ids


def _as_text(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(message["content"] for message in messages if message.get("content"))


# --- features ----------------------------------------------------------------------------------------------------


def _directions(
    config: RunConfig, model: Any, tokenizer: Any, material: Material
) -> tuple[Directions | dict[int, Directions], dict[str, str]]:
    """The chosen directions, or the control that stands in for them; and which module each hook is."""
    sources = config.features.sae
    if isinstance(sources, str):
        chosen = _directions_of(config, sources, model, tokenizer, material)
        return chosen, {chosen.hook_name: resolve_hook(model, chosen.hook_name)[0]}
    sets = {layer: _directions_of(config, sae, model, tokenizer, material) for layer, sae in sources.items()}
    for layer, chosen in sets.items():
        if chosen.layer != layer:
            raise FeatclError(f"features.sae.{layer}: {sources[layer]} was trained at {chosen.hook_name}, not there")
    return sets, {chosen.hook_name: resolve_hook(model, chosen.hook_name)[0] for chosen in sets.values()}


def _directions_of(config: RunConfig, source: str, model: Any, tokenizer: Any, material: Material) -> Directions:
    wanted, sae = config.features, load_sae(source, device=config.runtime.device.replace("auto", "cpu"))
    given = {name: _texts(getattr(wanted, name)) for name in ("positive", "negative", "background")}
    texts = {**material.calibration, **{name: found for name, found in given.items() if found and name != "background"}}
    if config.stream.name and given["background"]:
        texts["background"] = given["background"]
    chosen = select_features(
        sae, model, tokenizer, selector=wanted.selector, k=wanted.k, feature_ids=wanted.feature_ids,
        query=wanted.query, seed=config.seed, **texts,
    )  # fmt: skip
    if config.adapter.basis == "random":
        return random_directions(chosen, seed=config.seed)
    if config.adapter.basis == "pca":
        return pca_directions(chosen, model, tokenizer, texts.get("background") or texts["stream"])
    if config.adapter.basis == "random_features":
        return random_features(chosen, sae, model, seed=config.seed)
    return chosen


def _paths(texts: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if texts is None else (texts,) if isinstance(texts, str) else tuple(texts)


def _texts(paths: str | Sequence[str] | None) -> list[str]:
    return [text for path in _paths(paths) for text in read_texts(path)]


def _digest(directions: Directions | Mapping[int, Directions]) -> Any:
    if isinstance(directions, Directions):
        return directions.digest
    return {str(layer): chosen.digest for layer, chosen in directions.items()}
