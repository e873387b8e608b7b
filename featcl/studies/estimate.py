"""What a run would need, from shapes alone: memory, operations, time.

A model without weights stands in for the real one: every parameter is one number, seen in the right shape. The adapter
of the config is attached to it along random directions of the same k, so that its size and its share of the
operations are the run's own (`featcl.evaluation.flops` counts them). Not counted: the suites and background texts of
an evaluation, methods, a memory, a second model that teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from featcl.adapters import constrain
from featcl.adapters.full import _around
from featcl.adapters.trunk import trunk_end
from featcl.config import LearnerConfig, RunConfig
from featcl.errors import FeatclError
from featcl.evaluation.flops import FlopCounter
from featcl.features import Directions
from featcl.learning.learner import KEPT_VERSIONS
from featcl.models import blocks

SAMPLING = ("distillation", "self_distillation", "policy")  # objectives that have the model write
REPLY = 64  # tokens that it writes, where the config does not say
STATES = {"adamw": 2, "sgd": 0, "momentum": 1, "titans": 1}  # numbers an optimizer keeps for each trained one


@dataclass(frozen=True)
class Lengths:
    """What a stream holds.

    Attributes:
        experiences: That are learned from, all phases together.
        tokens, targets: Of all of these; `targets` are predicted.
        longest: Tokens and targets of the longest window.
        scored: Held-out texts that every row of R reads, and their tokens.
        rows: Of R.
    """

    experiences: int
    tokens: int
    targets: int
    longest: tuple[int, int]
    scored: tuple[int, int]
    rows: int


@dataclass(frozen=True)
class Speed:
    """What a device sustains: operations, and bytes of weights read, in a second."""

    flops: float
    bytes: float


SPEEDS = {"cuda": Speed(100e12, 1.5e12), "cpu": Speed(0.05e12, 2e10)}


@dataclass(frozen=True)
class Estimate:
    """Of a run; memory in bytes, operations in FLOPs, time in seconds.

    Attributes:
        parameters, trained: How many numbers the model and the update have.
        layers: Lowest and highest block that the update changes.
        weights, update, optimizer, versions, sae, logits, activations: Memory; `update` with gradients and frozen
            bases, `versions` those kept to go back to, `activations` what a backward pass of the longest window keeps.
        per_update, learning, scoring: Operations of one update, of all, of all rows of R.
        written: Tokens that the model writes.
        seconds: At the speed that was assumed.
    """

    parameters: int
    trained: int
    layers: tuple[int, int]
    weights: int
    update: int
    optimizer: int
    versions: int
    sae: int
    logits: int
    activations: int
    per_update: int
    learning: int
    scoring: int
    written: int
    seconds: float

    @property
    def memory(self) -> int:
        """All together, at the peak of an update; the SAE is gone by then, and weighs where it is larger."""
        learning = self.update + self.optimizer + self.versions + self.logits + self.activations
        return self.weights + max(learning, self.sae)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "memory": self.memory}


def stand_in(config: Any, dtype: torch.dtype) -> nn.Module:
    """A model of a Hugging Face config without weights: all of a parameter's entries are one number, a one.

    Args:
        config: Of the model.
        dtype: In which the run would load it.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            one = torch.ones((), dtype=dtype).expand(tensor.shape)
            module.register_parameter(name, nn.Parameter(one, requires_grad=False))
        for name, tensor in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.ones((), dtype=tensor.dtype).expand(tensor.shape), persistent=False)
    model.tie_weights()
    return model.eval()


def estimate(config: RunConfig, model: nn.Module, lengths: Lengths, *, hook_layers: Sequence[int],
             d_sae: int, speed: Speed) -> Estimate:  # fmt: skip
    """Sizes, operations and time of a run.

    Args:
        config: The run's.
        model: A stand-in, or the model itself; the adapter is attached to it.
        lengths: Of the stream.
        hook_layers: Blocks of the SAEs.
        d_sae: Features of the largest SAE; 0 where that is not known.
        speed: Of the device.

    Raises:
        FeatclError: For a kind that has no estimate (`osf` needs the weights), or an adapter that does not fit.
    """
    width = next(model.parameters()).element_size()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    d_model = model.config.get_text_config().hidden_size  # type: ignore[union-attr]
    trained, bases = _attach_(config, model, hook_layers, d_model)
    counter, touched = FlopCounter(model), _touched(config, model, hook_layers)
    lowest = touched[0]
    learners = config.phases or (config.learner,)
    seq, targets = (round(count / max(1, lengths.experiences)) for count in (lengths.tokens, lengths.targets))
    step = counter.full_pass(1, seq, predictions=targets, gradient=True).total
    again = counter.blocks_pass(1, seq, first=lowest).total + counter.head_pass(targets).total  # the divergence
    steps = sum(learner.steps for learner in learners) / len(learners)
    written = sum(_written(learner) for learner in learners) * lengths.experiences // len(learners)
    per_update = round(step * steps + again) + 2 * parameters * written // max(1, lengths.experiences)
    texts, tokens = lengths.scored
    scoring = lengths.rows * counter.full_pass(texts, round(tokens / texts)).forward if texts else 0
    learning = per_update * lengths.experiences
    longest, predicted = lengths.longest
    return Estimate(
        parameters=parameters,
        trained=trained,
        layers=touched,
        weights=parameters * width,
        update=4 * (2 * trained + bases),  # with gradients; of full, the copy that it starts from
        optimizer=4 * trained * STATES[learners[0].optimizer],
        versions=4 * trained * (1 + STATES[learners[0].optimizer]) * KEPT_VERSIONS,
        sae=4 * 2 * d_model * d_sae,
        logits=4 * predicted * _vocabulary(model),
        activations=_activations(model, longest, lowest, width),
        per_update=per_update,
        learning=learning,
        scoring=scoring,
        written=written,
        seconds=(learning + scoring) / speed.flops + written * parameters * width / speed.bytes,
    )


def _attach_(config: RunConfig, model: nn.Module, hook_layers: Sequence[int], d_model: int) -> tuple[int, int]:
    """Put the config's adapter on the model; trained and frozen numbers."""
    wanted = config.adapter
    if wanted.kind in ("osf", "mixture"):
        raise FeatclError(f"adapter.kind {wanted.kind} has no estimate: it is made from the weights themselves")
    if wanted.kind == "full":
        own = _trained_in_full(model, wanted.layers)
        for parameter in own:
            parameter.requires_grad_(True)
        return sum(parameter.numel() for parameter in own), 0
    generator = torch.Generator().manual_seed(0)
    sets = {
        layer: Directions.from_vectors(torch.randn(config.features.k, d_model, generator=generator), layer=layer)
        for layer in hook_layers
    }
    kind = "residual" if wanted.kind == "gated" else wanted.kind  # the gate reads k features, as Q_r does
    adapter = constrain(
        model, next(iter(sets.values())) if len(sets) == 1 else sets, kind=kind, rank=wanted.rank,
        layers=wanted.layers, modules=wanted.modules, training=wanted.training, seed=config.seed,
    )  # fmt: skip
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    inner: Any = model
    known = {name for name, _ in inner.named_parameters() if "lora_" in name}
    frozen = sum(p.numel() for name, p in inner.named_parameters() if name in known and not p.requires_grad)
    return trained, frozen


def _trained_in_full(model: nn.Module, layers: Sequence[int] | None) -> list[nn.Parameter]:
    """As `featcl.adapters.full` chooses: the blocks, and of all of them also what stands around but the head."""
    found = blocks(model)
    if next(model.parameters()).dtype != torch.float32:
        raise FeatclError("adapter.kind full trains the weights themselves, in float32: set runtime.dtype=float32")
    own = [parameter for layer in layers or range(len(found)) for parameter in found[layer].parameters()]
    around = set() if layers else _around(model, found[0])
    return own + [parameter for parameter in model.parameters() if id(parameter) in around - {id(p) for p in own}]


def _touched(config: RunConfig, model: nn.Module, hook_layers: Sequence[int]) -> tuple[int, int]:
    """The lowest and the highest block that the update changes."""
    n_layers, own = len(blocks(model)), config.adapter.layers
    if config.adapter.kind == "full":
        return (min(own), max(own)) if own else (0, n_layers - 1)
    return min(trunk_end(model), n_layers - 1), max(own or hook_layers)


def _written(learner: LearnerConfig) -> int:
    """Tokens that the model writes for one experience."""
    return sum(
        (term.samples or 1) * (term.max_new_tokens or REPLY)
        for term in learner.objectives
        if term.name in SAMPLING and term.on_policy is not False
    )


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _activations(model: Any, tokens: int, lowest: int, width: int) -> int:
    """What a backward pass keeps of every block from the lowest adapted one up: the inputs of norms, linears and
    products, without the attention's own probabilities."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = 2 * (getattr(text, "num_key_value_heads", None) or heads) * head
    per_token = 6 * text.hidden_size + 2 * heads * head + keys + 4 * text.intermediate_size
    return tokens * per_token * width * (len(blocks(model)) - lowest)
