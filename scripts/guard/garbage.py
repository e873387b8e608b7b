"""Garbage in the stream, with and without a guard: `python scripts/guard/garbage.py --out FILE.jsonl [--seeds 0,1,2]`.

The same stream (order, sources, seed) is learned from in several arms:

    clean       every trajectory as it is true
    unguarded   a share of them (`--garbage`, 10 %) wrong, contradictory or adversarial
    guarded     the same garbage, with the guard and with weighing, which quarantines
    alarm       the same garbage, with the guard alone
    clean guarded   the true trajectories with the guard and with weighing: what they cost where nothing is wrong

The setting reads three tasks (three steps for each trajectory) with `recover` against forgetting. Weighing asks the
laboratory's teacher, which knows the tasks. The guard's tolerance is above what the clean stream itself costs the
general suite (8 to 12 points): a guard that forbids what learning costs rolls true experiences back, too.

At the end each arm answers the same items: of the tasks that were taught, in phrasings that were not, and of the
general suite, none of them in the guard's pool. One line per arm and seed is appended to FILE, and what it holds
already is not run again, so that the script can be called in pieces. `--report` prints the comparison as JSON: mean
loss against the clean stream, paired by item and seed, with 95 % intervals (bootstrap over seeds and items).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from featcl.build import build  # noqa: E402
from featcl.config import RunConfig  # noqa: E402
from featcl.evaluation.pool import lab_items  # noqa: E402
from featcl.evaluation.scoring import ItemScorer  # noqa: E402
from featcl.lab.items import Item  # noqa: E402
from featcl.lab.streams import load_stream  # noqa: E402
from featcl.lab.tasks import make_task  # noqa: E402
from featcl.lab.world import make_world  # noqa: E402
from featcl.streams import Trajectory  # noqa: E402
from featcl.tracking.environment import environment, git_commit  # noqa: E402

ARMS = ("clean", "unguarded", "alarm", "guarded", "clean guarded")
GUARD: dict[str, Any] = {"alpha": 0.05, "every": 10, "items": 64, "action": "rollback", "tolerance": 0.2}
WEIGHING: dict[str, Any] = {"signals": ["agreement"], "quarantine_below": 0.5}
SETTING = (
    "learner.lr=1.5e-3", "learner.steps=3", "learner.objectives=[{name: sft}, {name: recover}]",
    "teacher=lab/olmo2/teacher",
)  # fmt: skip
ITEM_SEED = 4_000_037  # of the general items at the end; R and the guard's pool have others
BOOTSTRAPS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument(
        "--tasks", default="home_facts,home_style,code_convention", help="of lab/applications; empty for all"
    )
    parser.add_argument("--world", default="development")
    parser.add_argument("--garbage", type=float, default=0.1)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--set", nargs="*", default=SETTING, help="overrides of the run's config, key=value")
    parser.add_argument("--guard", type=json.loads, default={}, help='JSON over the guard, such as {"every": 5}')
    parser.add_argument("--weighing", type=json.loads, default={}, help="JSON over the weighing")
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if given.report:
        print(json.dumps(report(_read(given.out)), indent=2))
        return
    done = {(line["arm"], line["seed"]) for line in _read(given.out)}
    for seed in map(int, given.seeds.split(",")):
        for arm in given.arms.split(","):
            if (arm, seed) not in done:
                line = run_arm(arm, seed, given)
                with open(given.out, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print({name: value for name, value in line.items() if name not in ("right", "environment")}, flush=True)


def run_arm(arm: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Learn the stream in one arm and answer the items."""
    start = time.perf_counter()
    experiment = build(config_of(arm, seed, given))
    learner, alarms, quarantined = experiment.learner, [], Counter()
    for trajectory in trajectories(arm, seed, given):
        stats = learner.observe(trajectory)
        alarms += [stats.alarm] if stats.alarm else []
        if stats.quarantined:
            quarantined["garbage" if trajectory.meta.get("garbage") else "true"] += 1
    learned = time.perf_counter() - start
    items = final_items(given)
    right = ItemScorer(learner.student.chat, items).score(experiment.adapter.model)
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": _mean(right),
        "tasks": _mean([r for r, item in zip(right, items, strict=True) if item.id.startswith("task/")]),
        "general": _mean([r for r, item in zip(right, items, strict=True) if not item.id.startswith("task/")]),
        "items": len(items),
        "updates": learner.version,
        "alarms": alarms,
        "quarantined": dict(quarantined),
        "seconds": {"learning": round(learned, 1), "all": round(time.perf_counter() - start, 1)},
        "right": "".join("01"[r] for r in right),
        "setting": {"tasks": given.tasks, "world": given.world, "garbage": given.garbage, "set": list(given.set),
                    "guard": {**GUARD, **given.guard}, "weighing": {**WEIGHING, **given.weighing}},
        "commit": git_commit(ROOT),
        "environment": environment(),
    }  # fmt: skip


def config_of(arm: str, seed: int, given: argparse.Namespace) -> RunConfig:
    """The quickstart's reading phase, with another setting; an arm is a delta."""
    overrides = ["phases=null", f"seed={seed}", f"stream.world={given.world}", f"stream.garbage={given.garbage}"]
    overrides += ["evaluation.canaries=null", "evaluation.suites=[]", "tracking.wandb=disabled", *given.set]
    overrides += [f"stream.tasks={json.dumps(given.tasks.split(','))}"] if given.tasks else []
    if arm in ("guarded", "alarm", "clean guarded"):
        overrides.append(f"learner.guard={json.dumps({**GUARD, **given.guard})}")
    if arm in ("guarded", "clean guarded"):
        overrides.append(f"learner.weighing={json.dumps({**WEIGHING, **given.weighing})}")
    return RunConfig.load(ROOT / "experiments/quickstart/base.yaml", overrides)


def trajectories(arm: str, seed: int, given: argparse.Namespace) -> list[Trajectory]:
    """The stream with its garbage; for the clean arm, what was spoilt is as it was before, at its place."""
    tasks = given.tasks.split(",") if given.tasks else None
    stream = load_stream("lab/applications", world=given.world, seed=seed, garbage=given.garbage, tasks=tasks)
    taught = [trajectory for task in stream.tasks for trajectory in task.trajectories]
    if not arm.startswith("clean"):
        return taught
    true = load_stream("lab/applications", world=given.world, seed=seed, tasks=tasks)
    originals = {trajectory.id: trajectory for task in true.tasks for trajectory in task.trajectories}
    return [replace(trajectory, messages=originals[trajectory.id].messages) for trajectory in taught]


def final_items(given: argparse.Namespace) -> list[Item]:
    """About half of the tasks that were taught and are true at the end, the rest of general ability."""
    names = given.tasks.split(",") if given.tasks else list(_applications())
    made = {name: make_task(name, make_world(given.world), trajectories=0, items=given.items).items for name in names}
    share = 0
    while sum(min(share, len(found)) for found in made.values()) < given.items // 2 and share < given.items:
        share += 1
    chosen = [random.Random(f"{name}/final").sample(found, min(share, len(found))) for name, found in made.items()]
    taught = [replace(item, id=f"task/{item.id}") for found in chosen for item in found]
    return [*taught, *lab_items(given.items - len(taught), seed=ITEM_SEED)[: given.items - len(taught)]]


def _applications() -> Sequence[str]:
    from featcl.lab.streams import STREAMS

    return STREAMS["lab/applications"][0]


def report(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each arm's accuracy, and what it lost against the clean stream."""
    right = {(line["arm"], line["seed"]): _bits(line["right"]) for line in lines}
    seeds = sorted({seed for arm, seed in right if arm == "clean"})
    found: dict[str, Any] = {"seeds": seeds, "items": lines[0]["items"], "settings": [], "arms": {}}
    for line in lines:
        if line["setting"] not in found["settings"]:
            found["settings"].append(line["setting"])
    for arm in dict.fromkeys(line["arm"] for line in lines):
        of_arm = [line for line in lines if line["arm"] == arm]
        both = [seed for seed in seeds if (arm, seed) in right]
        lost = torch.stack([right["clean", seed] - right[arm, seed] for seed in both])
        found["arms"][arm] = {
            "seeds": both,
            **{name: _mean([line[name] for line in of_arm]) for name in ("accuracy", "tasks", "general", "updates")},
            "lost_points": 100 * float(lost.mean()),
            "lost_by_seed": (100 * lost.mean(1)).tolist(),
            "interval": interval(lost),
            "alarms": [len(line["alarms"]) for line in of_arm],
            "quarantined": [line["quarantined"] for line in of_arm],
        }
    found["commits"] = sorted({str(line["commit"]) for line in lines})
    found["environment"] = lines[0]["environment"]
    return found


def interval(lost: torch.Tensor) -> list[float]:
    """95 % interval in points of the mean of [seeds, items], resampling both."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(BOOTSTRAPS):
        seeds = torch.randint(len(lost), (len(lost),), generator=generator)
        items = torch.randint(lost.shape[1], (lost.shape[1],), generator=generator)
        means.append(lost[seeds].mean(0)[items].mean())
    return (100 * torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))).tolist()


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _bits(text: str) -> torch.Tensor:
    return torch.tensor([float(bit) for bit in text], dtype=torch.float64)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    main()
