"""A grid in a config: one file, many arms.

    grid: {learner.lr: [1.0e-3, 3.0e-3], adapter.kind: [write, both], seed: [0, 1, 2]}

Every combination of values is an arm, named by the file and its values (`constrained.lr-0.001.kind-write`); seeds are
no part of the name, since an arm has many. A grid is inherited and merged like every other key: an arm may replace the
values of an axis, and a null takes an axis, or the whole grid, away. An override from the command line holds for all
arms, and stands in the place of an axis that sweeps the same key.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl.config import ConfigError, RunConfig, _apply_override, _merge, _read_layers, _set
from featcl.files import digest_json

GRID, SEED = "grid", "seed"
FIXED = ("arm", "base", "study", "output", GRID)  # say where a result lies, not what it is
Layers = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Point:
    """One arm of a file.

    Attributes:
        config: Resolved; its `arm` is the arm's name.
        family: The name without the values: what the arms of one file have in common.
        seeds: That the grid asks for; the config's own where it names none.
        values: Key -> value of the grid's axes but the seed.
    """

    config: RunConfig
    family: str
    seeds: tuple[int, ...]
    values: Mapping[str, Any]


def expand(path: str | Path, overrides: Iterable[str] = ()) -> tuple[Point, ...]:
    """Every arm of a config file; one, where it has no grid.

    Args:
        path: The file.
        overrides: `key=value`, over what file and bases say.

    Raises:
        ConfigError: As `RunConfig.load`; or for a grid that is empty, over an unknown key, or over a key that the file
            sets itself.
    """
    path = Path(path)
    layers = list(_read_layers(path, seen=()))
    axes = _axes(layers)
    _refuse_hidden(layers, axes)
    plain = [(where, {key: value for key, value in layer.items() if key != GRID}) for where, layer in layers]
    merged: dict[str, Any] = {}
    for _, layer in plain:
        merged = _merge(merged, layer)
    for override in overrides:
        merged = _overridden(merged, override, axes)
        plain.append(("command line", _apply_override({}, override)))
    seeds = axes.pop(SEED, None)
    family = str(layers[-1][1].get("arm") or path.stem)
    points = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        arm = ".".join([family, *_labels(chosen)])
        config = _resolved(path, {**merged, "arm": arm}, plain, chosen)
        points.append(Point(config, family, _seeds(path, config, seeds), chosen))
    _refuse_without_effect(path, points)
    return tuple(points)


def _overridden(merged: dict[str, Any], override: str, axes: dict[str, list[Any]]) -> dict[str, Any]:
    """The config with one override, which takes the axis of its key away."""
    key = override.partition("=")[0].strip()
    if key.split(".")[0] in (*FIXED, SEED):
        raise ConfigError(f"command line: {key} is not for all arms alike; there are --output, --seeds and --arms")
    axes.pop(key, None)
    for axis in axes:
        if f"{axis}.".startswith(f"{key}.") or key.startswith(f"{axis}."):
            raise ConfigError(f"command line: {key}: a grid sweeps {axis}; give {axis}=… in its place")
    return _apply_override(merged, override)


def _axes(layers: Layers) -> dict[str, list[Any]]:
    """Key -> its values, of all layers."""
    merged: dict[str, Any] = {}
    for where, layer in layers:
        if GRID not in layer:
            continue
        grid = layer[GRID]
        if grid is None:
            merged = {}
            continue
        if not isinstance(grid, Mapping) or not grid:
            what = "an empty grid" if grid == {} else f"{grid!r}"
            raise ConfigError(f"{where}: grid: expected keys with lists of values, got {what}")
        for key, values in grid.items():
            _check_axis(where, key, values)
        merged = {key: values for key, values in {**merged, **grid}.items() if values is not None}
    return merged


def _check_axis(where: str, key: Any, values: Any) -> None:
    if not isinstance(key, str) or key.split(".")[0] in FIXED:
        raise ConfigError(f"{where}: grid: {key} says where results lie; values go into an arm's name anyway")
    if values is not None and (not isinstance(values, Sequence) or isinstance(values, str) or not values):
        what = "an empty list" if values == [] else repr(values)
        raise ConfigError(f"{where}: grid: {key}: expected a list of values, got {what}")
    known = list(values or ())
    for place, value in enumerate(known):
        if any(_same(value, other) for other in known[:place]):
            raise ConfigError(f"{where}: grid: {key}: {value!r} is there twice")


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _refuse_hidden(layers: Layers, axes: Mapping[str, Any]) -> None:
    """A file that sets a key which an inherited grid sweeps would be overruled without a word."""
    for key in axes:
        last = max(place for place, (_, layer) in enumerate(layers) if key in (layer.get(GRID) or ()))
        for where, layer in layers[last + 1 :]:
            if _has(layer, key.split(".")):
                raise ConfigError(
                    f"{where}: {key} is set here, and swept by the grid of {layers[last][0]}; "
                    f"take the axis away with grid: {{{key}: null}}, or give it other values"
                )


def _has(layer: Any, path: Sequence[str]) -> bool:
    for part in path:
        if not isinstance(layer, Mapping) or part not in layer:
            return False
        layer = layer[part]
    return True


def _resolved(path: Path, merged: dict[str, Any], layers: Layers, chosen: Mapping[str, Any]) -> RunConfig:
    """The config of one point, with errors that name the grid's key."""
    where, at = f"{path}: grid", {}
    for key, value in chosen.items():
        parts = key.split(".")
        try:
            merged = _set(merged, parts, value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {key}: {str(error).removeprefix('command line: ')}") from None
        at = _set(at, parts, value)
    return RunConfig.from_dict(merged, layers=[*layers, (where, at)])


def _seeds(path: Path, config: RunConfig, seeds: list[Any] | None) -> tuple[int, ...]:
    for seed in seeds or ():
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"{path}: grid: seed: expected whole numbers from 0, got {seed!r}")
    return tuple(seeds) if seeds else (config.seed,)


def _refuse_without_effect(path: Path, points: Sequence[Point]) -> None:
    """With phases, `learner` is only what they inherit: sweeping what all of them set gives the same run again."""
    seen: dict[str, Point] = {}
    for point in points:
        content = point.config.to_dict()
        if point.config.phases:
            content.pop("learner")
        digest = digest_json({key: value for key, value in content.items() if key not in FIXED})
        if digest in seen:
            names = f"{seen[digest].config.arm} and {point.config.arm}"
            raise ConfigError(f"{path}: grid: {names} are one and the same run; every phase sets what the grid sweeps")
        seen[digest] = point


def _labels(chosen: Mapping[str, Any]) -> Iterator[str]:
    """`lr-0.001` for `learner.lr: 1.0e-3`; the whole key where two end alike."""
    short = [key.split(".")[-1] for key in chosen]
    for name, (key, value) in zip(short, chosen.items(), strict=True):
        yield f"{name if short.count(name) == 1 else key}-{_label(value)}"


def _label(value: Any) -> str:
    """A value as a part of a name; lists of words by the first and the last, other lists and mappings by digest."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(word, str) for word in value):
        return f"{_label(value[0])}-to-{_label(value[-1])}"
    if isinstance(value, (Mapping, list)):
        return digest_json(value)[:8]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(value)).strip("-") or digest_json(value)[:8]
