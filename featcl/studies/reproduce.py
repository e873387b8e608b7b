"""`featcl reproduce`: a finished run once more, from its config.json alone, and whether the numbers are the same.

They must be the same to the last bit on a CPU of the same model, with the same versions and as many threads; else
every number may differ by `tolerance`: |now - was| <= tolerance · max(1, |was|).
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcl.config import ConfigError, RunConfig
from featcl.errors import FeatclError
from featcl.run import run as run_config
from featcl.tracking.environment import differences

TOLERANCE = 0.02
SHOWN = 20  # differences that are printed
# Of summary.json: what follows from the config, and how it is tracked; and what rounding changes with the numbers.
NOT_NUMBERS = ("config_digest",)
ROUNDED = ("directions_digest",)
HARMLESS = ("commit", "python", "platform")  # of the environment: differences that are said, but excuse no number


@dataclass(frozen=True)
class Difference:
    """One number, or name, that is not as it was.

    Attributes:
        where: File and key.
        was: In the run's folder.
        now: In the new run.
    """

    where: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.where}: was {_plain(self.was)}, is {_plain(self.now)}"


@dataclass(frozen=True)
class Reproduction:
    """What running once more showed.

    Attributes:
        run: Folder of the run.
        exact: Whether every bit had to be the same.
        tolerance: What was allowed, where not.
        compared: How many values.
        differences: Those outside of what is allowed.
        within: The largest difference that was allowed, on the scale of the tolerance; 0 where all bits are the same.
        environment: What of machine and software is not as it was.
        seconds: What it took.
    """

    run: str
    exact: bool
    tolerance: float
    compared: int
    differences: tuple[Difference, ...]
    within: float
    environment: tuple[str, ...]
    seconds: float

    @property
    def same(self) -> bool:
        """Whether the numbers are reproduced."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "same": self.same}

    def __str__(self) -> str:
        rule = "to the last bit" if self.exact else f"within {self.tolerance:g}"
        lines = [f"environment: {line}" for line in self.environment]
        lines += [str(difference) for difference in self.differences[:SHOWN]]
        if len(self.differences) > SHOWN:
            lines.append(f"and {len(self.differences) - SHOWN} more")
        found = "reproduced" if self.same else f"{len(self.differences)} differ"
        at_most = "" if self.exact or not self.same else f"; the largest difference is {self.within:.2g}"
        return "\n".join([*lines, f"{self.run}: {self.compared} values compared {rule}: {found}{at_most}"])


def reproduce(run_dir: str | Path, *, tolerance: float = TOLERANCE) -> Reproduction:
    """Run a finished run's config again in a temporary folder, and compare.

    Args:
        run_dir: Its folder; config.json, env.json, summary.json and R.json are enough.
        tolerance: Where the machine or the software is not the same.

    Raises:
        FeatclError: If it is no finished run's folder, its config is not one of this version, or what it reads is gone.
    """
    path = Path(run_dir)
    saved, before, summary = (_read(path / name) for name in ("config.json", "env.json", "summary.json"))
    config = _config(path, saved)
    _same_threads(before)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="featcl-reproduce-") as place:
        tracking = config.tracking.model_copy(update={"wandb": "disabled"})
        again = run_config(config.model_copy(update={"output": place, "tracking": tracking}))
        now = _read(again.path / "env.json")
        exact = exactly_comparable(before, now)
        pairs = [("summary.json", summary, _read(again.path / "summary.json"))]
        pairs += [("R.json", _read(path / "R.json"), _read(again.path / "R.json"))]
        found = [item for name, was, is_ in pairs for item in compare(name, was, is_, exact=exact)]
    outside = tuple(difference for difference, size in found if size > (0.0 if exact else tolerance))
    inside = max((size for _, size in found if size <= tolerance), default=0.0)
    changed = [*differences(before, now), *_resumed(before)]
    return Reproduction(str(path), exact, tolerance, len(found), outside, inside, tuple(changed),
                        time.monotonic() - start)  # fmt: skip


def exactly_comparable(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two environments must give the same bits: a CPU, and all that decides them is the same."""
    names = [name for name in HARMLESS if name in before]
    alike = {**before, **{name: now.get(name) for name in names}}
    return before.get("device") == now.get("device") == "cpu" and not differences(alike, now) and not _resumed(before)


def _resumed(before: Mapping[str, Any]) -> list[str]:
    """What had changed when the run went on after an interruption."""
    return [f"it went on after update {part['update']} where {what}"
            for part in before.get("resumed", ()) for what in part["differs"]]  # fmt: skip


def _config(path: Path, saved: dict[str, Any]) -> RunConfig:
    digest = saved.pop("digest", None)
    try:
        config = RunConfig.from_dict(saved)
    except ConfigError as error:
        raise FeatclError(f"{path / 'config.json'}: not a config of this version: {error}") from None
    if config.digest != digest:
        raise FeatclError(
            f"{path / 'config.json'}: its digest is not that of its content: it was edited, or this version has keys "
            "that it does not know; check out the commit in env.json"
        )
    return config


def _same_threads(before: Mapping[str, Any]) -> None:
    """How many there are decides the order of sums."""
    import torch

    if isinstance(before.get("threads"), int):
        torch.set_num_threads(before["threads"])


def compare(
    name: str, was: Mapping[str, Any], now: Mapping[str, Any], *, exact: bool
) -> Iterator[tuple[Difference, float]]:
    """Every value of two files with how far it is off, on the scale of the tolerance; infinite for what is no number.

    Where bits may differ, single items of R are not compared: one token can turn one of them, and its column has it.
    """
    skip = NOT_NUMBERS if exact else (*NOT_NUMBERS, *ROUNDED, "items")
    old, new = _leaves(was, skip), _leaves(now, skip)
    for key in {**old, **new}:
        a, b = old.get(key, "nothing"), new.get(key, "nothing")
        yield Difference(f"{name} {key}", a, b), _distance(a, b)


def _distance(was: Any, now: Any) -> float:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (was, now))
    if was == now:
        return 0.0
    return abs(now - was) / max(1.0, abs(was)) if numbers else math.inf


def _leaves(value: Any, skip: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, without the parts to skip at the top."""
    if isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items() if prefix or key not in skip]
    elif isinstance(value, list):
        parts = [(str(place), part) for place, part in enumerate(value)]
    else:
        return {prefix: value}
    return {
        key: leaf for name, part in parts for key, leaf in _leaves(part, skip, f"{prefix}.{name}".lstrip(".")).items()
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FeatclError(f"{file.parent} is not a finished run's folder: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise FeatclError(f"{file}: damaged ({error})") from None


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
