"""The score matrix R, its metrics with intervals, the report card, and the scoring of items, text and canaries."""

from featcl.evaluation.canaries import Canaries, CanaryReading
from featcl.evaluation.composition import (
    composition_gap,
    cross_task_discrimination,
    gain_share,
    naming_gain,
    ratio_to,
)
from featcl.evaluation.contradiction import Recovery, Resistance, recovery, resistance
from featcl.evaluation.curves import SurvivalCurve, data_efficiency, experiences_to, survival_curve
from featcl.evaluation.desiderata import Desideratum, Number, ReportCard, report_card
from featcl.evaluation.intervals import Interval, block_bootstrap_mean, bootstrap_mean, wilson
from featcl.evaluation.itemscores import ItemScores
from featcl.evaluation.labels import TaskLabel, label_tasks
from featcl.evaluation.matrix import Flips, ScoreMatrix
from featcl.evaluation.metrics import FORMULAS, StreamMetrics, column_forgetting, metric_arrays, stream_metrics
from featcl.evaluation.online import CodeLength, OnlineAccuracy, code_length, online_accuracy
from featcl.evaluation.paired import (
    FlipCounts,
    PairedComparison,
    chance_adjusted,
    compare_items,
    count_flips,
    mcnemar_exact,
)
from featcl.evaluation.relations import Claims, Relations
from featcl.evaluation.resampling import Resampled, metric_intervals, resample
from featcl.evaluation.scoring import ItemScorer, heldout_nll, lasting_items, score_items, weighted_nll

__all__ = [
    "FORMULAS",
    "Canaries",
    "CanaryReading",
    "Claims",
    "CodeLength",
    "Desideratum",
    "FlipCounts",
    "Flips",
    "Interval",
    "ItemScorer",
    "ItemScores",
    "Number",
    "OnlineAccuracy",
    "PairedComparison",
    "Recovery",
    "Relations",
    "ReportCard",
    "Resampled",
    "Resistance",
    "ScoreMatrix",
    "StreamMetrics",
    "SurvivalCurve",
    "TaskLabel",
    "block_bootstrap_mean",
    "bootstrap_mean",
    "chance_adjusted",
    "code_length",
    "column_forgetting",
    "compare_items",
    "composition_gap",
    "count_flips",
    "cross_task_discrimination",
    "data_efficiency",
    "experiences_to",
    "gain_share",
    "heldout_nll",
    "label_tasks",
    "lasting_items",
    "mcnemar_exact",
    "metric_arrays",
    "metric_intervals",
    "naming_gain",
    "online_accuracy",
    "ratio_to",
    "recovery",
    "report_card",
    "resample",
    "resistance",
    "score_items",
    "stream_metrics",
    "survival_curve",
    "weighted_nll",
    "wilson",
]
