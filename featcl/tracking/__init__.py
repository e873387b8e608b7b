"""Where a run's numbers go: `metrics.jsonl` always, W&B and others if wanted, pictures and one HTML report."""

from featcl.tracking.base import Behind, Guarded, RunNames, Tracker, Trackers
from featcl.tracking.jsonl import CutBack, JsonlTracker, MetricsFile, cut_back, read_metrics
from featcl.tracking.opening import open_backends
from featcl.tracking.rebuild import rebuild, replay
from featcl.tracking.wandb import WandbTracker, open_wandb

__all__ = [
    "Behind",
    "CutBack",
    "Guarded",
    "JsonlTracker",
    "MetricsFile",
    "RunNames",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "cut_back",
    "open_backends",
    "open_wandb",
    "read_metrics",
    "rebuild",
    "replay",
]
