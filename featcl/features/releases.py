"""SAEs of releases and repositories on the Hugging Face hub, at one revision, and without network from the cache."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any

from torch import Tensor

from featcl.errors import FeatclError
from featcl.features import hub, layouts, saelens, weights
from featcl.features.folders import check_folder
from featcl.features.saelens import CONFIG_FILE, SAE, WEIGHTS_FILE
from featcl.features.tensors import one_line

FORMS = {
    "sae_lens": WEIGHTS_FILE,
    "gemma_2": "params.npz",
    "gemma_3": "params.safetensors",
    "dictionary_learning_1": "ae.pt",
}
"""SAELens' names of the forms that are read here, and the file that holds the weights."""


def load_release(release: str, sae_id: str, *, device: str, revision: str | None = None, offline: bool = False) -> SAE:
    """An SAE of a release that SAELens lists, or of any repository in one of its forms.

    Gemma Scope 1 and 2, SAELens' own form and dictionary_learning's are read by a converter of ours, which takes a
    revision, shapes from the file itself and, without network, the cache; the others by SAELens. (SAELens asks the hub
    for the shapes of Gemma Scope 2 over HTTP, so that a warm cache does not help it.)

    Args:
        release: As SAELens lists it, or `owner/name`.
        sae_id: The id in the release, or the folder in the repository.
        device: Where to put it.
        revision: Branch, tag or commit.
        offline: Do not try the network.

    Raises:
        FeatclError: If there is no such release or id, or a file is missing or malformed.
    """
    entries = saelens.directory()
    _check_names(entries, release, sae_id)
    known = [entries[release]] if release in entries else [e for e in entries.values() if e.repo_id == release]
    form = (known[0].conversion_func if known else None) or "sae_lens"
    converter = Converter(form, revision, offline) if form in FORMS else None
    if converter is None and revision is not None:
        raise FeatclError(f"SAE release {release} is read by SAELens' own {form} loader, which takes no revision")
    try:
        sae = saelens.from_release(release, sae_id, device, converter)
    except FeatclError:
        raise
    except Exception as error:  # the hub, the registry and every loader raise types of their own
        raise FeatclError(f"SAE release {release}, id {sae_id}: {type(error).__name__}: {one_line(error)}") from error
    sae.cfg.metadata["revision"] = converter.commit if converter else None
    return sae


class Converter:
    """What SAELens' `from_pretrained(converter=…)` calls for configuration and weights.

    Attributes:
        commit: Of the weights, once they were read.
    """

    def __init__(self, form: str, revision: str | None, offline: bool) -> None:
        self.form, self.revision, self.offline = form, revision, offline
        self.commit: str | None = None

    def __call__(
        self, repo_id: str, folder_name: str, device: str, force_download: bool, cfg_overrides: dict[str, Any] | None
    ) -> tuple[dict[str, Any], dict[str, Tensor], None]:
        """Configuration, weights, and no sparsity."""
        del force_download
        if why := layouts.refusal(f"{repo_id}/{folder_name}"):
            raise FeatclError(f"{repo_id}/{folder_name}: {why}")

        def get(name: str) -> Path:
            file = f"{folder_name}/{name}".removeprefix("./")
            return hub.fetch(repo_id, file, revision=self.revision, offline=self.offline)

        overrides = dict(cfg_overrides or {})
        path = get(FORMS[self.form])
        self.commit = hub.commit_of(path)
        if self.form == "sae_lens":
            folder = get(CONFIG_FILE).parent
            check_folder(folder)
            return (*saelens.folder_parts(folder, device, overrides), None)
        if self.form != "gemma_2":
            with contextlib.suppress(FeatclError):  # Gemma Scope 2 has it in most folders, dictionary_learning in all
                get("config.json")
        parts = weights.read_parts(path)
        metadata = layouts.metadata_of(f"{repo_id}/{folder_name}", weights.sibling_config(path))
        return saelens.config_of(parts, metadata, overrides), parts.weights, None


def _check_names(entries: dict[str, Any], release: str, sae_id: str) -> None:
    if release not in entries and release.count("/") != 1:
        near = difflib.get_close_matches(release, entries, n=3) or ["gemma-scope-2b-pt-res-canonical"]
        raise FeatclError(
            f"SAE release {release} is not in SAELens' list (owner/name of a repository works too); "
            f"nearest: {', '.join(near)}"
        )
    if release in entries and sae_id not in (ids := entries[release].saes_map):
        near = difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or list(ids)[:3]
        raise FeatclError(f"SAE release {release} has no id {sae_id}; nearest: {', '.join(near)}")
