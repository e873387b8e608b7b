"""Bundles: named sets of selectors for an application, which resolve to directions per model.

A bundle is a YAML file. The first entry of `models` that fits the model is taken; its sub-bundles are lists of
selectors, each with its k and what it needs:

    about: a home assistant
    models:
      - for: [lab/*]                       # patterns of the model's name, or of its type
        emotions:
          - {selector: contrast, k: 8, texts: lab.yaml#emotions}      # positive and negative of another file beside it
      - for: [gemma2, gemma3_text]
        emotions:
          - {selector: explanations, k: 8, query: sadness | joy}
          - {selector: contrast, k: 8, positive: [I am sad.], negative: [The lamp is on.]}

No bundle names feature ids: they mean nothing in another SAE. Texts are strings, or conversations: mappings of role
to content, in order.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from featcl import models
from featcl.errors import FeatclError
from featcl.features.chosen import directions_of, independent_features, sae_source
from featcl.features.directions import Directions
from featcl.features.provenance import Digests
from featcl.features.select import select_features
from featcl.features.tokens import Text
from featcl.streams import Chat

FOLDER = Path(__file__).parent / "bundles"
TEXTS_FILE = "lab.yaml"
KEYS = ("selector", "k", "query", "texts", "positive", "negative", "stream", "background")


@dataclass(frozen=True)
class Bundle:
    """A named set of selectors.

    Attributes:
        name: Of the bundle, with `/sub-bundle` where only that one is wanted.
        about: What it is for, in a line.
        models: Patterns -> sub-bundle -> its selectors, in the order in which they are tried.
    """

    name: str
    about: str
    models: tuple[tuple[tuple[str, ...], Mapping[str, Sequence[Mapping[str, Any]]]], ...]

    @classmethod
    def load(cls, name: str | Path) -> Bundle:
        """A shipped bundle (`home-assistant`), one of its sub-bundles (`home-assistant/emotions`), or a YAML file.

        Raises:
            FeatclError: If there is no such bundle, or the file is malformed.
        """
        text = str(name)
        if text.endswith((".yaml", ".yml")):
            return _read(Path(text), Path(text).stem)
        main, _, part = text.partition("/")
        if main not in bundle_names():
            raise FeatclError(f"bundle {main!r} does not exist{_nearest(main, bundle_names())}: "
                              f"there is {', '.join(bundle_names())}, or give a .yaml file")  # fmt: skip
        bundle = _read(FOLDER / f"{main}.yaml", main)
        return bundle.only(part) if part else bundle

    def only(self, sub_bundle: str) -> Bundle:
        """The bundle with one of its sub-bundles."""
        known = list(dict.fromkeys(name for _, parts in self.models for name in parts))
        if sub_bundle not in known:
            raise FeatclError(f"bundle {self.name} has no sub-bundle {sub_bundle!r}{_nearest(sub_bundle, known)}: "
                              f"it has {', '.join(known)}")  # fmt: skip
        kept = tuple(
            (patterns, {sub_bundle: parts[sub_bundle]}) for patterns, parts in self.models if sub_bundle in parts
        )
        return Bundle(f"{self.name}/{sub_bundle}", self.about, kept)

    def selectors(self, model: Any) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Sub-bundle -> its selectors for this model.

        Raises:
            FeatclError: If the bundle has none for it.
        """
        names = model_names(model)
        for patterns, parts in self.models:
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns):
                return parts
        known = ", ".join(pattern for patterns, _ in self.models for pattern in patterns)
        raise FeatclError(f"bundle {self.name} has no selectors for {' or '.join(names)}: it is for {known}")

    def resolve(
        self,
        sae: Any,
        model: Any,
        tokenizer: Any,
        *,
        explanations: str | Path | None = None,
        held_out: Collection[Text] | Digests | None = None,
        skip: Collection[str] = (),
        model_digest: str | None = None,
        seed: int = 0,
    ) -> dict[str, Directions]:
        """Sub-bundle -> its directions on this model: what its selectors choose, in their order, each feature once.

        Args:
            sae: The SAE.
            model: The causal LM it belongs to.
            tokenizer: Its tokenizer.
            explanations: File or folder of exported explanations; None is the local cache.
            held_out: As for `select_features`.
            skip: Selectors to leave out, such as `explanations` where there are none.
            model_digest: Where it is known already.
            seed: Recorded.

        Raises:
            FeatclError: If a selector cannot choose, or nothing is left of a sub-bundle.
        """
        digest = model_digest or models.model_digest(model)
        chat = Chat(tokenizer)
        common = {"explanations": explanations, "held_out": held_out, "model_digest": digest, "seed": seed}
        found = {}
        for name, entries in self.selectors(model).items():
            kept = [entry for entry in entries if entry["selector"] not in skip]
            if not kept:
                raise FeatclError(f"bundle {self.name}: all selectors of {name} are skipped")
            parts = [select_features(sae, model, tokenizer, **_arguments(entry, chat), **common) for entry in kept]
            found[name] = self._joined(f"{self._root}/{name}", parts, sae, model)
        return found

    def merged(self, sae: Any, model: Any, tokenizer: Any, **options: Any) -> Directions:
        """All sub-bundles as one set of directions, each feature once; options as for `resolve`."""
        parts = self.resolve(sae, model, tokenizer, **options)
        return self._joined(self.name, list(parts.values()), sae, model)

    @property
    def _root(self) -> str:
        return self.name.partition("/")[0]

    def _joined(self, name: str, parts: Sequence[Directions], sae: Any, model: Any) -> Directions:
        order = list(dict.fromkeys(feature for part in parts for feature in part.feature_ids))
        chosen, passed_over = independent_features(sae, torch.tensor(order), len(order), model=model)
        known = {f: label for part in reversed(parts) for f, label in zip(part.feature_ids, part.labels, strict=True)}
        names = [known[feature] for feature in chosen] if any(part.names for part in parts) else None
        same = {key: parts[0].manifest[key] for key in ("hook", "model")}
        manifest = {
            **sae_source(sae), **same, "bundle": name, "passed_over": passed_over,
            "parts": [{"selector": part.selector, "feature_ids": part.feature_ids, **part.manifest} for part in parts],
        }  # fmt: skip
        return directions_of(sae, model, chosen, selector=f"bundle({name})", manifest=manifest, names=names)


def bundle_names() -> list[str]:
    """The shipped bundles."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.name != TEXTS_FILE)


def model_names(model: Any) -> tuple[str, str]:
    """What patterns are compared with: the model's name (`lab/olmo2`, a hub id or a folder), and its type (`olmo2`)."""
    config = models.inner_model(model).config
    name = str(config.name_or_path)
    if models.LAB_ASSETS in Path(name).parents:
        name = f"lab/{Path(name).relative_to(models.LAB_ASSETS).as_posix()}"
    return name, str(config.model_type)


def _arguments(entry: Mapping[str, Any], chat: Chat) -> dict[str, Any]:
    """The arguments of `select_features`, conversations as token ids."""
    return {key: [_text(text, chat) for text in value] if isinstance(value, list) and key != "selector" else value
            for key, value in entry.items()}  # fmt: skip


def _text(text: Any, chat: Chat) -> Text:
    if isinstance(text, str):
        return text
    return chat.encode([{"role": role, "content": content} for role, content in text.items()], mask="none").input_ids


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path, name: str) -> Bundle:
    content = _yaml(path)
    if (
        not isinstance(content, Mapping)
        or set(content) - {"about", "models"}
        or not isinstance(content.get("models"), list)
    ):
        raise FeatclError(f"{path}: a bundle has the keys about and models, and models is a list")
    sections = []
    for position, section in enumerate(content["models"], start=1):
        where = f"{path}: models, entry {position}"
        if not isinstance(section, Mapping) or not isinstance(section.get("for"), list) or len(section) < 2:
            raise FeatclError(f"{where}: expected `for:` with a list of patterns, and sub-bundles")
        parts = {
            part: _entries(entries, f"{where}: {part}", path) for part, entries in section.items() if part != "for"
        }
        sections.append((tuple(map(str, section["for"])), parts))
    return Bundle(name, str(content.get("about", "")), tuple(sections))


def _entries(entries: Any, where: str, path: Path) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(entries, list) or not entries:
        raise FeatclError(f"{where}: expected a list of selectors")
    return tuple(
        _entry(entry, f"{where}, selector {position}", path) for position, entry in enumerate(entries, start=1)
    )


def _entry(entry: Any, where: str, path: Path) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping) or "selector" not in entry:
        raise FeatclError(f"{where}: expected a mapping with `selector`")
    if unknown := [str(key) for key in entry if key not in KEYS]:
        raise FeatclError(
            f"{where}: unknown key {unknown[0]!r}{_nearest(unknown[0], KEYS)}; keys here: {', '.join(KEYS)}"
        )
    if not isinstance(entry.get("k"), int):
        raise FeatclError(f"{where}: lacks its k")
    rest = {key: value for key, value in entry.items() if key != "texts"}
    return {**rest, **_texts_of(entry["texts"], where, path)} if "texts" in entry else rest


def _texts_of(reference: Any, where: str, path: Path) -> dict[str, Any]:
    """`file.yaml#key`: the positive and negative texts under that key of a file beside the bundle."""
    file, _, key = str(reference).partition("#")
    content = _yaml(path.parent / Path(file).name)
    texts = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(texts, Mapping) or set(texts) != {"positive", "negative"}:
        raise FeatclError(f"{where}: texts {reference!r} names no positive and negative texts")
    return dict(texts)


@cache
def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FeatclError(f"{path}: cannot read this bundle: {' '.join(str(error).split())}") from None


def _nearest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
