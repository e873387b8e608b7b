"""Features that a person names: `ids`, and `hand`, a reviewed list with a reason for each.

sae: lab/olmo2/resid_post_3        # optional; then it must be the SAE that the features are taken from
features:
  - {id: 12, reason: fires on replies in a formal register, name: formal}
  - {id: 77, reason: fires on greetings}
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from featcl.errors import FeatclError
from featcl.features.selectors.base import Ranking, check_ids

KEYS = ("id", "reason", "name")


def ids(sae: Any, model: Any, tokenizer: Any, *, feature_ids: Sequence[int]) -> Ranking:
    """The given features, in the given order."""
    return Ranking(check_ids(sae, [int(feature) for feature in feature_ids]), fixed=True)


def hand(sae: Any, model: Any, tokenizer: Any, *, reviewed: str | Path | Sequence[Mapping[str, Any]]) -> Ranking:
    """The features of a reviewed list, in its order.

    Args:
        sae: The SAE.
        model: Not used.
        tokenizer: Not used.
        reviewed: A YAML file of the form above, or its entries.

    Raises:
        FeatclError: If the file is malformed, is of another SAE, or an entry lacks its reason.
    """
    where = str(reviewed) if isinstance(reviewed, (str, Path)) else "reviewed"
    entries = read_reviewed(reviewed, sae) if isinstance(reviewed, (str, Path)) else list(reviewed)
    if not entries:
        raise FeatclError(f"{where}: the list names no feature")
    for position, entry in enumerate(entries, start=1):
        _check(entry, f"{where}: entry {position}")
    order = check_ids(sae, [entry["id"] for entry in entries])
    return Ranking(
        order,
        names={entry["id"]: entry["name"] for entry in entries if entry.get("name")},
        reasons={entry["id"]: " ".join(entry["reason"].split()) for entry in entries},
        fixed=True,
    )


def read_reviewed(path: str | Path, sae: Any) -> list[Any]:
    """The entries of a reviewed list; a FeatclError if it is malformed or of another SAE."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FeatclError(f"{path}: cannot read this list of features: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping) or not isinstance(content.get("features"), list):
        raise FeatclError(f"{path}: expected `features:` with a list of {{id, reason}} entries")
    source = sae.cfg.metadata["source"]
    if content.get("sae") not in (None, source):
        raise FeatclError(f"{path}: the list is of {content['sae']}, not of {source}: ids mean nothing in another SAE")
    if unknown := [key for key in content if key not in ("sae", "features")]:
        raise FeatclError(f"{path}: unknown key {unknown[0]!r}; keys here: sae, features")
    return content["features"]


def _check(entry: Any, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise FeatclError(f"{where}: expected {{id: 12, reason: …}}, not {entry!r}")
    if unknown := [str(key) for key in entry if key not in KEYS]:
        close = difflib.get_close_matches(unknown[0], KEYS, n=1)
        raise FeatclError(
            f"{where}: unknown key {unknown[0]!r}; "
            + (f"did you mean {close[0]!r}?" if close else f"keys here: {', '.join(KEYS)}")
        )
    if "id" not in entry:
        raise FeatclError(f"{where}: lacks its id")
    if not isinstance(entry.get("reason"), str) or not entry["reason"].strip():
        raise FeatclError(f"{where}: feature {entry['id']} lacks its reason: say why it was chosen")
