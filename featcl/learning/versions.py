"""Versions: the state after each accepted update, and how it is kept on disk."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from featcl.errors import FeatclError
from featcl.files import write_bytes

FILE = "learner.safetensors"
FORMAT = 5


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything an update changes.

    Attributes:
        version: Number of accepted updates.
        coordinates: The trained tensors by name.
        moments: The optimizer's state.
        optimizer: Its name.
        counters: Plain numbers, such as tokens learned from.
        parts: State of the weigher, the guard and the like by name, as JSON data.
        tensors: Their tensors, by `part/name`.
    """

    version: int
    coordinates: dict[str, Tensor]
    moments: dict[str, Tensor]
    optimizer: str
    counters: dict[str, int]
    parts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Versions:
    """The last few snapshots, newest last, and those that are held.

    Args:
        keep: How many of the last ones.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self._snapshots: OrderedDict[int, Snapshot] = OrderedDict()
        self._held: set[int] = set()

    @classmethod
    def of(cls, snapshots: Iterable[Snapshot], *, keep: int, held: Iterable[int] = ()) -> Versions:
        """These snapshots, oldest first, of which some are held."""
        versions = cls(keep)
        versions._held = set(held)
        for snapshot in snapshots:
            versions.add_(snapshot)
        return versions

    def copy(self) -> Versions:
        """The same snapshots, on their own."""
        same = Versions(self.keep)
        same._snapshots, same._held = OrderedDict(self._snapshots), set(self._held)
        return same

    def add_(self, snapshot: Snapshot) -> None:
        """Remember a snapshot; the oldest is forgotten when there are too many, unless it is held."""
        self._snapshots[snapshot.version] = snapshot
        self._snapshots.move_to_end(snapshot.version)
        self._drop_()

    def insert_(self, snapshot: Snapshot) -> None:
        """Remember a snapshot of a version before the newest, in its place; nothing is forgotten for it."""
        self._snapshots[snapshot.version] = snapshot
        self._snapshots = OrderedDict(sorted(self._snapshots.items()))

    def hold_(self, *versions: int) -> None:
        """Keep these, and no others, beyond the last few: what a guard may want to return to.

        Raises:
            FeatclError: If one is not kept any more.
        """
        if missing := [version for version in versions if version not in self._snapshots]:
            raise self._missing(missing[0])
        self._held = set(versions)
        self._drop_()

    def cut_(self, version: int) -> Snapshot:
        """The snapshot of `version`; later ones are forgotten.

        Raises:
            FeatclError: If it is not kept.
        """
        if version not in self._snapshots:
            raise self._missing(version)
        for later in [number for number in self._snapshots if number > version]:
            del self._snapshots[later]
        self._held &= set(self._snapshots)
        return self._snapshots[version]

    def __getitem__(self, version: int) -> Snapshot:
        if version not in self._snapshots:
            raise self._missing(version)
        return self._snapshots[version]

    @property
    def last(self) -> Snapshot:
        """The newest snapshot."""
        return self._snapshots[next(reversed(self._snapshots))]

    @property
    def earlier(self) -> tuple[Snapshot, ...]:
        """All but the newest, oldest first."""
        return tuple(self._snapshots.values())[:-1]

    @property
    def numbers(self) -> tuple[int, ...]:
        """Versions that can be restored, oldest first."""
        return tuple(self._snapshots)

    @property
    def held(self) -> tuple[int, ...]:
        """Versions that are kept however old they get."""
        return tuple(sorted(self._held))

    def _drop_(self) -> None:
        loose = [number for number in self._snapshots if number not in self._held]
        for number in loose[: max(0, len(loose) - self.keep)]:
            del self._snapshots[number]

    def _missing(self, version: int) -> FeatclError:
        return FeatclError(f"version {version} is not kept; there are {', '.join(map(str, self.numbers))}")


def save_snapshot(
    directory: str | Path, snapshot: Snapshot, settings: dict[str, Any], *, versions: Versions | None = None
) -> None:
    """Write a snapshot, and the earlier ones that are kept, as one safetensors file, atomically.

    Args:
        directory: Where.
        snapshot: The present state.
        settings: The learner's; in the file's header, with counters and parts.
        versions: What `rollback` can restore; None for the snapshot alone.
    """
    from safetensors.torch import save

    snapshots = [*(versions.earlier if versions else ()), snapshot]
    tensors = {f"{s.version}/{name}": tensor for s in snapshots for name, tensor in _tensors(s).items()}
    once, same = _once(tensors)
    header = {
        "same": same,
        "format": FORMAT,
        "snapshots": [{name: getattr(s, name) for name in _PLAIN} for s in snapshots],
        "held": versions.held if versions else (),
        "settings": settings,
    }
    data = save(once, metadata={"learner": json.dumps(header, sort_keys=True)})
    write_bytes(Path(directory) / FILE, data)


def load_snapshot(directory: str | Path) -> tuple[Snapshot, dict[str, Any]]:
    """The present state as `save_snapshot` wrote it, and the learner's settings; raises as `load_versions`."""
    versions, settings = load_versions(directory, keep=1)
    return versions.last, settings


def load_versions(directory: str | Path, *, keep: int) -> tuple[Versions, dict[str, Any]]:
    """Read all that `save_snapshot` wrote.

    Returns:
        The snapshots, and the learner's settings.

    Raises:
        FeatclError: If there is none, or it is damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(directory) / FILE
    if not path.is_file():
        raise FeatclError(f"{directory}: no saved learner ({FILE}) here")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["learner"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FeatclError(f"{path}: not a saved learner ({error})") from error
    if header.get("format") != FORMAT:
        raise FeatclError(f"{path}: saved in format {header.get('format')}, this version reads format {FORMAT}")
    tensors |= {name: tensors[first] for name, first in header["same"].items()}
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        version, part, name = key.split("/", 2)
        parts.setdefault(version, {name: {} for name in _TENSORS})[part][name] = tensor
    none: dict[str, dict[str, Tensor]] = {name: {} for name in _TENSORS}
    found: list[dict[str, Any]] = [{**saved, **parts.get(str(saved["version"]), none)} for saved in header["snapshots"]]
    snapshots = [Snapshot(**values) for values in found]
    return Versions.of(snapshots, keep=keep, held=header["held"]), header["settings"]


_PLAIN = ("version", "optimizer", "counters", "parts")
_TENSORS = ("coordinates", "moments", "tensors")


def _once(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """On the CPU, each tensor once, though no version changed it; and for the other names, under which name it is."""
    once: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and place in first:
            same[name] = first[place]
            continue
        first[place] = name
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        shared = storage.data_ptr() in stored or storage.nbytes() > plain.nbytes
        once[name] = plain.clone() if shared else plain
        stored.add(storage.data_ptr())
    return once, same


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for part in _TENSORS for name, tensor in getattr(snapshot, part).items()}
