"""Single files of the Hugging Face hub at a pinned revision, from the cache alone where there is no network."""

from __future__ import annotations

from pathlib import Path

from featcl.errors import FeatclError


def fetch(repo_id: str, filename: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """A file of a repository, downloaded or from the cache.

    Without network (or with HF_HUB_OFFLINE=1) the cached file of that revision is used; of a branch, the commit that it
    pointed to when it was last seen.

    Args:
        repo_id: `owner/name`.
        filename: Path in the repository.
        revision: Branch, tag or commit; None is `main`.
        offline: Do not even try the network.

    Raises:
        FeatclError: If it is neither there nor in the cache.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    first: Exception | None = None
    if not (offline or constants.HF_HUB_OFFLINE):
        try:
            return Path(hf_hub_download(repo_id, filename, revision=revision))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                raise FeatclError(f"{repo_id} has no {filename} at revision {revision or 'main'}") from None
            first = error
        except Exception as error:  # noqa: BLE001 - no network shows as anything, depending on who blocks it
            first = error
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        why = (
            f" and cannot be downloaded ({type(first).__name__}: {' '.join(str(first).split())[:200]})" if first else ""
        )
        raise FeatclError(
            f"{repo_id}/{filename} at revision {revision or 'main'} is not in the cache {constants.HF_HUB_CACHE}"
            f"{why}; fetch it once with network: hf download {repo_id} {filename}"
            + (f" --revision {revision}" if revision else "")
        ) from error


def commit_of(path: Path) -> str | None:
    """The commit that a file in the cache belongs to; None for a file elsewhere."""
    parts = path.parts
    if "snapshots" in parts[:-1]:
        return parts[parts.index("snapshots") + 1]
    return None
