"""The ledger: every accepted update with what it was learned from, and its change of the coordinates, bit for bit.

Two files that are only appended to: `deltas.bin` holds frames of coordinates (`deltas.py`), `ledger.jsonl` one line
per event, written after its frame. A line's `check` is a digest of the check before it and of the line, so that a line
that was changed, lost or moved is found; its `digest` is that of its frame. `features-<n>.safetensors` says what the
coordinates mean (`adapters/feature_map.py`).

| kind     | what happened                                                 | frame                   |
|----------|---------------------------------------------------------------|-------------------------|
| start    | the chain starts here, or starts anew: all coordinates        | stands alone            |
| update   | a version was learned                                         | differs from the last   |
| revert   | one update was subtracted, which is a version too             | differs from the last   |
| rollback | the head went back to a version; later ones left the line     |                         |
| note     | something that was measured or said at a version              |                         |
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from featcl.adapters.feature_map import FeatureMap, SiteMap
from featcl.errors import FeatclError
from featcl.files import append_bytes, digest_bytes, open_append
from featcl.learning.deltas import layout_of, pack, same
from featcl.learning.revert import Reverts
from featcl.learning.stats import UpdateStats

LINES, FRAMES = "ledger.jsonl", "deltas.bin"
EVERY = 64  # frames after which one stands alone: a version is read from at most so many
TOP = 3  # features named in a line

Coordinates = Mapping[str, Tensor]


class Ledger(Protocol):
    """Keeps every accepted update."""

    def append(
        self,
        stats: UpdateStats,
        before: Coordinates,
        after: Coordinates,
        *,
        trajectories: tuple[str, ...],
    ) -> None:
        """Add a version: its provenance, and its change of the coordinates."""
        ...

    def rolled_back(self, version: int) -> None:
        """The head went back to this version."""
        ...

    def reverted(self, version: int, *, of: int, before: Coordinates, after: Coordinates, how: str) -> None:
        """A version was made by subtracting the update of version `of`."""
        ...

    def delta(self, version: int) -> tuple[Coordinates, Coordinates]:
        """The coordinates before and after the update of a version."""
        ...


class RunLedger:
    """The ledger of one learner in a folder; it is made, or continued.

    Args:
        folder: Where.
        adapter: Whose coordinates are kept.
        frames: False: only lines are kept, so that `log` works and nothing that needs coordinates does.
        clock: Seconds since 1970; what `when` is.

    What lies there damaged is an error at the first thing that is written; a power cut may damage what was written
    after the last checkpoint, and `cut_back_` forgets that.
    """

    def __init__(
        self, folder: str | Path, adapter: Any, *, frames: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = Path(folder)
        self.adapter = adapter
        self.frames = frames
        self.clock = clock
        self.head = 0
        self._check = ""
        self._last: dict[str, Tensor] | None = None
        self._since = 0
        self._map: tuple[int, FeatureMap] | None = None  # of how many changes of directions
        self._changes = -1
        self._meanings: set[int] = set()  # numbers of the maps that frames refer to
        self._damage: FeatclError | None = None
        self._lines, self._frames = (open_append(self.folder / name) for name in (LINES, FRAMES))
        try:
            self._scan_()
        except FeatclError as error:
            self._damage = error

    # --- what a learner calls

    def append(
        self, stats: UpdateStats, before: Coordinates, after: Coordinates, *, trajectories: tuple[str, ...]
    ) -> None:
        """Add a version: its provenance, and its change of the coordinates."""
        names = ("source", "task", "objective", "loss", "kl", "step_scale", "tokens", "delta_norm", "weight")
        provenance = {name: getattr(stats, name) for name in names}
        self._version_(
            "update",
            stats.version,
            before,
            after,
            {"trajectories": list(trajectories), **provenance, "measures": dict(stats.measures)},
        )

    def reverted(self, version: int, *, of: int, before: Coordinates, after: Coordinates, how: str) -> None:
        """A version was made by subtracting the update of version `of`; `how` exact that is.

        Raises:
            FeatclError: If that update was taken back already.
        """
        from featcl.learning.history import History

        Reverts.recorded(History(self.folder).versions).refuse(of)
        self._version_("revert", version, before, after, {"of": of, "how": how})

    def rolled_back(self, version: int) -> None:
        """The head went back to this version; the next update starts there."""
        self._write_({"kind": "rollback", "version": version, "from": self.head})
        self.head = version

    def note(self, what: str, value: Any) -> None:
        """Something that was measured or said at the present version, such as a reading of the canaries."""
        self._write_({"kind": "note", "version": self.head, "what": what, "value": value})

    def delta(self, version: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The coordinates before and after the update of a version.

        Raises:
            FeatclError: If there is none on the way to the head, or it is not part of the present coordinates.
        """
        from featcl.learning.history import History

        history = History(self.folder)
        move = history.move(version)
        present, meant = self._meaning_(), history.features(version)
        if not alike(meant, present) or layout_of(move.after) != layout_of(self.adapter.coordinates()):
            raise FeatclError(
                f"v{version} was made before directions were changed, or what was learned was frozen (consolidate): "
                "it is not in the present coordinates, so it cannot be subtracted from them"
            )
        return move.before, move.after

    # --- what a checkpoint needs

    def position(self) -> dict[str, Any]:
        """Where the ledger ends, for `cut_back_`; all before it is on the disk when this returns."""
        self._require_whole()
        for file in (self._frames, self._lines):
            os.fsync(file.fileno())
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files()}
        return {**sizes, "check": self._check, "head": self.head}

    def cut_back_(self, position: Mapping[str, Any]) -> None:
        """Forget what was written after `position`.

        Raises:
            FeatclError: If the files are shorter than that, damaged before it, or not those that it is a position in.
        """
        for name, file in self._files():
            size = os.fstat(file.fileno()).st_size
            if size < position[name]:
                raise FeatclError(
                    f"{self.folder / name}: {size} bytes, but the checkpoint counts on {position[name]}; "
                    "restore the file, or start anew with --overwrite"
                )
            file.truncate(position[name])
        self._damage, self._last, self._changes = None, None, -1
        self._scan_()
        if self._check != position["check"]:
            raise FeatclError(
                f"{self.folder / LINES}: not the ledger that the checkpoint counts on; restore the file, or start anew "
                "with --overwrite"
            )
        self.head = position["head"]

    def close(self) -> None:
        """Nothing more will be written."""
        for file in (self._lines, self._frames):
            file.close()

    # --- writing

    def _version_(
        self, kind: str, version: int, before: Coordinates, after: Coordinates, record: Mapping[str, Any]
    ) -> None:
        """The frame and the line of a version, and before them a frame that stands alone where the chain needs one."""
        meaning = self._meaning_()
        if self._last is None or self._since >= EVERY or not same(self._last, before):
            self._framed_({"kind": "start", "version": version - 1, "layout": layout_of(before),
                           "features": self._changes}, before, None)  # fmt: skip
            self._since = 0
            self._last = dict(before)
        moved, top = _moved(meaning, before, after, linear=self.adapter.linear)
        self._framed_({"kind": kind, "version": version, **record, "moved": moved, "top": top}, after, self._last)
        self._since += 1
        self._last = dict(after)
        self.head = version

    def _meaning_(self) -> FeatureMap:
        """The map of the adapter's present directions; it is written where it is new."""
        if self._map is None or self._map[0] != self.adapter.changes:
            self._map = (self.adapter.changes, FeatureMap.of(self.adapter))
            self._changes = -1
        number, meaning = self._map
        if self._changes < 0:
            path = self.folder / f"features-{number}.safetensors"
            if number not in self._meanings or not path.is_file():
                meaning.save(path)
            elif not alike(FeatureMap.load(path), meaning):
                raise FeatclError(
                    f"{self.folder}: this ledger is of other directions than the adapter's; give it a folder of its own"
                )
            self._changes, self._last = number, None
        return meaning

    def _framed_(self, record: Mapping[str, Any], coordinates: Coordinates, last: Coordinates | None) -> None:
        if not self.frames:
            self._write_(record)
            return
        frame = pack(coordinates, last)
        at = self._frames.seek(0, os.SEEK_END)
        try:
            append_bytes(self._frames, frame)
            self._write_({**record, "at": at, "bytes": len(frame), "digest": digest_bytes(frame)[:32]})
        except BaseException:
            with suppress(OSError):
                self._frames.truncate(at)
            raise

    def _require_whole(self) -> None:
        if self._damage is not None:
            raise self._damage

    def _write_(self, record: Mapping[str, Any]) -> None:
        self._require_whole()
        value = {**record, "when": round(self.clock(), 3)}
        check = line_check(self._check, value)
        append_bytes(self._lines, encoded({**value, "check": check}) + b"\n")
        self._check = check
        self._meanings |= {record["features"]} if record["kind"] == "start" else set()

    def _files(self) -> tuple[tuple[str, Any], ...]:
        return ((LINES, self._lines), (FRAMES, self._frames))

    def _scan_(self) -> None:
        """Go on at the end of what is there; a torn last line, or a frame without its line, is cut off."""
        from featcl.learning.history import read_lines

        found = read_lines(self.folder)
        if found.torn is not None:
            self._lines.truncate(found.size)
        self._check = found.records[-1]["check"] if found.records else ""
        self.head = found.head
        self._meanings = {record["features"] for record in found.records if record["kind"] == "start"}
        end = max((record["at"] + record["bytes"] for record in found.records if "at" in record), default=0)
        if self._frames.seek(0, os.SEEK_END) < end:
            raise FeatclError(f"{self.folder / FRAMES}: shorter than {LINES} says; restore the file")
        self._frames.truncate(end)
        self._frames.seek(0, os.SEEK_END)
        self._lines.seek(0, os.SEEK_END)


def alike(one: FeatureMap, other: FeatureMap) -> bool:
    """Whether two maps mean the same directions; their numbers may differ in the last bits, from machine to machine."""
    return len(one.sites) == len(other.sites) and all(
        _form(a) == _form(b) and all(map(_close, (a.left, a.right), (b.left, b.right)))
        for a, b in zip(one.sites, other.sites, strict=True)
    )


def _form(site: SiteMap) -> tuple[Any, ...]:
    sets = [None if features is None else (features.layer, features.ids) for features in (site.rows, site.columns)]
    return site.site, site.form, site.bound, site.free, *sets


def _close(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def line_check(before: str, value: Mapping[str, Any]) -> str:
    """Digest that chains a line to the one before it."""
    return digest_bytes(before.encode() + encoded(value))[:16]


def encoded(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON in one line; not-a-number and infinities are null."""
    return json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _moved(
    meaning: FeatureMap, before: Coordinates, after: Coordinates, *, linear: bool
) -> tuple[float, list[dict[str, Any]]]:
    """‖after - before‖ of the coordinates, and the features whose rows moved most."""
    size = sum(float((after[name] - tensor).square().sum()) for name, tensor in before.items()) ** 0.5
    sizes = meaning.strengths_of_change(before, after, linear=linear)
    largest = sorted((key for key in sizes if sizes[key] > 0), key=lambda key: (-sizes[key], key))[:TOP]
    names = meaning.names
    return size, [
        {"layer": key.layer, "feature": key.feature, "role": key.role, "strength": sizes[key],
         **({"name": name} if (name := names.get((key.layer, key.feature))) else {})}
        for key in largest
    ]  # fmt: skip
