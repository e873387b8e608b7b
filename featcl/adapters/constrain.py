"""`constrain`: a model and chosen directions in, an adapter that can only move along them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from featcl.adapters.adapter import DEFAULT_NAME, ConstrainedAdapter, check_name
from featcl.adapters.change import Remainder, check_remainder
from featcl.adapters.full import constrain_full
from featcl.adapters.hook_adapter import constrain_hooks
from featcl.adapters.hook_plan import HOOK_KINDS
from featcl.adapters.lora import attach
from featcl.adapters.lora_adapter import LoraAdapter, Request, peft_model_of
from featcl.adapters.mixture import constrain_mixture
from featcl.adapters.osf import constrain_osf
from featcl.adapters.plan import KINDS, check_directions, check_layers, default_layers, is_whole, plan_sites
from featcl.adapters.sets import DirectionSet
from featcl.adapters.training import check_training
from featcl.errors import FeatclError
from featcl.models import inner_model, residual_map

# Rivals that are bounded by no features, and what they have no use for.
FREE_KINDS = {
    "full": ("rank", "modules", "protect", "gate", "alpha", "training", "preserved", "experts", "top"),
    "osf": ("rank", "modules", "protect", "gate", "alpha", "training", "experts", "top"),
    "mixture": ("protect", "gate", "alpha", "training", "preserved"),
}


def constrain(
    model: nn.Module,
    directions: DirectionSet | Mapping[int, DirectionSet],
    *,
    kind: str = "both",
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    modules: Sequence[str] | None = None,
    protect: Any = None,
    gate: DirectionSet | Mapping[int, DirectionSet] | None = None,
    fold_norms: bool = True,
    near_dependent: Literal["refuse", "drop"] = "refuse",
    training: str = "coordinates",
    alpha: float | None = None,
    penalty: float = 1.0,
    remainder: Remainder = "keep",
    preserved: int | float | None = None,
    experts: int | None = None,
    top: int | None = None,
    name: str = DEFAULT_NAME,
    seed: int = 0,
) -> ConstrainedAdapter:
    """Adapt a model so that its update can only write along, or react to, the chosen features.

    Writers get ΔW = Q_w C, Q_w = orth(D ⊘ g); readers ΔW = C Q_rᵀ, Q_r = orth(E ⊘ g); C is 0 at the start. The other
    kinds change the residual stream h at the hook itself, Q_w = orth(D), Q_r = orth(E): `residual` by Q_w C Q_rᵀ h,
    `gated` by Q_w C f_S(h) with the SAE's own activations f_S, `shift` by Q_w c, `scale` by Q_w (c ⊙ Q_wᵀ h).

    Args:
        model: A model whose residual map is known; PEFT replaces its linears in place, the hook kinds leave it whole.
        directions: One set, or one per layer. `.vectors` (decoder rows) bound writers, `.readers` (encoder columns,
            else `.vectors`) bound readers.
        kind: `write`, `read`, `both`, `residual`, `gated`, `shift`, `scale`; or a rival: `none`, plain LoRA on the
            modules of `both`, `mixture`, LoRA experts chosen token by token, `full`, the weights themselves, or `osf`,
            their low singular part.
        rank: None is k. A smaller one moves in `rank` fixed random combinations of inputs (or outputs); `shift` and
            `scale` have none. Of an expert, None is 8.
        layers: Blocks to adapt. None: the block of the hook and the n_layers // 3 before it, or the mapping's keys; a
            hook kind acts at its sets' own hooks only; all blocks for `full`.
        modules: Short names to keep, such as `down_proj`; all of the kind by default; a hook kind has none.
        protect: What must stay untouched: a `Subspace`, rows, or directions; or a mapping with `write` and `read`.
        gate: For `gated`, the features whose activations trigger, where `directions` are a control without any.
        fold_norms: False leaves the norms' gains out, as a control; the update then leaks (no norm is in the way of a
            hook kind).
        near_dependent: `refuse` names directions that lie in the span of the others, `drop` leaves those features out.
        training: `coordinates`, or an ablation on LoRA kinds: `train_both_factors`, `project_update`, `penalty`,
            `project_gradient` (see `featcl.adapters.training`).
        alpha: LoRA scaling is alpha / rank, with `none` and `train_both_factors` only; None is a scaling of 1.
        penalty: Strength of ‖the part of ΔW outside the span‖² in the loss, with training `penalty`.
        remainder: What `change_directions` does with what the new span cannot hold: `keep` moves it to a second, frozen
            LoRA (or frozen updates at the hook), `drop` leaves it out.
        preserved: Largest singular directions that `osf` keeps of each weight: how many, or a share of all; None: half.
        experts, top: Of `mixture`: experts per linear, and how many act on a token; None: 4 and 2.
        name: Of this adapter; a model can hold several, all active unless switched off.
        seed: Of random factors; `none` and ranks below k have some.

    Returns:
        The adapter; logits are those of the base until it is trained.

    Raises:
        FeatclError: Unknown kind or architecture; empty, too many, too wide or near-dependent directions; a layer out
            of range or above the hook; an unknown module; a rank above k; nothing left after protecting, or nothing
            that protecting would bound; an argument of another type.
    """
    _check_arguments(rank, layers, near_dependent, remainder)
    free = {"preserved": preserved, "experts": experts, "top": top}
    if kind in FREE_KINDS:
        given = {"rank": rank, "modules": modules, "protect": protect, "gate": gate, "alpha": alpha, **free}
        given |= {"training": None if training == "coordinates" else training}
        if unused := next((name for name in FREE_KINDS[kind] if given[name] is not None), None):
            raise FeatclError(f"kind {kind!r} is bounded by no features and has no use for {unused}")
        own = {name: value for name, value in given.items() if value is not None}
        return _constrain_free(model, directions, kind=kind, layers=layers, own=own, name=name, seed=seed)
    if unused := next((name for name, value in free.items() if value is not None), None):
        right = "osf" if unused == "preserved" else "mixture"
        raise FeatclError(f"kind {kind!r} has no use for {unused}, which belongs to {right}")
    if kind in HOOK_KINDS:
        if modules is not None:
            raise FeatclError(f"kind {kind!r} changes the residual stream, so it has no modules to choose")
        if training != "coordinates" or alpha is not None:
            raise FeatclError(f"kind {kind!r} trains coordinates only: training and alpha belong to the LoRA kinds")
        return constrain_hooks(
            model,
            directions,
            kind=kind,
            rank=rank,
            layers=layers,
            protect=protect,
            gate=gate,
            near_dependent=near_dependent,
            remainder=remainder,
            seed=seed,
            name=name,
        )
    if kind not in KINDS:
        there = ", ".join([*KINDS, *HOOK_KINDS, *FREE_KINDS])
        raise FeatclError(f"adapter kind {kind!r} is not available: there is {there}")
    if gate is not None:
        raise FeatclError(f"kind {kind!r} takes no gate: only `gated` is triggered by features' own activations")
    request = Request(
        modules=None if modules is None else tuple(modules),
        protect=protect,
        fold_norms=fold_norms,
        near_dependent=near_dependent,
        seed=seed,
        alpha=alpha,
        penalty=penalty,
        remainder=remainder,
    )
    return _constrain_lora(
        model, directions, kind=kind, rank=rank, layers=layers, name=name, training=training, request=request
    )


def _constrain_free(
    model: nn.Module, directions: Any, *, kind: str, layers: Sequence[int] | None, own: dict[str, Any], name: str,
    seed: int,
) -> ConstrainedAdapter:  # fmt: skip
    """The rivals without features; directions say only which blocks, and of `full` not even that."""
    if kind == "full":
        return constrain_full(model, layers=layers, name=name)
    check_directions(model, directions)
    if layers is None and isinstance(directions, Mapping):
        layers = sorted(int(layer) for layer in directions)
    elif layers is None:
        layers = default_layers(int(directions.layer), residual_map(model).n_layers)
    if kind == "osf":
        return constrain_osf(model, layers=layers, name=name, **own)
    return constrain_mixture(model, layers=layers, name=name, seed=seed, **own)


def _check_arguments(rank: Any, layers: Any, near_dependent: Any, remainder: Any) -> None:
    if rank is not None and not is_whole(rank):
        raise FeatclError(f"rank must be a whole number, or None for k, not {rank!r}")
    if layers is not None:
        check_layers(layers)
    if near_dependent not in ("refuse", "drop"):
        raise FeatclError(f"near_dependent {near_dependent!r} is not available: there is refuse and drop")
    check_remainder(remainder)


def _constrain_lora(
    model: nn.Module,
    directions: DirectionSet | Mapping[int, DirectionSet],
    *,
    kind: str,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    name: str,
    training: str,
    request: Request,
) -> LoraAdapter:
    """A LoRA adapter at its zero start, beside those that are on the model; arguments as for `featcl.constrain`.

    Raises:
        FeatclError: As `featcl.constrain`; the model is left as it was.
    """
    if kind == "none" and request.protect is not None:
        raise FeatclError("kind 'none' promises nothing, so it cannot protect anything: choose write, read or both")
    check_training(training, kind, request.alpha, request.penalty)
    host = peft_model_of(model)
    check_name(model, name)
    plans = plan_sites(
        model,
        directions,
        kind=kind,
        layers=layers,
        modules=request.modules,
        protect=request.protect,
        fold_norms=request.fold_norms,
        near_dependent=request.near_dependent,
    )
    k = max(len(plan.fold.vectors) for plan in plans)
    if rank is not None and not 1 <= rank <= k:
        raise FeatclError(f"rank {rank} is not between 1 and k = {k}, the number of directions")
    rank = rank or k
    peft_model, sites = attach(
        inner_model(model),
        plans,
        kind=kind,
        rank=rank,
        seed=request.seed,
        name=name,
        training=training,
        alpha=request.alpha,
        host=host,
    )
    return LoraAdapter(peft_model, sites, kind=kind, rank=rank, name=name, training=training, request=request)
