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

# What is logged, in the names that trackers show; `*` stands for any name. The table of docs/tracking.md is this one.
NAMES: dict[str, str] = {
    "train/loss": "weighted sum of the objectives at the update's first step, nats per token",
    "distill/*": "loss of a distillation: reverse_kl, forward_kl or jsd of student and teacher, nats per token",
    "sft/*": "loss of supervised learning, nats per token",
    "policy/*": "reward, advantage and loss of a policy gradient",
    "preference/*": "loss of a pair of replies",
    "predict/*": "loss of predicting what the environment says",
    "recover/*": "KL to the base model on background text, as a brake",
    "anchor/*": "distance to the base model or from the chosen span, as a brake",
    "replay/*": "loss on what is replayed",
    "weight": "what an experience's loss was multiplied by",
    "optim/lr": "learning rate",
    "optim/grad_norm": "norm of the gradient in the adapter's coordinates",
    "update/kl": "KL(before ‖ after one update), nats per token learned from",
    "update/step_scale": "share of the step that the trust region let through",
    "constraint/delta_norm": "distance of the adapted weights from the base weights, Frobenius",
    "constraint/leak": "share of what the update writes that lies outside the chosen span, on calibration texts",
    "projection/*": "what projecting does to the gradient, such as energy_ratio; `_rank` among random spans",
    "forgetting/*": "best score so far minus the score now, per task; positive = forgotten",
    "score/*": "score of a task at the canaries",
    "general/*": "score of a column of general ability, a frozen text, or a task of the harness (`tier/task/metric`)",
    "R/*": "score of a column of R after a task",
    "canary/*": "loss, KL to the base model and flips on the small fixed set",
    "samples/mean_kl": "KL(now ‖ base) of tokens sampled now, nats per token",
    "memory/*": "training and recall of a memory",
    "guard/*": "the sequential test on fresh items",
    "weight/*": "what speaks for an experience, by signal",
    "online/*": "of an experience before it is learned: share of its replies that is right, nats per token, tokens",
    "drift/*": "distance from the base model: KL on new and background text, ‖ΔW‖ by block, features, fit of the SAE",
    "shift/*": "distance of a task from the one before, for the base model: of gradients and of predictions",
    "cost/tokens": "tokens learned from in this update",
    "cost/*": "FLOPs, passes and tokens read: of this update; `train_`, `evaluation_`: of all so far",
    "seconds/*": "wall clock by part",
    TOKENS_SEEN: "tokens learned from so far: the horizontal axis",
}


def meaning(name: str) -> str | None:
    """What a logged name means, or None where it is none of `NAMES`."""
    found = NAMES.get(name)
    group, slash, _ = name.partition("/")
    return NAMES.get(f"{group}/*") if found is None and slash else found
