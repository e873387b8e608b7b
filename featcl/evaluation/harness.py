"""General ability by lm-evaluation-harness, on the model in memory: no checkpoint is written, no second copy loaded.

Three tiers say how much is asked: `smoke` every N updates, `quick` at the end of a task, `full` at start and end. Their
tasks are local by default (`harness_tasks/`, a few dozen items of the laboratory), so that no network is needed; any
other task of the harness can be named and comes from the hub. Results are kept in a folder by the digest of the model,
the tasks and the harness's version, so that the base model's are computed once for a whole study.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featcl.adapters import adapters_of
from featcl.adapters.hook_adapter import HookAdapter
from featcl.adapters.lora_adapter import LoraAdapter
from featcl.errors import FeatclError
from featcl.files import digest_json, write_json
from featcl.memory.hooked import SHELF as MEMORIES
from featcl.models import inner_model, max_context, model_digest

LOCAL_TASKS = Path(__file__).parent / "harness_tasks"
TASKS = ("featcl_lab_choice", "featcl_lab_exact", "featcl_lab_text")


@dataclass(frozen=True)
class HarnessTier:
    """How much is asked.

    Attributes:
        name: `smoke`, `quick` or `full`.
        tasks: Of `harness_tasks/`, of `include`, or any that the harness knows.
        limit: Items of each task; None for all.
    """

    name: str
    tasks: tuple[str, ...] = TASKS
    limit: int | None = None


SMOKE = HarnessTier("smoke", ("featcl_lab_choice",), 16)
QUICK = HarnessTier("quick", TASKS, 24)
FULL = HarnessTier("full", TASKS)


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found.

    Attributes:
        tier: Its name.
        scores: Task -> metric -> value.
        items: Task -> item -> value of the task's first metric, where items are scored one by one.
        counts: Task -> how many items were asked.
        digest: Of model, tasks and harness; empty where nothing was to be cached.
        cached: Whether it was read from the cache.
    """

    tier: str
    scores: Mapping[str, Mapping[str, float]]
    items: Mapping[str, Mapping[str, float]]
    counts: Mapping[str, int]
    digest: str
    cached: bool = False

    def record(self) -> dict[str, float]:
        """Flat scalars by the names that the trackers use: `general/<tier>/<task>/<metric>`."""
        flat = [(task, metric, value) for task, found in self.scores.items() for metric, value in found.items()]
        return {f"general/{self.tier}/{task}/{metric}": value for task, metric, value in flat}


def evaluate_harness(
    model: nn.Module,
    tokenizer: Any,
    tier: HarnessTier = QUICK,
    *,
    include: str | Path | None = None,
    cache: str | Path | None = None,
    state: str | None = None,
    batch_size: int = 16,
) -> HarnessResult:
    """Run a tier on a model as it stands; neither the model nor any random generator is changed.

    Args:
        model: A causal language model, adapted or not, with its adapters on or off.
        tokenizer: Its tokenizer; conversations are asked in its chat template, where it has one.
        tier: What is asked.
        include: A folder with YAML tasks of your own.
        cache: A folder for results; None computes always.
        state: What else the predictions depend on, as a digest: needed to cache with a memory on the model.
        batch_size: Sequences per forward.

    Raises:
        FeatclError: If lm-eval is not installed, a task is unknown or its data cannot be had, or the model's state has
            no digest.

    Source: Gao et al., lm-evaluation-harness, doi:10.5281/zenodo.10256836; `HFLM(pretrained=model)` is its documented
        way to take a model that is in memory.
    """
    require_harness()
    digest = "" if cache is None else _digest(model, tokenizer, tier, include, state)
    place = None if cache is None else Path(cache) / f"{digest}.json"
    if place is not None and place.is_file():
        return replace(_read(place), tier=tier.name, cached=True)
    with _left_alone(model), _quiet():
        found = _evaluate(inner_model(model), tokenizer, tier, include, batch_size)
    result = replace(_result(tier, found), digest=digest)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, asdict(result))
    return result


def require_harness() -> str:
    """The version of lm-evaluation-harness.

    Raises:
        FeatclError: If it is not installed, naming the extra.
    """
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise FeatclError(f"lm-eval is not installed ({error}): pip install 'featcl[lm-eval]'") from None
    return version("lm_eval")


def require_tasks(tasks: Sequence[str], include: str | Path | None = None) -> Any:
    """The harness's `TaskManager`, which knows these tasks.

    Args:
        tasks: Names.
        include: A folder with YAML tasks of your own.

    Raises:
        FeatclError: If lm-eval is not installed, there is no such folder, or a task is unknown.
    """
    require_harness()
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if include is not None and not Path(include).is_dir():
        raise FeatclError(f"{include} is no folder; tasks of your own are YAML files in one")
    folders = [str(LOCAL_TASKS), *([] if include is None else [str(include)])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # reading the harness's own thousands takes seconds
        manager = TaskManager(include_path=folders)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            raise FeatclError(f"the harness has no task {task!r}{f', did you mean {near[0]!r}?' if near else ''}")
    return manager


def live_digest(model: nn.Module, *, state: str | None = None) -> str:
    """Digest of a model as it predicts now: `model_digest` of the base alone where no update is on, or none has moved.

    Args:
        model: Adapted or not.
        state: Digest of what else the predictions depend on.

    Raises:
        FeatclError: If there is a memory on the model, or an adapter of another kind, and no `state`.
    """
    digest = hashlib.sha256(model_digest(model).encode())
    if vars(inner_model(model)).get(MEMORIES) and state is None:
        raise FeatclError("a memory is on the model: give `state`, a digest of it, or no cache")
    moved = {name: parts for name, adapter in adapters_of(model).items() if (parts := _update(adapter, state))}
    if not moved and not state:
        return model_digest(model)
    for name, parts in sorted(moved.items()):
        for part, tensor in parts:
            header = f"{name} {part} {tensor.dtype} {list(tensor.shape)}"
            digest.update(header.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    digest.update((state or "").encode())
    return digest.hexdigest()


def _update(adapter: Any, state: str | None) -> list[tuple[str, Tensor]]:
    """What an adapter adds to the model, by name; nothing where it is off, has not moved, or `state` stands for it."""
    if adapter.delta_norm() == 0:
        return []
    if isinstance(adapter, LoraAdapter):
        sites = [site for site in adapter.sites if adapter.name in site.module.active_adapters]
        return [(f"{site.name} {which}", f) for site in sites for which, f in zip("AB", site.factors(), strict=True)]
    if isinstance(adapter, HookAdapter):
        blocks = [part for site in adapter.sites if not site.off for part in (site, *site.kept)]
        return [found for block in blocks for found in _hook_update(block)]
    if state is None:
        raise FeatclError(f"an update of kind {adapter.kind!r} has no digest: give `state`, or no cache")
    return []


def _hook_update(block: Any) -> list[tuple[str, Tensor]]:
    named = [*block.named_parameters(), *block.named_buffers()]
    encoder = {} if block.encoder is None else block.encoder.tensors()
    kind = torch.tensor(list(block.plan.kind.encode()))
    return [(f"{block.name} {name}", tensor) for name, tensor in (("kind", kind), *named, *encoder.items())]


def _digest(model: nn.Module, tokenizer: Any, tier: HarnessTier, include: Any, state: str | None) -> str:
    folders = [LOCAL_TASKS, *([] if include is None else [Path(include)])]
    kinds = (".yaml", ".py", ".json", ".jsonl")
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in kinds]
    sources = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    vocabulary = sorted(tokenizer.get_vocab().items())
    asked = [tier.tasks, tier.limit, tokenizer.chat_template, vocabulary, sources, require_harness()]
    return digest_json([live_digest(model, state=state), *asked])


def _evaluate(model: Any, tokenizer: Any, tier: HarnessTier, include: Any, batch_size: int) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    manager = require_tasks(tier.tasks, include)
    try:
        found = simple_evaluate(
            model=_wrapped(model, tokenizer, batch_size),
            tasks=list(tier.tasks),
            limit=tier.limit,
            task_manager=manager,
            apply_chat_template=tokenizer.chat_template is not None,
            bootstrap_iters=0,
            log_samples=True,
        )
    except OSError as error:
        reason, tasks = str(error).strip().partition("\n")[0], ", ".join(tier.tasks)
        raise FeatclError(f"the data of {tasks} cannot be had ({reason}); local tasks need no network") from error
    assert found is not None  # None is for the other processes of a distributed run
    return found


def _wrapped(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's own wrapper of a model in memory."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    class InMemory(HFLM):
        """As HFLM, but for tokenizers that join the white space at the end of a prompt to what stands before it."""

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            """HFLM moves that white space to the reply; where the prompt is then no beginning of both, it stays."""
            prompt, reply = super()._encode_pair(context, continuation)
            both, whole = self.tok_encode(context + continuation), self.tok_encode(context)
            if both[: len(prompt)] == prompt or both[: len(whole)] != whole:
                return prompt, reply
            return whole, both[len(whole) :]

    return InMemory(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        batch_size=batch_size,
        max_length=max_context(model),
    )


def _result(tier: HarnessTier, found: Mapping[str, Any]) -> HarnessResult:
    scores, items, counts = {}, {}, {}
    for task, values in found["results"].items():
        metrics = {key.partition(",")[0]: float(value) for key, value in values.items() if _is_metric(key, value)}
        if metrics:  # a group of tasks may have none of its own
            scores[task] = metrics
    for task, samples in found["samples"].items():
        counts[task] = len({sample["doc_id"] for sample in samples})
        first = next(iter(scores.get(task, {})), "")
        values = {str(sample["doc_id"]): sample.get(first) for sample in samples}
        items[task] = {item: float(value) for item, value in values.items() if isinstance(value, int | float)}
    return HarnessResult(tier.name, scores, items, counts, "")


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and "_stderr" not in key and isinstance(value, int | float)


def _read(place: Path) -> HarnessResult:
    try:
        return HarnessResult(**json.loads(place.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise FeatclError(f"{place} is not a result that was cached ({error}); delete it") from None


@contextmanager
def _left_alone(model: Any) -> Iterator[None]:
    """Random generators and the model's mode are put back: the harness seeds all of them."""
    before, states = model.training, (random.getstate(), np.random.get_state())
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            model.train(before)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):  # its progress bars cannot be switched off
            yield
    finally:
        logger.setLevel(before)
