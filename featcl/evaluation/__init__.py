"""The score matrix R, its metrics, and the scoring of items, held-out text and canaries."""

from featcl.evaluation.canaries import Canaries, CanaryReading
from featcl.evaluation.matrix import Flips, ScoreMatrix
from featcl.evaluation.metrics import FORMULAS, StreamMetrics, column_forgetting, stream_metrics
from featcl.evaluation.scoring import ItemScorer, heldout_nll, lasting_items, score_items, weighted_nll

__all__ = [
    "FORMULAS",
    "Canaries",
    "CanaryReading",
    "Flips",
    "ItemScorer",
    "ScoreMatrix",
    "StreamMetrics",
    "column_forgetting",
    "heldout_nll",
    "lasting_items",
    "score_items",
    "stream_metrics",
    "weighted_nll",
]
