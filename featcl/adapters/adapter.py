"""What every adapter has, whatever its kind: coordinates, a switch, measurements, export, what training asks of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from featcl.adapters.hook_report import LinkReport
from featcl.adapters.leak import LeakReport
from featcl.adapters.report import FeatureReport
from featcl.errors import FeatclError
from featcl.html import facts_card, long_table
from featcl.models import inner_model
from featcl.subspace import Subspace

DEFAULT_NAME = "default"
_SHELF = "_featcl_adapters"  # attribute of the Hugging Face model that holds its adapters by name


class ConstrainedAdapter(ABC):
    """An update of a model that can only move along chosen directions; only its coordinates are trained.

    Attributes:
        model: The model to run; it shares the weights of the model that `constrain` was given.
        kind: A row of the table of kinds, such as `write` or `gated`.
        rank: Rank of the update, the same at every site.
        name: Tells it apart from other adapters on the same model.
        training: How it is trained; all but `coordinates` are ablations.
        changes: How often its directions were changed; coordinates from before mean other directions.
    """

    model: Any
    kind: str
    rank: int
    name: str
    training: str

    def __init__(
        self, model: Any, *, kind: str, rank: int, name: str = DEFAULT_NAME, training: str = "coordinates"
    ) -> None:
        self.model = model
        self.kind = kind
        self.rank = rank
        self.name = name
        self.training = training
        self.changes = 0
        check_name(model, name)
        vars(inner_model(model)).setdefault(_SHELF, {})[name] = self

    def __repr__(self) -> str:
        numbers = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"{type(self).__name__}(kind={self.kind!r}, rank={self.rank}, layers={self.lowest_layer}-{self.top_layer}, "
            f"name={self.name!r}, training={self.training!r}, trained={numbers:,}, delta_norm={self.delta_norm():.4g})"
        )

    def _repr_html_(self) -> str:
        spans = {f"{role}s, layer {layer}": f"{span.k} of {span.d_model} dimensions"
                 for (role, layer), span in self.spans().items()}  # fmt: skip
        trained = [(name, "×".join(map(str, tensor.shape)), float(tensor.detach().norm()))
                   for name, tensor in self._named()]  # fmt: skip
        facts = {
            "kind": self.kind,
            "rank": self.rank,
            "blocks": f"{self.lowest_layer} to {self.top_layer}",
            **spans,
            "trained numbers": sum(parameter.numel() for parameter in self.parameters()),
            "training": None if self.training == "coordinates" else self.training,
            "not exact in": ", ".join(self.exempt) or None,
            "‖ΔW‖": self.delta_norm(),
        }
        return facts_card(f"Adapter {self.name}", facts, long_table(("trained", "shape", "norm"), trained))

    # --- where it is

    @property
    @abstractmethod
    def lowest_layer(self) -> int:
        """Lowest adapted block: nothing below it is ever in the autograd graph."""

    @property
    @abstractmethod
    def top_layer(self) -> int:
        """Highest adapted block."""

    @property
    @abstractmethod
    def hook_layer(self) -> int:
        """Block at whose output the directions live; the topmost, where there are several sets."""

    @property
    def exempt(self) -> tuple[str, ...]:
        """Modules for which the constraint is not exact."""
        return ()

    @abstractmethod
    def spans(self) -> dict[tuple[str, int], Subspace]:
        """What it may write or react to in the residual stream, by (`write` or `read`, hook layer)."""

    # --- what is trained

    @abstractmethod
    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """The trained tensors with their names, in a fixed order."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained tensors by name, live and in a fixed order; `coordinates` copies them."""
        return dict(self._named())

    def parameters(self) -> list[nn.Parameter]:
        """The trained tensors, in a fixed order: hand them to an optimizer."""
        return [parameter for _, parameter in self._named()]

    def coordinates(self) -> dict[str, Tensor]:
        """Copies of all that `load_coordinates_` needs to restore the update, by name, detached."""
        return {name: parameter.detach().clone() for name, parameter in self._named()}

    @torch.no_grad()
    def load_coordinates_(self, coordinates: Mapping[str, Tensor]) -> None:
        """Overwrite the trained tensors with what `coordinates` returned.

        Raises:
            FeatclError: If a name is missing or unknown, or a shape differs; nothing is changed then.
        """
        named = dict(self._named())
        if differ := sorted(set(named) ^ set(coordinates)):
            where = "lack" if differ[0] in named else "hold the unknown"
            raise FeatclError(f"the coordinates {where} {differ[0]}: they belong to another adapter")
        for name, parameter in named.items():
            if parameter.shape != coordinates[name].shape:
                raise FeatclError(f"{name} is {list(coordinates[name].shape)}, here it is {list(parameter.shape)}")
        for name, parameter in named.items():
            parameter.copy_(coordinates[name])

    @property
    def linear(self) -> bool:
        """Whether coordinates enter linearly, so that updates add, subtract and rotate exactly."""
        return self.training == "coordinates" and self.kind != "none"

    @torch.no_grad()
    def add_(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, scale: float = 1.0) -> str:
        """C ← C + scale · (after - before): repeat an update, or with scale -1 take it back.

        Args:
            before: Coordinates before the update, as `coordinates` returned them.
            after: Coordinates after it.
            scale: How much of it.

        Returns:
            `exact` where coordinates enter linearly, else `approximate: …` with the reason.

        Raises:
            FeatclError: If the coordinates belong to another adapter, or to another choice of directions.
        """
        now = self.coordinates()
        for name in [name for name in now if name not in before or name not in after]:
            raise FeatclError(f"the update lacks {name}: it belongs to another adapter")
        self.load_coordinates_({name: now[name] + scale * (after[name] - before[name]) for name in now})
        if self.linear:
            return "exact"
        return "approximate: the trained factors enter as a product, so updates neither add nor subtract exactly"

    # --- what a training step asks; all but the ablations ask nothing

    def penalty(self) -> Float[Tensor, ""] | None:
        """A term to add to the loss, or None."""
        return None

    def project_gradients_(self) -> None:  # noqa: B027  (nothing by default)
        """Called after the backward pass, before the optimizer's step."""

    def after_step_(self) -> None:  # noqa: B027  (nothing by default)
        """Called after the optimizer's step."""

    def distance_squared(self) -> Float[Tensor, ""]:
        """‖ΔW‖² with its gradient.

        Raises:
            FeatclError: If the kind has no weight whose distance from the base could be measured.
        """
        raise FeatclError(f"kind {self.kind!r} changes no weight, so it has no distance from the base weights")

    # --- the switch

    @contextmanager
    def disabled(self, *, only_this: bool = False) -> Iterator[None]:
        """The base model inside the block: logits bit-equal to a model that was never adapted. Blocks may be nested.

        Args:
            only_this: Leave other adapters on the same model as they are; they are switched off too by default.
        """
        with ExitStack() as stack:
            for adapter in (self,) if only_this else tuple(adapters_of(self.model).values()):
                stack.enter_context(adapter._switched_off())
            yield

    @abstractmethod
    def _switched_off(self) -> AbstractContextManager[None]:
        """This adapter alone off inside the block; may be nested."""

    def restore_(self) -> None:  # noqa: B027  (nothing by default)
        """Put the float32 bases back, after `.to(torch.bfloat16)` or the like has rounded them in the live model."""

    @abstractmethod
    def remove(self) -> Any:
        """Take the adapter off; returns the Hugging Face model, which can be constrained anew."""

    def _forget_(self) -> None:
        """What `remove` calls last: the model no longer knows this adapter."""
        shelf = vars(inner_model(self.model)).get(_SHELF, {})
        if shelf.get(self.name) is self:
            del shelf[self.name]

    # --- what it does

    @abstractmethod
    def delta_norm(self) -> float:
        """Frobenius norm of the update, all sites together."""

    @abstractmethod
    def leak(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"] | None = None,
    ) -> LeakReport:
        """How much of what is written lies outside the chosen span, on this batch.

        Args:
            input_ids: Token ids.
            attention_mask: 1 where there is a token; without it every position counts as one.

        Returns:
            NaN, never 0, for an adapter that has not moved.

        Raises:
            FeatclError: If no token counts, or the adapter is switched off.
        """

    @abstractmethod
    def report(self, top: int = 20) -> FeatureReport | LinkReport:
        """The features that the update writes and reads most (a hook kind: which writes which), strongest first."""

    # --- export

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the adapter alone: a plain PEFT folder where its kind is one."""

    @abstractmethod
    def merge(self) -> Any:
        """A plain Hugging Face model with the update merged into a copy; this one stays as it is."""


def adapters_of(model: Any) -> dict[str, ConstrainedAdapter]:
    """The adapters on a model by name, in the order in which they were added."""
    return dict(vars(inner_model(model)).get(_SHELF, {}))


def forget_adapters_(model: Any) -> None:
    """Drop the list of adapters from a copy of a model that no longer holds them."""
    vars(inner_model(model)).pop(_SHELF, None)


def check_name(model: Any, name: str) -> None:
    """Refuse a name that is taken on this model, or that PEFT cannot use.

    Raises:
        FeatclError: Such a name.
    """
    if not isinstance(name, str) or not name.isidentifier() or name in "lora_" or name.endswith("_kept"):
        raise FeatclError(
            f"adapter name {name!r} cannot be used: letters, digits and underscores, such as 'home', no part of PEFT's "
            "prefix 'lora_', and no '_kept' at the end"
        )
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
        raise FeatclError(f"adapter name {name!r} cannot be used: torch's module dictionaries have an attribute of it")
    if name in adapters_of(model):
        raise FeatclError(
            f"the model already holds an adapter {name!r}: take it off first (adapter.remove()), or name this one"
        )
