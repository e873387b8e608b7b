"""RunConfig and its parts: frozen, unknown keys are errors that name the nearest right one.

A file may be a delta: `base: base.yaml` names the file (relative to it) over which it is merged. Mappings merge,
everything else replaces. Overrides from the command line, `key.sub=value` with the value read as YAML, come last.
This module imports nothing of featcl.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)


class ConfigError(ValueError):
    """A config that cannot be used: one line with the file, the dotted key, and what would be right."""


Int = Annotated[int, Strict()]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Count = Annotated[int, Strict(), Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Texts = str | tuple[str, ...] | None

OBJECTIVES = (
    "sft", "distillation", "self_distillation", "recover", "policy", "preference", "predict",
    "kl_to_base", "l2_to_base",
)  # fmt: skip
# continual-learning methods and their parameters, which are those of the classes in featcl/methods
METHODS: dict[str, tuple[str, ...]] = {
    "baking": ("every",),
    "cartridge": (
        "tokens", "samples", "steps", "lr", "chunk", "every", "max_new_tokens", "form", "budget_bytes", "joiner",
    ),
    "corda": ("retained", "tokens"),
    "der": ("budget", "budget_bytes", "alpha", "beta", "top_k", "count"),
    "ewc": ("strength", "variant", "decay", "labels", "experiences"),
    "generative_replay": ("samples", "share", "count", "every", "max_new_tokens", "temperature"),
    "gpm": ("threshold", "tokens"),
    "in_context": ("tokens", "form", "budget_bytes", "joiner", "reply_tokens", "frozen"),
    "inflora": ("threshold", "tokens"),
    "l2_to_start": ("strength", "start"),
    "latent_replay": ("budget_bytes", "budget", "select", "share", "count"),
    "lwf": ("strength", "match", "temperature"),
    "mas": ("strength", "experiences"),
    "merging": ("method", "density", "scale"),
    "mica": (),
    "notes": (
        "training_tasks", "write_share", "form", "by", "k", "budget_bytes", "joiner", "max_new_tokens", "reply_tokens",
    ),
    "null_space": ("lost", "retained", "tokens"),
    "olora": ("strength",),
    "oplora": ("preserved",),
    "persona": ("answers", "budget", "share", "count"),
    "persona_and_task": ("folder",),
    "progressive": (),
    "rehearsal": ("material", "share", "count"),
    "replay": ("budget", "budget_bytes", "select", "share", "count", "codec", "file"),
    "retrieval": (
        "by", "k", "layer", "tokens", "form", "budget_bytes", "joiner", "reply_tokens", "frozen",
    ),
    "routed": ("router", "layer", "examples"),
    "si": ("strength", "damping"),
    "skill_file": ("budget_bytes", "writer", "joiner", "max_new_tokens", "reply_tokens", "frozen"),
    "sparse_memory": ("background", "top", "used", "slots"),
}  # fmt: skip
SELECTORS = (
    "ids", "contrast", "rarity", "gradient_energy", "attribution", "persona", "explanations", "hand",
)  # fmt: skip
COMBINATIONS = ("union", "intersection", "rank")


class Part(BaseModel):
    """What all parts of a config share: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RuntimeConfig(Part):
    """Arithmetic and placement; recorded in env.json."""

    float32_matmul: Literal["highest", "high", "medium"] = "highest"
    threads: Count | None = None
    device: str = "auto"
    dtype: str = "auto"
    keep_heap: Annotated[bool, Strict()] = False  # keep freed memory: faster by some percent on a CPU, more resident


class ActingConfig(Part):
    """How the stream `lab/acting` is played: `at_once` episodes by one version, then one update for each."""

    episodes: Count = 96  # different openings per task
    samples: Count = 1  # episodes per opening; two or more make a group for the objective `policy`
    at_once: Count = 8
    max_turns: Count = 8  # replies in one episode
    max_new_tokens: Count = 64  # of one reply
    temperature: Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)] = 1.0
    held_out: Count = 48  # episodes per task that only measure, played greedily


class DocumentsConfig(Part):
    """How questions are made of a document (a .md or .txt file in `path`): by templates, and by the model itself."""

    per_passage: Annotated[int, Strict(), Field(ge=0)] = 0  # questions that the model writes on every passage
    samples: Annotated[int, Strict(), Field(ge=0)] = 0  # its answers to each, which must agree; 0: not asked
    agreement: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.5  # least mean F1 of their words
    similarity: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.8  # from which two questions are one
    known: Annotated[float, Strict(), Field(ge=0, le=1)] | None = None  # F1 without the document, from which it is out
    limit: Count | None = None  # questions of one document
    max_new_tokens: Count = 64  # of a question or an answer

    @model_validator(mode="after")
    def _answered(self) -> DocumentsConfig:
        if self.samples < 2 and (self.per_passage or self.known is not None):
            raise ValueError("questions that the model writes, and what it knows, need samples of at least 2 to judge")
        return self


class StreamConfig(Part):
    """Where the experiences come from: a named lab stream, or a file of trajectories, which replaces the name."""

    name: str | None = "lab/applications"
    world: str = "development"
    path: str | tuple[str, ...] | None = None
    format: Literal["auto", "jsonl", "openai", "sharegpt", "swe_agent", "tau_bench", "atif", "live"] = "auto"
    strict: Annotated[bool, Strict()] = True  # False: a malformed line goes to quarantine.jsonl and the run goes on
    order: Literal["blocked", "shuffled", "gradual", "recurring"] = "blocked"  # of a lab stream
    # streaming: one experience at a time, as it comes; batches: a task is there as a whole, in shuffled passes over it;
    # domain: all tasks of a domain are one, so that there is one shift; joint: all tasks are one; alone: each from the
    # base
    setting: Literal["streaming", "batches", "domain", "joint", "alone"] = "streaming"
    passes: Count = 1  # over each task, in every phase; of the settings but streaming
    garbage: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.0  # share of a lab stream that is wrong
    tasks: tuple[str, ...] | None = None  # which tasks of a lab stream; null for all
    pairs: Annotated[bool, Strict()] = False  # of a lab stream: a rejected reply beside the right one, for `preference`
    holdout: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.2  # share of a file's trajectories kept for R
    calibration: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.1  # share kept for selecting features
    limit: Count | None = None  # learn from at most this many trajectories per task

    acting: ActingConfig | None = None  # of the stream lab/acting; null: as it is by default
    documents: DocumentsConfig | None = None  # of documents among the files of path; null: templates only

    @model_validator(mode="before")
    @classmethod
    def _path_replaces_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("path"):
            return {**data, "name": None}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> StreamConfig:
        if self.name is None and not self.path:
            raise ValueError("give name (a lab stream) or path (a .jsonl or .jsonl.gz file)")
        if self.name != "lab/acting" and self.acting is not None:
            raise ValueError(f"acting belongs to the stream lab/acting, not to {self.name or self.path}")
        if self.name == "lab/acting" and (self.order != "blocked" or self.garbage):
            raise ValueError("lab/acting has episodes of the model's own: order is blocked, and garbage is 0")
        if self.pairs and (self.name is None or self.name == "lab/acting"):
            raise ValueError(f"pairs are made for the lab's conversations, not for {self.name or self.path}")
        if self.name == "lab/acting" and self.setting not in ("streaming", "alone"):
            raise ValueError(f"lab/acting has episodes that are played when they are due: no setting {self.setting}")
        if self.passes > 1 and (self.setting == "streaming" or self.name == "lab/acting"):
            raise ValueError(f"passes {self.passes}: what is streamed comes once; choose setting batches")
        return self


class SAETrainingConfig(Part):
    """How the SAE is trained where its folder holds none yet, on the run's model, and what it has to reach.

    An option left null is that of `featcl features train`.
    """

    text: Annotated[tuple[str, ...], Field(min_length=1)]  # files; nothing that is taught or scored
    layer: Annotated[int, Strict(), Field(ge=0)]
    d_sae: Count | None = None
    l0: Annotated[float, Strict(), Field(gt=0)] | None = None
    tokens: Count | None = None
    context: Count | None = None
    fvu: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 0.5  # at most so much variance unexplained
    loss_recovered: Annotated[float, Strict(), Field(le=1, allow_inf_nan=False)] = 0.8  # at least; of held-out text
    dead_fraction: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.5  # at most


class FeaturesConfig(Part):
    """The SAE, or one per layer, and how its features are chosen; texts are files, null the calibration split."""

    sae: str | dict[int, str] = "lab/olmo2/resid_post_3"
    check: bool = True  # reconstruct a few hundred tokens on loading; an SAE that does not fit the model is an error
    selector: str | dict[str, Any] = "contrast"  # a name, or {union | intersection | rank: [selector, …]}
    k: Count = 32
    bundle: str | None = None  # a named set of selectors, each with its own k, in place of `selector`
    positive: Texts = None
    negative: Texts = None
    background: Texts = None
    feature_ids: tuple[Int, ...] | None = None
    query: str | None = None  # for `explanations`
    explanations: str | None = None  # exported explanations, a file or folder; null for the local cache
    reviewed: str | None = None  # for `hand`: a YAML list of features with a reason each
    train: SAETrainingConfig | None = None  # where `sae` is a folder that holds none yet; null: it is there

    @model_serializer(mode="wrap")
    def _training_if_asked_for(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A run whose SAE is there keeps its digest."""
        return {key: value for key, value in plain(self).items() if value or key != "train"}

    @model_validator(mode="after")
    def _one_folder(self) -> FeaturesConfig:
        if self.train is not None and (not isinstance(self.sae, str) or self.sae.startswith("lab/")):
            raise ValueError(f"train makes one SAE, in the folder that sae names, not {self.sae!r}")
        return self

    @field_validator("selector")
    @classmethod
    def _known(cls, selector: str | dict[str, Any]) -> str | dict[str, Any]:
        return _known_selector(selector)


class AdapterConfig(Part):
    """The constraint: a row of the table of kinds, the basis it uses and the layers it is attached to."""

    kind: Literal["none", "write", "read", "both", "residual", "gated", "shift", "scale", "full", "osf", "mixture"] = (
        "both"
    )
    basis: Literal["chosen", "random", "pca", "random_features"] = "chosen"
    training: Literal["coordinates", "train_both_factors", "project_update", "penalty", "project_gradient"] = (
        "coordinates"
    )
    protect: str | None = None  # a folder of saved directions that must stay unwritten
    rank: Count | None = None
    layers: tuple[Int, ...] | None = None
    modules: tuple[str, ...] | None = None  # short names to keep, such as down_proj; null: all of the kind
    near_dependent: Literal["refuse", "drop"] = "refuse"  # features that lie in the span of the others
    alpha: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] | None = None  # null: a scaling of 1
    penalty: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 1.0  # strength, with training: penalty
    remainder: Literal["keep", "drop"] = "keep"  # of an update, when the directions change
    # of osf: the largest singular directions of each weight that it keeps, how many or a share of all
    preserved: Count | Annotated[float, Strict(), Field(gt=0, lt=1)] | None = None
    experts: Count | None = None  # of mixture: per linear, null: 4
    top: Count | None = None  # of mixture: experts that act on a token, null: 2
    residual_map: dict[str, Any] | None = None  # of an architecture that featcl does not know: featcl.models.Family

    @model_validator(mode="after")
    def _fits(self) -> AdapterConfig:
        if self.training != "coordinates" and self.kind not in ("write", "read", "both"):
            raise ValueError(f"training {self.training!r} belongs to the kinds write, read and both, not {self.kind!r}")
        if self.kind in ("none", "full", "osf", "mixture") and self.basis != "chosen":
            raise ValueError(
                f"basis belongs to the kinds that bound an update: kind {self.kind} has no use for {self.basis!r}"
            )
        for name, kind in (("preserved", "osf"), ("experts", "mixture"), ("top", "mixture")):
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"{name} belongs to kind {kind}, not to {self.kind!r}")
        if self.alpha is not None and self.kind != "none" and self.training != "train_both_factors":
            raise ValueError("alpha scales two trained factors: it belongs to kind none and to train_both_factors")
        return self


class ObjectiveConfig(Part):
    """One term of the loss; an option left null is the objective's own default."""

    name: str = "sft"
    weight: Float = 1.0
    alpha: Annotated[float, Strict(), Field(ge=0, le=1)] | None = None
    estimator: Literal["full", "sampled"] | None = None
    top_k: Count | None = None
    skip: Annotated[int, Strict(), Field(ge=0)] | None = None
    max_new_tokens: Count | None = None
    max_turns: Count | None = None
    temperature: Annotated[float, Strict(), Field(ge=0)] | None = None
    on_policy: Annotated[bool, Strict()] | None = None
    texts: Count | None = None
    # what the teacher is told; who it is (of preference: the reference), version:N being the student after update N
    context: Literal["auto", "trajectory", "feedback", "document", "demonstration"] | None = None
    teacher: Annotated[str, Field(pattern=r"^(model|self|base|ema|version:[0-9]+)$")] | None = None
    ema_decay: Annotated[float, Strict(), Field(ge=0, lt=1)] | None = None
    samples: Annotated[int, Strict(), Field(ge=2)] | None = None  # replies per prompt; null: its own reward
    reward: Literal["match"] | None = None  # judges sampled replies
    advantage: Literal["rloo", "grpo"] | None = None
    clip: Annotated[float, Strict(), Field(gt=0, lt=1)] | None = None  # of importance ratios, below and above 1
    clip_high: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] | None = None  # above 1, where it differs
    kl_weight: Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)] | None = None
    mean: Literal["tokens", "replies"] | None = None
    beta: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] | None = None  # of preference
    label_smoothing: Annotated[float, Strict(), Field(ge=0, lt=0.5)] | None = None
    length_normalised: Annotated[bool, Strict()] | None = None
    max_windows: Count | None = None  # of predict
    missing: Literal["error", "skip"] | None = None  # a trajectory without what the objective needs

    @model_serializer(mode="wrap")
    def _set_options_only(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if value is not None}

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _known_name(name, "objective", OBJECTIVES)


class WeighingConfig(Part):
    """How far an experience is trusted: the product of the signals' factors; below `quarantine_below` it is set aside.

    A list of phases with `policy` leaves `reward` out: a low reward is there what is learned from.
    """

    signals: tuple[Literal["reward", "surprise", "agreement", "energy", "memory", "prior"], ...] = (
        "reward",
        "surprise",
        "prior",
    )
    quarantine_below: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.0
    priors: dict[str, Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]] = {}  # source: factor, else 1

    @model_validator(mode="after")
    def _heard(self) -> WeighingConfig:
        _nonempty(self.signals, "signals; null for no weighing")
        if self.priors and "prior" not in self.signals:
            raise ValueError("priors are given, but prior is not among the signals")
        return self


class DenoisingConfig(Part):
    """What projecting does to the gradient, every `every` updates, against `spans` choices of random features."""

    every: Count = 25
    spans: Count = 20
    heldout: Annotated[int, Strict(), Field(ge=2)] = 32  # trajectories of the same task that are never learned from


class GuardConfig(Part):
    """An alarm on forgetting: `items` fresh ones every `every` updates, out of a pool of at least `pool`."""

    alpha: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.05  # probability that any alarm is ever false
    every: Count = 10
    items: Count = 128
    action: Literal["stop", "rollback", "shrink"] = "rollback"
    tolerance: Annotated[float, Strict(), Field(gt=0, lt=1)] = 0.01  # mean loss of the score that is accepted
    measure: Literal["reply", "answers", "tokens"] | None = None  # null: reply of graded items, tokens of text
    pool: Annotated[int, Strict(), Field(ge=1000)] = 2000

    @model_validator(mode="after")
    def _fresh(self) -> GuardConfig:
        if self.items > self.pool:
            raise ValueError(f"items {self.items} is more than the pool of {self.pool} that they are drawn from")
        return self


class LearnerConfig(Part):
    """How an experience becomes an update."""

    objectives: tuple[ObjectiveConfig, ...] = (ObjectiveConfig(),)
    optimizer: Literal["adamw", "sgd", "momentum", "titans"] = "adamw"
    lr: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 1.0e-3
    weight_decay: Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)] = 0.0
    steps: Count = 1
    experiences: Count | None = None  # of each task, its first ones; null for all
    max_windows: Count = 8  # of a trajectory longer than the model's context
    mask: Literal["assistant", "environment", "all"] = "assistant"  # which tokens of a conversation are learned from
    max_kl_per_update: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] | None = None
    micro_batch: Annotated[int, Strict(), Field(ge=32)] = 8192  # padded tokens at once; halved when memory runs out
    accumulate: Count = 1  # experiences whose mean gradient makes one step
    weighing: WeighingConfig | None = None  # null: every experience counts the same; one for the whole run
    denoising: DenoisingConfig | None = None  # null: not measured; one for the whole run
    guard: GuardConfig | None = None  # one for the whole run: a phase cannot have its own

    @field_validator("objectives")
    @classmethod
    def _not_empty(cls, objectives: tuple[ObjectiveConfig, ...]) -> tuple[ObjectiveConfig, ...]:
        return _nonempty(objectives, "objectives")


class MemoryTrainingConfig(Part):
    """How slow weights are trained: the full context, distilled into one window at a time with memory."""

    steps: Count = 400
    batch: Count = 16  # texts in a step
    lr: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 3.0e-3
    window: Annotated[int, Strict(), Field(ge=8)] = 48  # tokens that the truncated context has at most
    context: Annotated[int, Strict(), Field(ge=16)] = (
        112  # tokens that the full context has; of files, all have as many
    )
    texts: Texts = None  # files of text or conversations; null: long conversations of the laboratory
    heldout: Count = 96  # texts that are only measured on
    gate_only: Annotated[bool, Strict()] = (
        False  # slow weights stay as drawn: the control that says what they are worth
    )

    @model_validator(mode="after")
    def _cut(self) -> MemoryTrainingConfig:
        if self.context <= self.window:
            raise ValueError(f"context {self.context} must be longer than window {self.window}: nothing is forgotten")
        return self


class MemoryConfig(Part):
    """A memory of fixed size on one block; `kind: features` reads the chosen features and writes into their span."""

    kind: Literal["free", "features"] = "free"
    form: Literal["gate", "context", "layer"] = "gate"
    layer: Annotated[int, Strict(), Field(ge=0)] | None = None  # null: the middle block, or that of the features' SAE
    heads: Count = 4
    depth: Count = 1  # layers of the network that is the memory; 1 is linear
    chunk_size: Count = 16  # tokens whose gradients are taken at the same weights
    head_dim: Count | None = None  # null: d_model / heads
    conv: Annotated[int, Strict(), Field(ge=0)] = 0  # tokens that the short convolution sees; 0 for none
    persistent: Annotated[int, Strict(), Field(ge=0)] = 0  # tokens that every memory has read first
    momentum: Annotated[bool, Strict()] = True
    decay: Annotated[bool, Strict()] = True
    path: str | None = None  # a folder of trained slow weights, such as a run's `memory`
    train: MemoryTrainingConfig | None = None  # before the stream; with path, training goes on from there

    @model_validator(mode="after")
    def _useful(self) -> MemoryConfig:
        if self.path is None and self.train is None:
            raise ValueError("an untrained memory changes nothing: give train (train: {} for its defaults) or path")
        return self


class CanariesConfig(Part):
    """A small fixed set of general items, scored between evaluations: `items` of them, every `every` updates."""

    every: Count = 25
    items: Count = 64


class DriftConfig(Part):
    """How far the model has moved from its base, with every row of R: KL, ‖ΔW‖ per layer, and the SAE's features.

    A memory is no part of it: it stays on in both. Where nothing is held out, KL is that on background text alone.
    """

    texts: Annotated[int, Strict(), Field(ge=8)] = 64  # of each kind: held out of what is taught, and background
    features: Annotated[bool, Strict()] = True  # whose mean activation changed, and whether the SAE still fits
    top: Count = 20  # features that are named
    scales: tuple[Float, ...] = (0.0, 0.5, 1.0, 2.0)  # of the update, at which the SAE is measured after the last task


class ShiftConfig(Part):
    """How far apart consecutive segments of the stream are for the base model; measured once, at the start."""

    segments: Annotated[int, Strict(), Field(ge=2)] | None = None  # of equal length; null: the stream's own tasks
    sequences: Annotated[int, Strict(), Field(ge=2)] = 64  # of each segment at most, evenly spread
    layers: tuple[Int, ...] | None = None  # whose writers the gradient is taken of; null: all


class PerplexityConfig(Part):
    """Frozen texts in bits per byte, with every row of R."""

    files: Annotated[tuple[str, ...], Field(min_length=1)]  # .txt or .txt.gz; each is a number of its own
    context: Annotated[int, Strict(), Field(ge=2)] | None = None  # null: the model's, at most 2048
    stride: Count | None = None  # null: half the context


class TierConfig(Part):
    """What lm-evaluation-harness asks at one occasion."""

    tasks: tuple[str, ...] = ("featcl_lab_choice", "featcl_lab_exact", "featcl_lab_text")
    limit: Count | None = None  # items of each task


class SmokeConfig(TierConfig):
    """A few items, every `every` updates."""

    tasks: tuple[str, ...] = ("featcl_lab_choice",)
    limit: Count | None = 16
    every: Count = 100


class HarnessConfig(Part):
    """General ability by lm-evaluation-harness (the extra `lm-eval`); null leaves a tier out.

    The base model is asked all tiers, so that each has its reference.
    """

    smoke: SmokeConfig | None = None
    quick: TierConfig | None = TierConfig(limit=24)  # at the end of each task
    full: TierConfig | None = TierConfig()  # at the end of the last task
    include: str | None = None  # a folder with YAML tasks of your own
    cache: str | None = None  # null: the folder harness in `output`, shared by its studies
    batch_size: Count = 16


OPTIONAL_MEASURES = ("online", "cost", "drift", "shift", "perplexity", "harness")  # of evaluation, off by default


class EvaluationConfig(Part):
    """What is measured and when."""

    suites: tuple[str, ...] = ("lab/general",)
    every: Literal["task"] = "task"
    canaries: CanariesConfig | None = CanariesConfig()
    online: Annotated[bool, Strict()] = False  # every experience before it is learned: one forward more for each
    cost: Annotated[bool, Strict()] = False  # FLOPs of every update; peak memory and seconds by phase, in cost.json
    drift: DriftConfig | None = None
    shift: ShiftConfig | None = None
    perplexity: PerplexityConfig | None = None
    harness: HarnessConfig | None = None

    @model_serializer(mode="wrap")
    def _asked_for_only(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is off by default is not written, so that a run without it keeps its digest."""
        return {key: value for key, value in plain(self).items() if value or key not in OPTIONAL_MEASURES}


class TrackingConfig(Part):
    """Where the numbers go besides metrics.jsonl."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "featcl"
    tags: tuple[str, ...] = ()  # besides model, stream, kind, objectives and methods
    backends: tuple[Literal["tensorboard", "trackio"], ...] = ()
    samples: Annotated[int, Strict(), Field(ge=0)] = 4  # replies drawn at every evaluation, with the KL of each token
    ledger: Literal["coordinates", "lines"] = "coordinates"  # lines: what was learned from what, without the versions'
    # coordinates (three quarters of their bytes at every update), which diff, blame, revert and rollback need


ELSEWHERE = ("wandb", "project", "tags", "backends")  # of tracking: where numbers go, which changes none


class CheckpointConfig(Part):
    """How often the state is saved, besides after each evaluation; it changes no number."""

    updates: Count | None = None  # null: by time alone
    seconds: Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)] = 30.0


class MethodConfig(BaseModel):
    """A continual-learning method by name, with its own settings."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return _known_name(name, "method", tuple(METHODS))

    @model_validator(mode="after")
    def _own_parameters(self) -> MethodConfig:
        known = METHODS[self.name]
        for parameter in self.parameters:
            if parameter not in known:
                near = _nearest(parameter, known) or f"; there is {', '.join(known) or 'none'}"
                raise ValueError(f"method {self.name} has no parameter {parameter!r}{near}")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """What is given beside the name."""
        return dict(self.model_extra or {})


class RunConfig(Part):
    """Everything that decides a run. `RunConfig.load` reads it from YAML."""

    study: Name = "quickstart"
    arm: Name | None = None
    model: str = "lab/olmo2"
    runtime: RuntimeConfig = RuntimeConfig()
    stream: StreamConfig = StreamConfig()
    features: FeaturesConfig = FeaturesConfig()
    adapter: AdapterConfig = AdapterConfig()
    learner: LearnerConfig = LearnerConfig()
    phases: tuple[LearnerConfig, ...] | None = None
    teacher: str | None = None  # a model with the same tokenizer, for the objective `distillation`
    methods: tuple[MethodConfig, ...] = ()
    memory: MemoryConfig | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    seed: Annotated[int, Strict(), Field(ge=0)] = 0
    output: str = "results"

    @model_validator(mode="before")
    @classmethod
    def _phases_are_deltas(cls, data: Any) -> Any:
        """Each phase is written as a delta over `learner`; what is kept is the complete setting."""
        learner, phases = (data.get("learner") or {}, data.get("phases")) if isinstance(data, Mapping) else ({}, None)
        if not isinstance(learner, Mapping) or not isinstance(phases, (list, tuple)):
            return data
        return {**data, "phases": [_merge(learner, p) if isinstance(p, Mapping) else p for p in phases]}

    @field_validator("phases")
    @classmethod
    def _some_phase(cls, phases: tuple[LearnerConfig, ...] | None) -> tuple[LearnerConfig, ...] | None:
        return phases if phases is None else _nonempty(phases, "phases; null means the learner's own setting")

    @model_validator(mode="after")
    def _steps_or_accumulate(self) -> RunConfig:
        if any(part.steps > 1 and part.accumulate > 1 for part in self.phases or (self.learner,)):
            raise ValueError("learner.steps repeats one experience, learner.accumulate joins several: one of them is 1")
        return self

    @model_validator(mode="after")
    def _one_weigher(self) -> RunConfig:
        for name in ("weighing", "denoising"):
            if any(getattr(phase, name) != getattr(self.learner, name) for phase in self.phases or ()):
                raise ValueError(f"{name} is one for the whole run: set it under learner, not in one of the phases")
        return self

    @model_validator(mode="after")
    def _one_guard(self) -> RunConfig:
        if any(phase.guard != self.learner.guard for phase in self.phases or ()):
            raise ValueError("a guard watches the whole run: set it under learner.guard, not in one of the phases")
        return self

    @model_validator(mode="after")
    def _something_to_surprise(self) -> RunConfig:
        weighing = self.learner.weighing
        if weighing is not None and "memory" in weighing.signals and self.memory is None:
            raise ValueError("learner.weighing: the signal memory is what surprises a memory, and memory is null")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
        """Read a YAML file, the files it is a delta of, and `key=value` overrides.

        Args:
            path: The file; `arm: null` becomes its stem.
            overrides: `"adapter.k=16"`-like strings; a number picks an entry of a list (`phases.0.lr=1e-4`).

        Raises:
            ConfigError: Missing or malformed file, unknown key, wrong type, a cycle of `base` keys.
        """
        layers = list(_read_layers(Path(path), seen=()))
        layers.append((str(path), {"arm": layers[-1][1].get("arm") or Path(path).stem}))
        merged: dict[str, Any] = {}
        for _, layer in layers:
            merged = _merge(merged, layer)
        for override in overrides:
            merged = _apply_override(merged, override)
            layers.append(("command line", _apply_override({}, override)))
        return cls.from_dict(merged, layers=layers)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, layers: list[tuple[str, Any]] | None = None) -> RunConfig:
        """Validate plain data, with errors of one line; `layers` name the files that the keys came from."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, layers or [])) from None

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as plain JSON data; `RunConfig.from_dict` reads it back."""
        return self.model_dump(mode="json")

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved config without what changes no result: where they lie, how often state is saved."""
        content = {key: value for key, value in self.to_dict().items() if key not in ("output", "checkpoint")}
        content["tracking"] = {key: value for key, value in content["tracking"].items() if key not in ELSEWHERE}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """`output/study/arm/seed-n`."""
        return Path(self.output) / self.study / (self.arm or "arm") / f"seed-{self.seed}"


def _nonempty(values: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    if not values:
        raise ValueError(f"an empty list of {what}")
    return values


def _known_name(name: str, what: str, known: tuple[str, ...]) -> str:
    if name in known:
        return name
    right = f"known: {', '.join(known)}" if known else f"this version has no {what}s"
    raise ValueError(f"unknown {what} {name!r}{_nearest(name, known)}; {right}")


def _known_selector(selector: Any) -> Any:
    """A selector's name, or a combination of selectors, checked as deep as it goes."""
    if isinstance(selector, str):
        return _known_name(selector, "selector", SELECTORS)
    if not isinstance(selector, Mapping) or len(selector) != 1:
        raise ValueError(f"expected a selector's name or one of {', '.join(COMBINATIONS)} with a list")
    [(how, members)] = selector.items()
    _known_name(str(how), "combination", COMBINATIONS)
    if not isinstance(members, (list, tuple)) or len(members) < 2:
        raise ValueError(f"{how}: expected a list of two or more selectors, got {members!r}")
    return {how: [_known_selector(member) for member in members]}


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


# Reading YAML ---------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-3 as the number that people mean (YAML 1.1 does not)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key!r}", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
_Loader.yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: {error.problem or 'malformed YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: malformed YAML: {' '.join(str(error).split())}") from None


def _read_layers(path: Path, *, seen: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The chain of `base` files, the root first. An arm's name is its own: it is not inherited."""
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(p.name for p in (*seen, resolved))
        raise ConfigError(f"{path}: base: the files include each other: {chain}")
    try:
        data = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read this config: {getattr(error, 'strerror', None) or error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not a {type(data).__name__}")
    base = data.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base: expected the path of a file relative to this one, got {base!r}")
        inherited = list(_read_layers(path.parent / base, seen=(*seen, resolved)))
        yield from ((where, {k: v for k, v in layer.items() if k != "arm"}) for where, layer in inherited)
    yield str(path), data


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings merge, but for a selector; lists and values replace."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _over(key, old, value)
    return merged


def _over(key: str, old: Any, value: Any) -> Any:
    both = isinstance(old, Mapping) and isinstance(value, Mapping)
    return _merge(old, value) if both and key != "selector" else value


def _apply_override(data: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"command line: {override!r} is not key=value, for example adapter.kind=none")
    value = _parse_yaml(text, f"command line: {key}")
    return _set(data, key.strip().split("."), value)


def _set(node: Any, path: list[str], value: Any) -> Any:
    """A copy of `node` with `value` at the dotted `path`; a digit picks an entry of a list."""
    head, rest = path[0], path[1:]
    if isinstance(node, (list, tuple)) and head.isdigit() and int(head) < len(node):
        index = int(head)
        return [_set(old, rest, value) if i == index and rest else value if i == index else old
                for i, old in enumerate(node)]  # fmt: skip
    if isinstance(node, (list, tuple)):
        raise ConfigError(f"command line: {head!r} is not the index of one of the {len(node)} entries of a list")
    node = dict(node) if isinstance(node, Mapping) else {}
    old = node.get(head)
    if rest:
        node[head] = _set(old, rest, value)
    else:
        node[head] = _over(head, old, value)
    return node


GRID_HERE = (
    "a grid is for many runs, one of every combination of its values, and this is one run: featcl sweep and the file's "
    "folder make them all, --arms NAME those of one file or one arm"
)


# Errors of one line ---------------------------------------------------------------------------------------------


def _explain(error: ValidationError, layers: list[tuple[str, Any]]) -> str:
    """Every finding of pydantic as `file: dotted.key: what is wrong`, joined to one line."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        path = [part for part in item["loc"] if _is_key(part)]
        dotted = ".".join(str(part) for part in path)
        if dotted in found:  # a second branch of a union
            continue
        if item["type"] == "extra_forbidden":
            message = f"unknown key{_suggest(path)}" if path != ["grid"] else GRID_HERE
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            message = message.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping of keys")
            message += "" if item["type"] == "value_error" else f", got {item['input']!r}"
        origin = next((where for where, layer in reversed(layers) if _contains(layer, path)), "")
        found[dotted] = ": ".join(part for part in (origin, dotted, message) if part)
    return " ".join("; ".join(found.values()).split())


def _is_key(part: int | str) -> bool:
    """Pydantic puts the names of a union's branches into the path too; keys of ours are identifiers."""
    return isinstance(part, int) or (part.isidentifier() and part not in ("str", "int", "dict", "tuple"))


def _contains(layer: Any, path: list[Any]) -> bool:
    for part in path:
        known = layer if isinstance(layer, Mapping) else range(len(layer)) if isinstance(layer, (list, tuple)) else ()
        if part not in known:
            return False
        layer = layer[part]
    return True


def _suggest(path: list[Any]) -> str:
    """The nearest key at the same place, else the same key at another place."""
    siblings, word = _keys_at(path[:-1]), str(path[-1])
    near = _nearest(word, siblings)
    if near:
        return near
    elsewhere = [dotted for dotted in _all_keys() if dotted.split(".")[-1] == word]
    return f", did you mean {elsewhere[0]!r}?" if elsewhere else f"; keys here: {', '.join(siblings)}"


def _keys_at(path: list[Any]) -> list[str]:
    model: type[BaseModel] | None = RunConfig
    for part in path:
        if isinstance(part, str) and model is not None:
            model = _part_of(model.model_fields[part].annotation)
    return list(model.model_fields) if model else []


def _all_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        part = _part_of(field.annotation)
        if part is not None and name != "phases":
            yield from _all_keys(part, f"{prefix}{name}.")


def _part_of(annotation: Any) -> type[BaseModel] | None:
    """The config class inside `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _part_of(inner))), None)
