"""Explanations of features as Neuronpedia exports them, in a local cache; fetched only by calling `fetch_explanations`.

File form: one JSON object a line, `.jsonl` or `.jsonl.gz`, of which these keys are read and others ignored:

    {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "12", "description": "formal greetings"}

`index` is a number or its digits. A feature may have several explanations. The cache holds a folder per SAE,
`<cache>/<modelId>/<layer>/*.jsonl.gz`; a file or folder of one's own does as well.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featcl import files
from featcl.errors import FeatclError

BUCKET = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
PATTERNS = ("*.jsonl", "*.jsonl.gz")
K1, B = 1.2, 0.75  # Robertson's usual settings of BM25


@dataclass(frozen=True)
class Explanation:
    """What somebody, usually a language model, says that a feature means."""

    index: int
    description: str


def cache_folder() -> Path:
    """`$FEATCL_CACHE/neuronpedia`, by default `~/.cache/featcl/neuronpedia`."""
    return Path(os.environ.get("FEATCL_CACHE") or Path.home() / ".cache" / "featcl") / "neuronpedia"


def neuronpedia_id(sae: Any) -> str | None:
    """`<modelId>/<layer>` of an SAE that Neuronpedia knows, as SAELens records it, else None."""
    known = sae.cfg.metadata["neuronpedia_id"]
    return known if isinstance(known, str) and known.count("/") == 1 else None


def explanation_files(where: str | Path | None, source: str | None) -> list[Path]:
    """The files to read: one that is named, those of a folder, or those of the cache.

    Args:
        where: A file, a folder of files, a folder laid out as the cache is, or None for the cache itself.
        source: The SAE's Neuronpedia id, if it has one.

    Raises:
        FeatclError: If there are none, saying how to get them.
    """
    if where is not None and Path(where).is_file():
        return [Path(where)]
    if where is None and source is None:
        raise FeatclError("this SAE has no Neuronpedia id: name a file of explanations (explanations=…)")
    root = cache_folder() if where is None else Path(where)
    folders = [root / source, root] if source else [root]
    for folder in folders if where is not None else folders[:1]:
        if found := sorted(path for pattern in PATTERNS for path in folder.glob(pattern)):
            return found
    fetch = f": featcl.features.fetch_explanations({source!r}) downloads them once" if source else ""
    raise FeatclError(f"no explanations (*.jsonl, *.jsonl.gz) in {folders[0]}{fetch}")


def read_explanations(paths: Iterable[Path], source: str | None, *, d_sae: int | None = None) -> list[Explanation]:
    """The explanations of one SAE.

    Args:
        paths: Files of the form above.
        source: `<modelId>/<layer>`; lines of other SAEs are passed over. None takes every line.
        d_sae: Number of features; a higher index is an error.

    Raises:
        FeatclError: With file and line, for what is not such an object; or if there is none of this SAE.
    """
    found, others = [], set()
    for path in paths:
        for number, line in _lines(path):
            entry = _object(line, f"{path}, line {number}")
            own = f"{entry['modelId']}/{entry['layer']}"
            if source is not None and own != source:
                others.add(own)
                continue
            index = _index(entry["index"], f"{path}, line {number}")
            if d_sae is not None and index >= d_sae:
                raise FeatclError(f"{path}, line {number}: feature {index}, but the SAE has features 0 to {d_sae - 1}")
            found.append(Explanation(index, entry["description"].strip()))
    if not found:
        hint = f"; it has {', '.join(sorted(others)[:3])}" if others else ""
        raise FeatclError(f"no explanation of {source or 'this SAE'} in {', '.join(str(p) for p in paths)}{hint}")
    return found


def relevance(query: str, descriptions: Sequence[str]) -> list[float]:
    """BM25 of every description for the query; words are compared without case and endings; 0 without a common word.

    Σ over words w of idf(w) · f (k₁ + 1) / (f + k₁ (1 − b + b · length / mean length)); of `a|b` the larger counts.

    Source: Robertson & Zaragoza 2009, "The probabilistic relevance framework".
    """
    alternatives = [words for part in query.split("|") if (words := set(_words(part)))]
    if not alternatives:
        raise FeatclError(f"query {query!r} holds no word to search for")
    documents = [Counter(_words(description)) for description in descriptions]
    mean = sum(document.total() for document in documents) / max(1, len(documents))
    present = Counter(word for document in documents for word in document)
    idf = {word: math.log(1 + (len(documents) - n + 0.5) / (n + 0.5)) for word, n in present.items()}

    def score(words: set[str], document: Counter[str]) -> float:
        length = K1 * (1 - B + B * document.total() / mean) if mean else K1
        return sum(idf[word] * document[word] * (K1 + 1) / (document[word] + length) for word in words & set(document))

    return [max(score(words, document) for words in alternatives) for document in documents]


def fetch_explanations(
    source: str, *, cache: str | Path | None = None, get: Callable[[str], bytes] | None = None
) -> Path:
    """Download Neuronpedia's exported explanations of one SAE into the cache. Nothing else uses the network.

    Args:
        source: The SAE's Neuronpedia id, such as `gemma-2-2b/20-gemmascope-res-16k`.
        cache: The cache's folder; None is `cache_folder()`.
        get: What reads a URL; by default urllib with a timeout.

    Returns:
        The folder with the files; a file that is there is not fetched again.

    Raises:
        FeatclError: If the id is malformed, nothing is exported under it, or the network fails.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or ".." in source:
        raise FeatclError(
            f"{source!r} is no Neuronpedia id: it reads modelId/layer, as gemma-2-2b/20-gemmascope-res-16k"
        )
    get = get or _get
    folder = Path(cache or cache_folder()) / source
    for key in _keys(source, get):
        target = folder / key.rsplit("/", 1)[1]
        if not target.is_file():
            files.write_bytes(target, get(f"{BUCKET}/{key}"))
    return folder


def _keys(source: str, get: Callable[[str], bytes]) -> list[str]:
    """The exported files of one SAE, all pages of the listing."""
    prefix, keys, token = f"v1/{source}/explanations/", [], ""
    while True:
        page = get(f"{BUCKET}/?list-type=2&prefix={prefix}{token}").decode("utf-8")
        keys += [
            key
            for key in re.findall(r"<Key>([^<]+)</Key>", page)
            if key.startswith(prefix) and re.fullmatch(r"[\w.-]+\.jsonl(\.gz)?", key.removeprefix(prefix))
        ]
        more = re.search(r"<NextContinuationToken>([^<]+)</NextContinuationToken>", page)
        if more is None:
            break
        from urllib.parse import quote

        token = f"&continuation-token={quote(more[1], safe='')}"
    if not keys:
        raise FeatclError(f"Neuronpedia exports no explanations of {source}")
    return keys


def _get(url: str) -> bytes:
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(url, timeout=60) as answer:
            return answer.read()
    except (URLError, OSError) as error:
        raise FeatclError(f"cannot fetch {url}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FeatclError(f"{path}: cannot read these explanations: {error}") from None


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise FeatclError(f"{where}: not JSON: {error}") from None
    lacking = [
        key for key in ("modelId", "layer", "index", "description") if not isinstance(entry, dict) or key not in entry
    ]
    if lacking:
        raise FeatclError(f"{where}: an explanation has modelId, layer, index and description; {lacking[0]} is missing")
    if not isinstance(entry["description"], str):
        raise FeatclError(f"{where}: description should be text, got {entry['description']!r}")
    return entry


def _index(value: Any, where: str) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d+", str(value)):
        raise FeatclError(f"{where}: index should be a feature's number, got {value!r}")
    return int(value)


def _words(text: str) -> list[str]:
    return [_stem(word) for word in re.findall(r"[^\W_]+", text.lower())]


def _stem(word: str) -> str:
    """The word without a plural or verb ending and a final e, as far as enough letters remain."""
    if word.endswith("ies") and len(word) > 5:
        word = f"{word[:-3]}y"
    elif word.endswith("s") and not word.endswith("ss") and len(word) > 4:
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) >= len(ending) + 4:
            return word[: -len(ending)]
    return word[:-1] if word.endswith("e") and len(word) > 3 else word
