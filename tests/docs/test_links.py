"""Links between pages lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import broken_links, links, pages


def test_every_relative_link_and_anchor_is_there(root: Path) -> None:
    found = pages(root)
    assert sum(len(links(page)) for page in found) > 80
    assert broken_links(found) == []


def test_pages_of_the_site_link_within_it(root: Path) -> None:
    docs = root / "docs"
    for page in docs.rglob("*.md"):
        for link in links(page):
            if not re.match(r"[a-z]+:", link):
                assert (page.parent / link.partition("#")[0]).resolve().is_relative_to(docs), f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("[here](other.md#a-heading)", []),
        ("[here](#its-own-1)\n\n## Its own (1)", []),
        ("`[code](nowhere.md)`, [elsewhere](https://example.org/nowhere)", []),
        ("```\n[a block](nowhere.md)\n```", []),
        ("[planted](nowhere.md)", ["page.md: nowhere.md"]),
        ("![planted](nowhere.png)", ["page.md: nowhere.png"]),
        ("[planted](other.md#another)", ["page.md: other.md#another"]),
        ("[planted](#nowhere)", ["page.md: #nowhere"]),
    ],
)
def test_a_planted_broken_link_is_found(text: str, broken: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading\n")
    page = tmp_path / "page.md"
    page.write_text(f"{text}\n")
    assert broken_links([page]) == broken
