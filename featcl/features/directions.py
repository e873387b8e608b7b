"""Named directions of the residual stream, with where they come from: what the constraint is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featcl import files
from featcl.errors import FeatclError
from featcl.features.encoder import FeatureEncoder
from featcl.subspace import Subspace

TENSORS_FILE = "directions.safetensors"
MANIFEST_FILE = "directions.json"


@dataclass(frozen=True, eq=False)
class Directions:
    """k unit directions at one hook, each a feature to write and, where known, a feature to read.

    Attributes:
        vectors: Unit rows [k, d_model], float32: the decoder rows, which writing moves along.
        readers: Unit rows [k, d_model]: the encoder columns, which reading listens to; None uses `vectors`.
        feature_ids: SAE indices; positions where the directions do not come from an SAE.
        hook_name: Where in the model, in TransformerLens' spelling.
        layer: Index of the block whose output that is.
        selector: How they were chosen, or the control they are.
        encoder: What the features' own activations need; None where there is no SAE.
        names: What people call them, or None.
        manifest: Provenance: SAE, selector settings, data digests, scores.
    """

    vectors: Float[Tensor, "k d_model"]
    readers: Float[Tensor, "k d_model"] | None
    feature_ids: tuple[int, ...]
    hook_name: str
    layer: int
    selector: str
    encoder: FeatureEncoder | None = None
    names: tuple[str, ...] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        k = len(self.feature_ids)
        for what, rows in (("vectors", self.vectors), ("readers", self.readers)):
            if rows is None:
                continue
            if rows.ndim != 2 or rows.shape != self.vectors.shape or len(rows) != k or k == 0:
                raise FeatclError(f"directions: {what} must be [k={k}, d_model] rows, not {list(rows.shape)}")
            if not (rows.norm(dim=-1) - 1).abs().max() < 1e-4:  # also catches NaN
                raise FeatclError(f"directions: {what} must be unit rows: use Directions.from_vectors")
        if len(set(self.feature_ids)) != k:
            raise FeatclError("directions: a feature id occurs twice")
        if (lowest := min(self.feature_ids)) < 0:
            raise FeatclError(f"directions: feature id {lowest} is negative")
        if self.names is not None and len(self.names) != k:
            raise FeatclError(f"directions: {len(self.names)} names for {k} directions")
        if self.encoder is not None and self.encoder.k != k:
            raise FeatclError(f"directions: an encoder of {self.encoder.k} features for {k} directions")

    @classmethod
    def from_vectors(
        cls,
        vectors: Float[Tensor, "k d_model"],
        *,
        layer: int,
        feature_ids: Sequence[int] | None = None,
        hook_name: str | None = None,
        readers: Float[Tensor, "k d_model"] | None = None,
        **details: Any,
    ) -> Directions:
        """Directions from rows of any length above zero.

        Args:
            vectors: Rows [k, d_model].
            layer: Index of the block at whose output they live.
            feature_ids: SAE indices; positions by default.
            hook_name: By default `blocks.{layer}.hook_resid_post`.
            readers: Rows [k, d_model] to read along; None reads along `vectors`.
            details: `selector`, `encoder`, `names`, `manifest`.

        Raises:
            FeatclError: For a row that is zero or not finite, or counts that do not match.
        """
        ids = tuple(range(len(vectors))) if feature_ids is None else tuple(int(i) for i in feature_ids)
        return cls(
            vectors=_unit_rows(vectors, ids, "vector"),
            readers=None if readers is None else _unit_rows(readers, ids, "reader"),
            feature_ids=ids,
            hook_name=hook_name or f"blocks.{layer}.hook_resid_post",
            layer=layer,
            selector=details.pop("selector", "vectors"),
            **details,
        )

    @property
    def k(self) -> int:
        """Number of directions."""
        return len(self.feature_ids)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.vectors.shape[1]

    @property
    def labels(self) -> tuple[str, ...]:
        """What to print for each direction: its name where there is one, else its id."""
        return self.names or tuple(str(feature) for feature in self.feature_ids)

    @property
    def without_effect(self) -> tuple[int, ...]:
        """Features whose steering did no more than random directions do; empty where nobody validated them."""
        return tuple(self.manifest.get("validation", {}).get("without_effect", ()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of tensors, ids and hook; provenance does not enter it."""
        data = [files.digest_bytes(f"{name} {list(t.shape)}".encode() + _bytes(t)) for name, t in self._tensors()]
        settings = self.encoder.settings() if self.encoder else None
        return files.digest_json([data, self.feature_ids, self.hook_name, self.layer, settings])

    def subspace(self) -> Subspace:
        """The span of the vectors, with the basis vector nearest to each direction."""
        return Subspace.from_vectors(self.vectors, names=self.labels)

    def to(self, device: torch.device | str) -> Directions:
        """The same directions on another device."""
        return replace(
            self,
            vectors=self.vectors.to(device),
            readers=None if self.readers is None else self.readers.to(device),
            encoder=None if self.encoder is None else self.encoder.to(device),
        )

    def save(self, folder: str | Path) -> None:
        """Write `directions.safetensors` and its manifest `directions.json` into `folder`."""
        from safetensors.torch import save

        folder = Path(folder)
        files.write_bytes(folder / TENSORS_FILE, save({name: t.cpu().contiguous() for name, t in self._tensors()}))
        files.write_json(
            folder / MANIFEST_FILE,
            {
                "feature_ids": self.feature_ids,
                "hook_name": self.hook_name,
                "layer": self.layer,
                "selector": self.selector,
                "names": self.names,
                "encoder": self.encoder.settings() if self.encoder else None,
                "manifest": self.manifest,
                "digest": self.digest,
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Directions:
        """Read what `save` wrote; bit-equal.

        Raises:
            FeatclError: If a file is missing, malformed, or its content does not match its digest.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            saved = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
            tensors = load_file(folder / TENSORS_FILE)
            directions = cls(
                vectors=tensors["vectors"],
                readers=tensors.get("readers"),
                feature_ids=tuple(saved["feature_ids"]),
                hook_name=saved["hook_name"],
                layer=saved["layer"],
                selector=saved["selector"],
                encoder=_encoder(tensors, saved["encoder"]),
                names=None if saved["names"] is None else tuple(saved["names"]),
                manifest=saved["manifest"],
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise FeatclError(f"{folder} does not hold saved directions: {type(error).__name__}: {error}") from error
        if directions.digest != saved.get("digest"):
            raise FeatclError(f"{folder}: the directions do not match their digest; the files were changed")
        return directions

    def _repr_html_(self) -> str:
        from featcl.features.show import directions_card

        return directions_card(self)

    def __repr__(self) -> str:
        return (
            f"Directions(k={self.k}, d_model={self.d_model}, hook_name={self.hook_name!r}, "
            f"selector={self.selector!r}, digest={self.digest[:8]})"
        )

    def _tensors(self) -> list[tuple[str, Tensor]]:
        tensors = [("vectors", self.vectors)]
        if self.readers is not None:
            tensors.append(("readers", self.readers))
        if self.encoder is not None:
            tensors += [(f"encoder.{name}", tensor) for name, tensor in self.encoder.tensors().items()]
        return tensors


def _unit_rows(rows: Tensor, ids: tuple[int, ...], what: str) -> Tensor:
    rows = rows.detach().double()
    if rows.ndim != 2 or len(rows) != len(ids):
        raise FeatclError(f"directions: {what}s must be [k={len(ids)}, d_model] rows, not {list(rows.shape)}")
    lengths = rows.norm(dim=-1)
    wrong = [ids[row] for row in (~(lengths > 0) | ~lengths.isfinite()).nonzero().flatten().tolist()]
    if wrong:
        raise FeatclError(f"directions: the {what} of feature {wrong[0]} is zero or not finite")
    return (rows / lengths[:, None]).float().contiguous()


def _encoder(tensors: dict[str, Tensor], settings: dict[str, Any] | None) -> FeatureEncoder | None:
    if settings is None:
        return None
    parts = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
    return FeatureEncoder(
        W_enc=parts["W_enc"],
        b_enc=parts["b_enc"],
        b_dec=parts["b_dec"],
        threshold=parts.get("threshold"),
        **{**settings, "chosen": tuple(settings["chosen"])},
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
