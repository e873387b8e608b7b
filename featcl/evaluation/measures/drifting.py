"""How far the model has moved from its base, with every row of R: predictions, weights, and an SAE's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from featcl.errors import FeatclError
from featcl.evaluation.drift import kl_drift, scaled, weight_drift
from featcl.evaluation.feature_drift import FeatureDrift, Validity, feature_drift, sae_validity
from featcl.evaluation.measures.measure import Measure, Place, Reading
from featcl.features.tokens import Text

FEATURES = ("hook", "feature_id", "name", "difference", "low", "high", "floor", "changed", "base", "now")
VALIDITY = ("hook", "scale", "delta_norm", "fvu", "l0", "dead_fraction", "loss_recovered", "tokens")


@dataclass(frozen=True)
class WatchedSae:
    """An SAE whose features are watched.

    Attributes:
        sae: A `sae_lens.SAE` of the base model.
        names: Feature id -> what people call it.
        suffix: Of its logged names, where several are watched.
    """

    sae: Any
    names: Mapping[int, str] = field(default_factory=dict)
    suffix: str = ""

    @property
    def hook(self) -> str:
        """Where it was trained."""
        return str(self.sae.cfg.metadata["hook_name"])


class DriftMeasure(Measure):
    """KL to the base model on new and on background text, ‖ΔW‖ per layer, features that moved, and the SAE's fit.

    Args:
        adapter: A `ConstrainedAdapter`; the base is the adapter switched off (a memory stays on in both).
        tokenizer: The model's.
        texts: Kind (`new`, `background`) -> texts; a kind without any is left out.
        saes: Whose features are watched on `background`; none for no features.
        top: Features that are named.
        scales: Of the update, at which the SAEs are measured after the last task.
        seed: Of the bootstrap.

    Raises:
        FeatclError: If there is no background, or the update cannot be scaled.
    """

    name = "drift"

    def __init__(
        self, adapter: Any, tokenizer: Any, texts: Mapping[str, Sequence[Text]], *, saes: Sequence[WatchedSae] = (),
        top: int = 20, scales: Sequence[float] = (0.0, 1.0), seed: int = 0,
    ) -> None:  # fmt: skip
        if not texts.get("background"):
            raise FeatclError("evaluation.drift: there is no background text to measure on; name features.background")
        self.adapter, self.tokenizer, self.saes = adapter, tokenizer, tuple(saes)
        self.texts = {kind: found for kind, found in texts.items() if found}
        self.top, self.scales, self.seed = top, tuple(scales), seed
        weight_drift(adapter)  # what cannot be measured is known before the run, not at its end
        if self.saes and any(scale != 1.0 for scale in self.scales):
            _check_scalable(adapter)

    def at_row(self, place: Place) -> Reading:
        record = {**self._predictions(), **weight_drift(self.adapter).record()}
        changes, fits = [], []
        for watched in self.saes:
            found = feature_drift(
                watched.sae, self.adapter, self.tokenizer, self.texts["background"], top=self.top,
                names=watched.names, seed=self.seed,
            )  # fmt: skip
            scales = self.scales if place.last else ()
            *fit, now = self._validity(watched, (*scales, 1.0))
            record |= {f"{name}{watched.suffix}": value for name, value in found.record().items()}
            record |= {f"drift/sae_fvu{watched.suffix}": now.health.fvu,
                       f"drift/sae_loss_recovered{watched.suffix}": now.health.loss_recovered}  # fmt: skip
            changes += _change_rows(watched, found)
            fits += [_fit_row(watched, each) for each in fit]
        tables: dict[str, Any] = {"feature_drift": (FEATURES, changes)} if self.saes else {}
        return Reading(record, {**tables, **({"sae_validity": (VALIDITY, fits)} if fits else {})})

    def _predictions(self) -> dict[str, float]:
        record = {}
        for kind, texts in self.texts.items():
            found = kl_drift(self.adapter, self.tokenizer, texts)
            record |= {f"drift/kl_{kind}": found.forward, f"drift/reverse_kl_{kind}": found.reverse,
                       f"drift/flipped_{kind}": found.flipped}  # fmt: skip
        return record

    def _validity(self, watched: WatchedSae, scales: Sequence[float]) -> tuple[Validity, ...]:
        return sae_validity(watched.sae, self.adapter, self.tokenizer, self.texts["background"], scales=scales)


def _check_scalable(adapter: Any) -> None:
    try:
        with scaled(adapter, 0.0):
            pass
    except FeatclError as error:
        raise FeatclError(f"evaluation.drift.scales: {error}; set it to [1.0]") from error


def _change_rows(watched: WatchedSae, found: FeatureDrift) -> list[list[Any]]:
    return [[watched.hook, *(row[column] for column in FEATURES[1:])] for row in found.to_dicts()]


def _fit_row(watched: WatchedSae, found: Validity) -> list[Any]:
    return [watched.hook, found.scale, found.delta_norm, *(getattr(found.health, name) for name in VALIDITY[3:])]
