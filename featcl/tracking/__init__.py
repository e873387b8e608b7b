"""Where a run's numbers go: `metrics.jsonl` always, W&B if wanted, pictures and one HTML report."""

from featcl.tracking.base import Tracker, Trackers
from featcl.tracking.jsonl import CutBack, JsonlTracker, MetricsFile, cut_back, read_metrics
from featcl.tracking.wandb import WandbRun, WandbTracker, open_wandb

__all__ = [
    "CutBack",
    "JsonlTracker",
    "MetricsFile",
    "Tracker",
    "Trackers",
    "WandbRun",
    "WandbTracker",
    "cut_back",
    "open_wandb",
    "read_metrics",
]
