"""Whether what the guides name on the Hugging Face hub can be used from here: from the cache, or by downloading."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["cached", "incomplete", "reachable", "gated", "absent", "offline", "unreachable"]
Kind = Literal["model", "saes"]
GUIDES: dict[str, Kind] = {  # what README and docs point at
    "google/gemma-2-2b-it": "model",
    "google/gemma-2-9b-it": "model",
    "google/gemma-scope-2b-pt-res": "saes",
    "allenai/OLMo-2-0425-1B-Instruct": "model",
    "allenai/OLMo-2-1124-7B-Instruct": "model",
}
LOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]  # what featcl.load_model downloads
WHAT_TO_DO: dict[State, str] = {
    "incomplete": "finish the download with network: hf download {ids}",
    "gated": "accept the licence of {ids} on huggingface.co, then hf auth login",
    "absent": "{ids} is not there, or is hidden from you: check the name, or hf auth login",
    "offline": "to use {ids}, unset HF_HUB_OFFLINE once; or download elsewhere (hf download) and give the folder",
    "unreachable": "no way to {ids} from here: download on another machine (hf download) and give the folder",
}


@dataclass(frozen=True)
class HubEntry:
    """One repository, seen from here.

    Attributes:
        state: `cached`: usable without network. `incomplete`: a part is in the cache, and featcl would not load it.
            `reachable`: it can be downloaded. `gated`: its licence must be accepted first. `absent`: the hub says that
            there is none. `offline`: not asked, since HF_HUB_OFFLINE is set. `unreachable`: the hub gave no answer.
        about: What exactly was found.
    """

    state: State
    about: str

    def to_json(self) -> dict[str, str]:
        """As plain data."""
        return asdict(self)


def look(wanted: Mapping[str, Kind] = GUIDES, *, timeout: float = 3.0) -> dict[str, HubEntry]:
    """Look in the cache, and ask the hub for what is not there, all at once.

    Args:
        wanted: Repository -> what it holds.
        timeout: Seconds after which the hub counts as unreachable.
    """
    from huggingface_hub import constants

    found = {name: in_cache(name, kind) for name, kind in wanted.items()}
    missing = [name for name, entry in found.items() if entry is None or entry.state == "incomplete"]
    if constants.HF_HUB_OFFLINE:
        asked = [HubEntry("offline", "not in the cache, and HF_HUB_OFFLINE is set")] * len(missing)
    else:
        with ThreadPoolExecutor(max_workers=max(1, len(missing))) as pool:
            asked = list(pool.map(lambda name: ask(name, wanted[name], timeout=timeout), missing))
    for name, answer in zip(missing, asked, strict=True):
        found[name] = found[name] or answer
    return {name: entry for name, entry in found.items() if entry is not None}


def advice(found: Mapping[str, HubEntry]) -> list[str]:
    """What to do about what cannot be used as it is; one line for all that are in one state."""
    lines = []
    for state, text in WHAT_TO_DO.items():
        if names := [name for name, entry in found.items() if entry.state == state]:
            lines.append(text.format(ids=" ".join(names) if "hf download {" in text else ", ".join(names)))
    return lines


def in_cache(name: str, kind: Kind) -> HubEntry | None:
    """A repository's newest cached snapshot, or None where nothing of it is cached."""
    from huggingface_hub import constants, snapshot_download

    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        commit = (place / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    folder = place / "snapshots" / commit
    if kind == "saes":
        count = sum(1 for pattern in ("*.npz", "*.safetensors") for _ in folder.rglob(pattern))
        return HubEntry("cached", f"{count} weight files in the cache, commit {commit[:7]}") if count else None
    lacks = next(iter(_lacking(folder)), None)
    if lacks is not None:
        return HubEntry("incomplete", f"in the cache without {lacks}, commit {commit[:7]}")
    try:
        snapshot_download(name, allow_patterns=LOADED, local_files_only=True)
    except (OSError, ValueError):  # it was listed when it was downloaded, and files of the list are not there
        return HubEntry("incomplete", f"in the cache, but not all of commit {commit[:7]}")
    return HubEntry("cached", f"in the cache, commit {commit[:7]}")


def ask(name: str, kind: Kind, *, timeout: float) -> HubEntry:
    """Whether the hub would hand over a file of a repository to this user; nothing is downloaded."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    url = hf_hub_url(name, "config.json" if kind == "model" else "README.md")
    try:
        get_hf_file_metadata(url, token=get_token() or False, timeout=timeout)
    except GatedRepoError:
        return HubEntry("gated", "on the hub, behind a licence that this login has not accepted")
    except RepositoryNotFoundError:
        return HubEntry("absent", "the hub shows no such repository to this login")
    except EntryNotFoundError:
        return HubEntry("absent", f"on the hub, but without {url.rsplit('/', 1)[-1]}")
    except Exception as error:  # noqa: BLE001 - no network shows as anything, depending on who blocks it
        line = " ".join(str(error).split())[:100]
        return HubEntry("unreachable", f"the hub does not answer ({type(error).__name__}: {line})")
    return HubEntry("reachable", "can be downloaded")


def _lacking(folder: Path) -> Iterable[str]:
    """Files without which `featcl.load_model` refuses a snapshot."""
    if not (folder / "config.json").is_file():
        yield "config.json"
    try:
        index: Any = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        weights = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError):
        weights = ["model.safetensors"]
    yield from (name for name in weights if not (folder / name).is_file())
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        yield "tokenizer.json"
