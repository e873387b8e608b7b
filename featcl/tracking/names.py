"""What the recorded numbers are called, and in one line what they mean."""

from __future__ import annotations

# Metrics of a stream, from the score matrix R (row 0 the base model, row i after training task i, T tasks).
FORMULAS: dict[str, str] = {
    "acc": "mean over tasks of R[T, j]",
    "bwt": "mean over tasks before the last of R[T, j] - R[j, j]",
    "fwt": "mean over tasks after the first of R[j-1, j] - R[0, j]",
    "forgetting_max_past": "mean over tasks before the last of max(R[0..T-1, j]) - R[T, j]",
    "forgetting_chaudhry": "mean over tasks before the last of max(R[1..T-1, j]) - R[T, j]",
    "forgetting_since_learned": "mean over tasks before the last of max(R[j..T-1, j]) - R[T, j]",
    "forgetting_mammoth": "mean over tasks before the last of max(R[1..T, j]) - R[T, j]; never negative",
    "forgetting_avalanche": "mean over tasks before the last of R[j, j] - R[T, j], that is -bwt",
    "learning_accuracy": "mean over tasks of R[j, j]",
    "intransigence": "mean over tasks of reference[j] - R[j, j]",
    "general_change": "mean over probes of R[T, p] - R[0, p]",
    "first_task_survival": "R[T, 1] / R[1, 1]",
}

# The horizontal axis of every curve.
TOKENS_SEEN = "tokens_seen"
