"""Reading a ledger: its line of versions, what each one changed, and any version's coordinates, bit-equal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from featcl.adapters.feature_map import FeatureMap
from featcl.errors import FeatclError
from featcl.files import digest_bytes
from featcl.learning.deltas import unpack
from featcl.learning.ledger import FRAMES, LINES, line_check

VERSIONS = ("update", "revert")  # the kinds of record that make a version


@dataclass(frozen=True)
class Lines:
    """The lines of a ledger.

    Attributes:
        records: Whole lines, in order.
        size: Bytes that they take.
        torn: What was wrong with a last line that is cut off, else None.
    """

    records: tuple[dict[str, Any], ...]
    size: int
    torn: str | None

    @property
    def head(self) -> int:
        """The version that the ledger ends at."""
        return next((r["version"] for r in reversed(self.records) if r["kind"] != "note"), 0)


@dataclass(frozen=True, eq=False)
class Line:
    """The way to the head, from the first version on; what was rolled back is not on it.

    Attributes:
        places: Version -> place of its record.
        starts: Version without a record of its own that a chain of frames starts from -> place of the start.
        eras: Version, of both -> place of the start of its era. A new one begins where directions were changed, all
            that was learned was frozen, or updates were not recorded: across it, changes cannot be told from frames.
        notes: Place of a note -> place of the record of the version at which it was made, also off the line.
    """

    places: dict[int, int] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    eras: dict[int, int] = field(default_factory=dict)
    notes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]]) -> Line:
        """The line of a ledger's records."""
        line, era = cls(), 0
        for place, record in enumerate(records):
            version, kind = record["version"], record["kind"]
            if kind in VERSIONS:
                line._cut_(version - 1)
                line.places[version], line.eras[version] = place, era
            elif kind == "note" and version in line.places:
                line.notes[place] = line.places[version]
            elif kind == "rollback":
                line._cut_(version)
            elif kind == "start":
                line._cut_(version)
                if version not in line.eras:
                    line.starts[version] = place
                before = records[line.eras.get(version, place)]
                if version not in line.eras or any(before[key] != record[key] for key in ("features", "layout")):
                    line.eras[version] = place
                era = line.eras[version]
        return line

    def _cut_(self, version: int) -> None:
        """Later versions left the line."""
        for found in (self.places, self.starts, self.eras):
            for number in [number for number in found if number > version]:
                del found[number]


@dataclass(frozen=True, eq=False)
class Moved:
    """One version on the way to the head: its record, and the coordinates before and after it."""

    record: Mapping[str, Any]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


class History:
    """A ledger as it was written.

    Args:
        folder: Of the ledger.
        size: Read so many bytes of its lines, as a checkpoint counts on; None: all.

    Attributes:
        records: All events, in order.
        torn: What was wrong with its last line, if anything.

    Raises:
        FeatclError: If there is none, or a line was changed.
    """

    def __init__(self, folder: str | Path, *, size: int | None = None) -> None:
        self.folder = Path(folder)
        if not (self.folder / LINES).is_file():
            raise FeatclError(f"{self.folder}: no ledger ({LINES}) here")
        found = read_lines(self.folder, size)
        self.records, self.torn, self.head = found.records, found.torn, found.head
        self._maps: dict[int, FeatureMap] = {}

    @cached_property
    def _line(self) -> Line:
        return Line.of(self.records)

    @property
    def line(self) -> dict[int, int]:
        """Version -> place of its record in `records`, on the way to the head; what was rolled back is not on it."""
        return self._line.places

    @property
    def versions(self) -> tuple[Mapping[str, Any], ...]:
        """The records of the versions on the way to the head, oldest first."""
        return tuple(self.records[place] for place in self.line.values())

    @property
    def first(self) -> int:
        """The version that the line starts from; nothing earlier is known."""
        return next((record["version"] for record in self.records if record["kind"] == "start"), 0)

    def record(self, version: int) -> Mapping[str, Any]:
        """The record of a version on the line.

        Raises:
            FeatclError: If there is no such version.
        """
        if version not in self.line:
            last = max(self.line, default=self.first)
            there = f"there are v{min(self.line)} to v{last}" if self.line else "nothing was learned yet"
            gone = any(r["kind"] in VERSIONS and r["version"] == version for r in self.records)
            raise FeatclError(f"no version v{version}{', it was rolled back' if gone else ''}; {there}")
        return self.records[self.line[version]]

    def coordinates(self, version: int) -> dict[str, Tensor]:
        """The coordinates of a version on the line, or of one that it starts from, bit-equal.

        Raises:
            FeatclError: If there is no such version, or the ledger is damaged.
        """
        if version in self.line:
            place = self.line[version]
        elif version in self._line.starts:
            place = self._line.starts[version]
        else:
            self.record(version)
            raise AssertionError
        start = max(at for at in range(place + 1) if self.records[at]["kind"] == "start")
        return list(self._decoded(start, place))[-1][1]

    def moves(self) -> Iterator[Moved]:
        """Every version on the way to the head with what it changed, oldest first; two versions in memory at a time."""
        wanted = set(self.line.values())
        before: dict[str, Tensor] = {}
        for place, after in self._decoded(0, max(wanted, default=-1)):
            if place in wanted:
                yield Moved(self.records[place], before, after)
            before = after

    def move(self, version: int) -> Moved:
        """What one version on the line changed.

        Raises:
            FeatclError: If there is no such version, or the ledger is damaged.
        """
        record = self.record(version)
        place = self.line[version]
        start = max(at for at in range(place) if self.records[at]["kind"] == "start")
        before, after = [found for _, found in self._decoded(start, place)][-2:]
        return Moved(record, before, after)

    def features(self, version: int | None = None) -> FeatureMap:
        """What coordinates mean at a version; None: at the head."""
        number = self.records[self._era(version)]["features"]
        if number not in self._maps:
            self._maps[number] = FeatureMap.load(self.folder / f"features-{number}.safetensors")
        return self._maps[number]

    def bounding(self, version: int | None = None) -> FeatureMap:
        """As `features`, of an adapter that some bound.

        Raises:
            FeatclError: For one of the kinds that none bound: full, osf, mixture.
        """
        found = self.features(version)
        if not found.sites:
            raise FeatclError(
                f"{self.folder}: no features bound what this run trained (kind full, osf or mixture), so its updates "
                "cannot be told by features; `featcl log` tells them one by one, `featcl blame --item` by an answer"
            )
        return found

    def require_one_era(self, old: int, new: int | None = None) -> None:
        """Raise unless what changed between two versions is the difference of their coordinates.

        Args:
            old: A version.
            new: A later one; None: the head.

        Raises:
            FeatclError: Naming the version between them from which on that is so.
        """
        if (era := self._era(new)) != self._era(old):
            start = self.records[era]["version"]
            later = "the head" if new is None else f"v{new}"
            raise FeatclError(
                f"between v{old} and {later}, at v{start}, directions were changed, or what was learned was frozen "
                f"(consolidate), or updates were not recorded: features can be compared from v{start} on"
            )

    def _era(self, version: int | None) -> int:
        """Place of the start of a version's era; None: of the head's, or where it has none, of the last."""
        eras = self._line.eras
        place = eras.get(self.head if version is None else version)
        if place is None and version is None:
            place = max(eras.values(), default=None)
        if place is None:
            raise FeatclError(f"{self.folder}: nothing was learned yet")
        return place

    def notes(self, what: str) -> list[tuple[int | None, Any]]:
        """What was noted under a name, in order, each with the place of the version at which it was.

        A number is given anew to another version once the first was rolled back; a place is not.
        """
        places = self._line.notes
        found = enumerate(self.records)
        return [(places.get(at), r["value"]) for at, r in found if r["kind"] == "note" and r["what"] == what]

    def _decoded(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(place, coordinates) of every record with a frame, from one that stands alone on."""
        now: dict[str, Tensor] | None = None
        layout: Any = None
        with open(self.folder / FRAMES, "rb") as file:
            for place in range(start, stop + 1):
                record = self.records[place]
                if "at" not in record and record["kind"] in ("start", *VERSIONS):
                    raise FeatclError(
                        f"{self.folder}: it was kept without coordinates (tracking.ledger: lines), which only "
                        "`featcl log` can do with; run again with tracking.ledger=coordinates"
                    )
                if "at" not in record:
                    continue
                file.seek(record["at"])
                frame = file.read(record["bytes"])
                if digest_bytes(frame)[:32] != record["digest"]:
                    raise FeatclError(
                        f"{self.folder / FRAMES}: the frame of v{record['version']} at byte {record['at']} was "
                        "damaged; restore the file"
                    )
                layout = record.get("layout", layout)
                now = unpack(frame, layout, None if record["kind"] == "start" else now)
                yield place, now


def read_lines(folder: str | Path, size: int | None = None) -> Lines:
    """The lines of a ledger up to one that is cut off; of its first `size` bytes, or of all.

    Raises:
        FeatclError: If a line before the last was changed, lost or moved.
    """
    path = Path(folder) / LINES
    records: list[dict[str, Any]] = []
    check, end = "", 0
    data = path.read_bytes()[:size] if path.is_file() else b""
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        record = _parsed(line)
        whole = number < len(lines)
        if record is None or not whole or record["check"] != line_check(check, _without(record)):
            if number >= len(lines) - 1 and not b"".join(lines[number:]):
                return Lines(tuple(records), end, f"{path}: line {number} is cut off; read up to it")
            raise FeatclError(f"{path}:{number}: this line was changed, or one before it is missing; restore the file")
        records.append(record)
        check = record["check"]
        end += len(line) + 1
    return Lines(tuple(records), end, None)


def _without(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "check"}


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "check" in record and "kind" in record else None
