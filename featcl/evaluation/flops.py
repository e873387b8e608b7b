"""FLOPs of a pass, counted from the shapes of the model's matrix products; a multiplication and an addition are two.

For T tokens, batch b of s new tokens after `past` cached ones, S = past + s keys:

| product                     | forward        | backward: gradient of the input | of the weight            |
|-----------------------------|----------------|---------------------------------|--------------------------|
| linear [d_out, d_in]        | 2 T d_in d_out | the same, where one is wanted   | the same, where trained  |
| q kᵀ and p v, h heads of d  | 4 b h s S d    | half of it for each of q, k, p, v that wants one           |
| low rank B A, any frozen Q  | as two (three) linears, and Q C once a pass at a rank below k                |

Where nothing below needs a gradient none is counted: a frozen trunk costs its forward alone, and a frozen block above
an adapter its forward twice. Attention is counted over all S keys, also where a mask or a window hides some of them
and where a kernel skips them. Not counted: norms, softmax, activations, rotary angles, the optimizer's step, memories,
what gradient checkpointing or a fused attention kernel computes a second time.

Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1, with attention and partial backward passes added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from featcl.adapters.hooked import HookedBlock, hooked_blocks
from featcl.adapters.span_factor import SpanFactor
from featcl.errors import FeatclError
from featcl.models import inner_model, residual_map

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations.

    Attributes:
        forward: Of forward passes.
        backward: Of backward passes.
        attention: How many of the forward ones are in q kᵀ and p v, which grow with the square of the length.
    """

    forward: int = 0
    backward: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.attention + other.attention)


@dataclass(frozen=True, eq=False)
class _Block:
    """A block, and its linears by short name; LoRA layers stand for the linears that they wrap."""

    path: str
    module: nn.Module
    linears: dict[str, Any]

    @property
    def others(self) -> list[Any]:
        """The MLP's readers, then its writers: what reads and writes besides attention."""
        return [module for name, module in self.linears.items() if name not in ATTENTION]


class FlopCounter:
    """Counts the FLOPs of passes through a model, with the adapters that are switched on at the time of the call.

    Args:
        model: A causal language model whose residual map is known, adapted or not; adapt it before.

    Raises:
        FeatclError: For an architecture without residual map, or with other attention than q, k, v and o projections.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = inner_model(model)
        residual = residual_map(self.model)
        self.blocks = [_block(self.model, residual, layer) for layer in range(residual.n_layers)]
        self.heads = int(self.model.config.get_text_config().num_attention_heads)
        self.head = self.model.get_output_embeddings()

    def blocks_pass(
        self, batch: int, seq: int, *, past: int = 0, first: int = 0, last: int | None = None, gradient: bool = False
    ) -> Flops:
        """A pass through blocks `first` to `last` (exclusive), without the output head.

        Args:
            batch: Sequences.
            seq: New tokens of each, padding included.
            past: Tokens of each that are cached.
            first: Lowest block that runs: a cached trunk has none of those below.
            last: None: to the end.
            gradient: Whether a backward pass follows to everything that is trained.
        """
        hooks = self._hooks()
        total, flowing = Flops(), self.model.get_input_embeddings().weight.requires_grad and first == 0
        for block in self.blocks[first:last]:
            part, flowing = self._block_pass(block, batch, seq, past + seq, flowing)
            total += part
            for together in hooks.get(block.path, ()):  # these read the same h
                parts = [_hook_pass(site, batch * seq, flowing) for site in together]
                total = sum((part for part, _ in parts), total)
                flowing = flowing or any(trained for _, trained in parts)
        return total if gradient else replace(total, backward=0)

    def head_pass(self, positions: int, *, gradient: bool = False) -> Flops:
        """The output head at so many positions; `gradient`: whether its input wants one."""
        part, _ = _linear_pass(self.head, positions, flowing=gradient)
        return part if gradient else replace(part, backward=0)

    def full_pass(
        self, batch: int, seq: int, *, predictions: int | None = None, past: int = 0, gradient: bool = False
    ) -> Flops:
        """A whole pass.

        Args:
            batch: Sequences.
            seq: New tokens of each.
            predictions: Positions at which logits are made; None: all.
            past: Tokens of each that are cached.
            gradient: Whether a backward pass follows.
        """
        count = batch * seq if predictions is None else predictions
        trained = gradient and self.trains()
        body = self.blocks_pass(batch, seq, past=past, gradient=gradient)
        return body + self.head_pass(count, gradient=trained)

    def trains(self) -> bool:
        """Whether a gradient reaches the last hidden state: something that is switched on is trained."""
        flowing = any(parameter.requires_grad for parameter in self.model.base_model.parameters())
        hooked = [site for groups in self._hooks().values() for group in groups for site in group]
        return flowing or any(site.coordinates.requires_grad for site in hooked)

    def _hooks(self) -> dict[str, list[list[HookedBlock]]]:
        """Updates at the output of blocks by module path: each with those kept beside it from earlier directions."""
        found: dict[str, list[list[HookedBlock]]] = {}
        for site in hooked_blocks(self.model):
            if not site.off:
                found.setdefault(site.name, []).append([site, *site.kept])
        return found

    def _block_pass(self, block: _Block, batch: int, seq: int, keys: int, flowing: bool) -> tuple[Flops, bool]:
        tokens = batch * seq
        total, wants = Flops(), {}
        for name in ATTENTION[:3]:
            part, wants[name] = _linear_pass(block.linears[name], tokens, flowing)
            total += part
        product = 2 * batch * seq * keys * _width(block.linears["q_proj"])  # all heads of one of the two products
        mixing = wants["q_proj"] or wants["k_proj"]  # whether a gradient has to reach p = softmax(q kᵀ)
        backward = product * (wants["q_proj"] + wants["k_proj"] + mixing + wants["v_proj"])
        total += Flops(2 * product, backward, 2 * product)
        part, written = _linear_pass(block.linears["o_proj"], tokens, mixing or wants["v_proj"])
        total, flowing = total + part, flowing or written
        *readers, down = block.others
        wanted = []
        for reader in readers:
            part, wants_reader = _linear_pass(reader, tokens, flowing)
            total += part
            wanted.append(wants_reader)
        part, written = _linear_pass(down, tokens, any(wanted))
        return total + part, flowing or written


def _block(model: Any, residual: Any, layer: int) -> _Block:
    path = f"{residual.layers_path}.{layer}"
    sites = [site for side in (residual.readers, residual.writers) for site in side if site.layer == layer]
    linears = {site.name.rpartition(".")[2]: model.get_submodule(site.name) for site in sites}
    if missing := [name for name in ATTENTION if name not in linears]:
        raise FeatclError(f"FLOPs of {path} cannot be counted: it has no {missing[0]}, one of {', '.join(ATTENTION)}")
    if len(linears) < len(ATTENTION) + 2:
        raise FeatclError(f"FLOPs of {path} cannot be counted: its MLP has no reader or no writer in the residual map")
    return _Block(path, model.get_submodule(path), linears)


def _width(linear: Any) -> int:
    """Outputs of a linear, or of the one that a LoRA layer wraps."""
    return int(_base(linear).out_features)


def _base(linear: Any) -> Any:
    return linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear


def _linear_pass(linear: Any, tokens: int, flowing: bool) -> tuple[Flops, bool]:
    """A linear with the LoRAs that are active on it; whether its output wants a gradient."""
    base = _base(linear)
    part, trained = _product(base.in_features, base.out_features, tokens, base.weight.requires_grad, flowing)
    for a, b in _loras(linear):
        of_a, trained_a = _factor(a, tokens, flowing)
        of_b, trained_b = _factor(b, tokens, flowing or trained_a)
        part, trained = part + of_a + of_b, trained or trained_a or trained_b
    return part, flowing or trained


def _loras(linear: Any) -> list[tuple[Any, Any]]:
    """(lora_A, lora_B) of every active adapter in a PEFT layer."""
    if not hasattr(linear, "lora_A") or linear.disable_adapters or linear.merged:
        return []
    return [(linear.lora_A[name], linear.lora_B[name]) for name in linear.active_adapters if name in linear.lora_A]


def _factor(factor: Any, tokens: int, flowing: bool) -> tuple[Flops, bool]:
    """One factor of a LoRA; at a rank below k its weight is itself a product, formed once a pass."""
    trained = any(parameter.requires_grad for parameter in factor.parameters())
    part, _ = _product(factor.in_features, factor.out_features, tokens, trained, flowing)
    for module in factor.modules():
        if isinstance(module, SpanFactor):
            width, k = module.basis.shape
            rank = factor.in_features if module.side == "columns" else factor.out_features
            part += Flops(2 * width * k * rank, 2 * width * k * rank if trained else 0)
    return part, trained


def _product(d_in: int, d_out: int, tokens: int, trained: bool, flowing: bool) -> tuple[Flops, bool]:
    once = 2 * tokens * d_in * d_out
    return Flops(once, once * (int(trained) + int(flowing))), trained


def _hook_pass(site: HookedBlock, tokens: int, flowing: bool) -> tuple[Flops, bool]:
    """What a hook adds to a block's output: read, C, write; see the table in `featcl.adapters.hooked`."""
    d_model, k_write = site.write_basis.shape
    trained = site.coordinates.requires_grad
    sizes = _reading_sizes(site, d_model, k_write)
    total = Flops()
    for d_in, d_out, own in sizes:
        part, _ = _product(d_in, d_out, tokens, trained and own, flowing)
        total += part
    if site.read_basis is None and site.encoder is None:  # shift: one vector for all tokens
        part, _ = _product(k_write, d_model, 1, False, trained)
    else:
        part, _ = _product(k_write, d_model, tokens, False, flowing or trained)
    return total + part, trained


def _reading_sizes(site: HookedBlock, d_model: int, k_write: int) -> Sequence[tuple[int, int, bool]]:
    """(d_in, d_out, whether it is what is trained) of the products from the stream to coordinates along Q_w."""
    if site.encoder is not None:
        read = [(d_model, site.encoder.W_enc.shape[1], False)]
        k_read = site.plan.inputs
    elif site.read_basis is not None:
        k_read = site.read_basis.shape[1]
        read = [(d_model, k_read, False)]
    else:
        return []
    if site.coordinates.ndim == 1:  # scale: an element-wise product
        return read
    if site.frame is None:
        return [*read, (k_read, k_write, True)]
    rank = site.frame.shape[0]
    return [*read, (k_read, rank, False), (rank, k_write, True)]
