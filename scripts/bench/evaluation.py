"""What measuring costs: `python scripts/bench/evaluation.py [--repeats 7] [--out scripts/bench/results]`.

On the laboratory's model, stream and suite (`experiments/quickstart/base.yaml`), interleaved, medians of seconds:

    board       every column of R: all tasks and the general suite, code that is not word for word right generated
    canaries    the small fixed set between evaluations
    bare        the board's tokens, unpadded, through the bare model: what no way of scoring can beat

and of an update (`Learner.observe`) what recording it costs: the line in metrics.jsonl, W&B offline, TensorBoard and
Trackio where they are installed, and the write-ahead record; the wait for the disk is spread over the updates between
two checkpoints. Claims: a board in at most 2.5 s on two cores, recording at most 3 % of an update.

Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from featcl.build import Experiment, build  # noqa: E402
from featcl.build.reuse import BaseOnce  # noqa: E402
from featcl.config import RunConfig  # noqa: E402
from featcl.models import inner_model  # noqa: E402
from featcl.tracking.ahead import WriteAhead  # noqa: E402
from featcl.tracking.base import RunNames, Tracker  # noqa: E402
from featcl.tracking.environment import git_commit  # noqa: E402
from featcl.tracking.jsonl import JsonlTracker  # noqa: E402
from featcl.tracking.names import TOKENS_SEEN  # noqa: E402
from featcl.tracking.opening import OPTIONAL, open_backends  # noqa: E402

CONFIG = ROOT / "experiments" / "quickstart" / "base.yaml"
WIDTH, BATCH = 32, 4096  # tokens of a row and of a forward of the bare model


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output={folder}", *(["stream.tasks=[home_facts]"] if options.tiny else [])]
        experiment = build(RunConfig.load(CONFIG, overrides))
        record = {
            "benchmark": "evaluation",
            "evaluation": evaluation(experiment, options.repeats),
            "logging": logging(experiment, Path(folder), options.updates),
            **circumstances(options),
        }
    print_table(record)
    print(json.dumps(record))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        target = options.out / f"evaluation{'-tiny' if options.tiny else ''}.json"
        target.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--updates", type=int, default=40, help="Updates over which recording is timed.")
    parser.add_argument("--threads", type=int, help="Of torch; null leaves its own choice.")
    parser.add_argument("--tiny", action="store_true", help="One task, to see that it runs.")
    parser.add_argument("--out", type=Path, help="Folder for the JSON, for example scripts/bench/results.")
    return parser.parse_args()


# --- evaluation


def evaluation(experiment: Experiment, repeats: int) -> dict[str, Any]:
    """Medians of seconds by arm, with the forwards and tokens of each."""
    model, once, canaries = experiment.adapter.model, experiment.material.board, experiment.canaries
    assert isinstance(once, BaseOnce)
    board = once.board  # what it knows of the base model is not what is timed
    assert canaries is not None
    columns = board.score(model)
    items = [(column, item) for column, scores in columns.items() for item in scores]
    tokens = sum(len(part.input_ids) for column, item in items for part in board.targets(f"{column}/{item}"))
    arms: dict[str, Callable[[], Any]] = {
        "board": lambda: board.score(model),
        "canaries": lambda: canaries.score(model),
        "bare": lambda: bare(experiment, tokens),
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    read: dict[str, list[int]] = {}
    for _ in range(repeats):
        for arm, work in arms.items():
            with reading(model) as forwards:
                seconds[arm].append(timed(work))
            read[arm] = forwards
    medians = {arm: statistics.median(found) for arm, found in seconds.items()}
    return {
        "seconds": medians,
        "forwards": {arm: len(found) for arm, found in read.items()},
        "tokens_read": {arm: sum(found) for arm, found in read.items()},
        "items": len(items),
        "item_tokens": tokens,
        "share_of_bare": medians["bare"] / medians["board"],
    }


@torch.no_grad()
def bare(experiment: Experiment, tokens: int) -> None:
    """So many tokens through the model without its adapter, in full batches."""
    model = experiment.adapter.model
    ids = torch.arange(tokens // WIDTH * WIDTH).remainder(model.config.vocab_size - 4).add(4).view(-1, WIDTH)
    with experiment.adapter.disabled():
        for batch in ids.to(model.device).split(BATCH // WIDTH):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)


@contextlib.contextmanager
def reading(model: Any) -> Iterator[list[int]]:
    """Tokens of every forward inside the block, padding included."""
    seen: list[int] = []
    body = inner_model(model)
    handle = body.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# --- recording


def logging(experiment: Experiment, folder: Path, updates: int) -> dict[str, Any]:
    """Seconds of an update and of recording it, medians; and the share of the one in the other."""
    config = experiment.config
    names = RunNames.of(config.to_dict())
    jsonl, ahead = JsonlTracker(folder / "metrics.jsonl"), WriteAhead(folder / "ahead.json")
    opened = open_backends(folder, names, wandb="offline", backends=tuple(OPTIONAL))
    trackers: dict[str, Tracker] = {"jsonl": jsonl, **{tracker.name: tracker for tracker in opened}}
    seconds: dict[str, list[float]] = defaultdict(list)
    task = experiment.material.tasks[0]
    for number in range(updates):
        trajectory = task.trajectories[number % len(task.trajectories)]
        start = time.perf_counter()
        stats = experiment.learner.observe(trajectory)  # type: ignore[arg-type]
        seconds["update"].append(time.perf_counter() - start)
        record = {"kind": "update", **stats.record(), TOKENS_SEEN: experiment.learner.tokens}
        seconds["ahead"].append(timed(lambda at=number, what=trajectory: ahead.begin(at, what.to_record())))  # type: ignore[union-attr]
        for name, tracker in trackers.items():
            seconds[name].append(timed(lambda to=tracker, row=record, at=number: to.log(row, at)))
    syncs = [timed(lambda: jsonl.flush(sync=True)) for _ in range(5)]
    for tracker in trackers.values():
        tracker.finish({})
    ahead.close()
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    between = max(1.0, config.checkpoint.seconds / medians["update"])  # updates from one checkpoint to the next
    medians["fsync"] = statistics.median(syncs) / between
    default = sum(medians.get(name, 0.0) for name in ("jsonl", "W&B", "ahead", "fsync"))
    return {"seconds": medians, "updates": updates, "share_of_update": default / medians["update"]}


# --- reporting


def print_table(record: dict[str, Any]) -> None:
    found = record["evaluation"]
    print(f"{'':12}{'median s':>12}{'forwards':>12}{'tokens':>12}")
    for arm, seconds in found["seconds"].items():
        print(f"{arm:12}{seconds:12.3f}{found['forwards'][arm]:12d}{found['tokens_read'][arm]:12d}")
    print(f"{found['items']} items of {found['item_tokens']} tokens; bare / board {found['share_of_bare']:.2f}")
    for name, seconds in record["logging"]["seconds"].items():
        print(f"{name:12}{1e3 * seconds:12.3f} ms")
    print(f"recording an update is {100 * record['logging']['share_of_update']:.2f} % of it")


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    import transformers

    return {
        "repeats": options.repeats,
        "tiny": options.tiny,
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "machine": platform.processor() or platform.machine(),
        "commit": git_commit(ROOT),
    }


if __name__ == "__main__":
    main()
