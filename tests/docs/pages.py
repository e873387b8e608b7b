"""What the documentation holds: blocks of code, commands, links, anchors."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r'^(?P<fragment><!-- fragment -->\n)?```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<source>.*?)^```$',
    flags=re.DOTALL | re.MULTILINE,
)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: As the fence says; empty for commands.
        title: The file that it is, where it is one.
        source: What is in it.
        fragment: Whether it is marked as not to be run.
    """

    language: str
    title: str | None
    source: str
    fragment: bool


def pages(root: Path = ROOT) -> list[Path]:
    """Every page that the project maintains."""
    top = [root / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*top, *sorted((root / "docs").rglob("*.md")), *sorted((root / "experiments").rglob("*.md"))]


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or those of one language."""
    found = [
        Block(match["language"], match["title"], match["source"], match["fragment"] is not None)
        for match in _FENCE.finditer(page.read_text(encoding="utf-8"))
    ]
    return [block for block in found if language in (None, block.language)]


def commands(page: Path) -> list[str]:
    """Every line of the shell blocks, continuation lines joined."""
    text = "\n".join(block.source for block in blocks(page, ""))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def links(page: Path) -> list[str]:
    """Where a page points; what stands in code does not count."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))
    return _LINK.findall(text)


def anchors(page: Path) -> set[str]:
    """What a link to a page may name after #: its headings, and the objects of a reference page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found = {_slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}
    for name in re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE):
        found.add(name)
        try:
            found |= {f"{name}.{member}" for member in vars(importlib.import_module(name))}
        except ModuleNotFoundError:  # a class or a function
            continue
    return found


def broken_links(found: list[Path]) -> list[str]:
    """`page: target` of every relative link whose file or anchor is not there."""
    broken = []
    for page in found:
        for link in links(page):
            if re.match(r"[a-z]+:", link):  # elsewhere; nothing is asked of the network
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
                broken.append(f"{page.name}: {link}")
    return broken


def _slug(heading: str) -> str:
    """As mkdocs and GitHub make anchors of headings."""
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
