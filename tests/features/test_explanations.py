"""Neuronpedia's exported explanations: read from files, searched, fetched only when asked."""

from __future__ import annotations

import gzip
import json
import socket

import pytest

from featcl.errors import FeatclError
from featcl.features import fetch_explanations, select_features
from featcl.features.explanations import BUCKET, explanation_files, read_explanations, relevance

SOURCE = "gemma-2-2b/20-gemmascope-res-16k"
DESCRIPTIONS = {
    7: "formal greetings and polite expressions",
    3: "mentions of sadness or grief",
    11: "the word 'the' in formal legal documents, contracts, statutes and other long official texts of the state",
    20: "closing brackets in code",
}


def lines(source: str = SOURCE, descriptions=DESCRIPTIONS) -> str:
    model, layer = source.split("/")
    return "".join(
        json.dumps({"modelId": model, "layer": layer, "index": str(i), "description": text, "typeName": "np_max-act"})
        + "\n"
        for i, text in descriptions.items()
    )


@pytest.fixture
def known(sae, tiny):
    """An SAE that Neuronpedia knows, with its model and tokenizer."""
    metadata = {
        "hook_name": "blocks.1.hook_resid_post",
        "source": "test",
        "prepend_bos": True,
        "neuronpedia_id": SOURCE,
    }
    return sae(metadata=metadata), *tiny()


def test_features_are_found_by_query(known, tmp_path):
    path = tmp_path / "batch-0.jsonl.gz"
    path.write_bytes(gzip.compress((lines() + lines("gemma-2-2b/21-x", {5: "formal formal formal"})).encode()))
    found = select_features(*known, selector="explanations", query="formal greeting", k=2, explanations=path)
    assert found.feature_ids == (7, 11), "two words of a short text before one of a long one; 5 is of another SAE"
    assert found.names == (DESCRIPTIONS[7], DESCRIPTIONS[11])
    assert found.manifest["query"] == "formal greeting"
    either = select_features(*known, selector="explanations", query="grief | brackets", k=2, explanations=tmp_path)
    assert set(either.feature_ids) == {3, 20}
    with pytest.raises(FeatclError, match="finds 1 features, not the k = 3"):
        select_features(*known, selector="explanations", query="grief", k=3, explanations=path)
    with pytest.raises(FeatclError, match=r"no explanation .* has a word of the query 'volcano'"):
        select_features(*known, selector="explanations", query="volcano", k=1, explanations=path)
    assert known[0].cfg.metadata["neuronpedia_id"] == SOURCE
    assert found.manifest["neuronpedia_id"] == SOURCE


def test_relevance_is_bm25():
    """Two documents of two words, query "a": f = 1, length = mean, so the score is idf = log(1 + 1.5 / 1.5)."""
    scores = relevance("a", ["a b", "c d"])
    assert scores[0] == pytest.approx(0.6931472)
    assert scores[1] == 0
    assert relevance("Greetings", ["a greeting"])[0] > 0
    assert relevance("x | a", ["a b", "c d"]) == scores
    with pytest.raises(FeatclError, match="no word"):
        relevance(" | ", ["a"])


def test_the_cache_is_used_and_nothing_is_fetched_in_a_run(known, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATCL_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "socket", lambda *a, **k: pytest.fail("the network was touched"))
    with pytest.raises(FeatclError, match=rf"fetch_explanations\('{SOURCE}'\) downloads them once"):
        select_features(*known, selector="explanations", query="grief", k=1)
    folder = tmp_path / "neuronpedia" / SOURCE
    folder.mkdir(parents=True)
    (folder / "batch-0.jsonl").write_text(lines())
    assert select_features(*known, selector="explanations", query="grief", k=1).feature_ids == (3,)
    known[0].cfg.metadata["neuronpedia_id"] = None
    with pytest.raises(FeatclError, match="has no Neuronpedia id"):
        select_features(*known, selector="explanations", query="grief", k=1)


def test_fetching_follows_the_pages_of_the_listing(tmp_path):
    prefix = f"v1/{SOURCE}/explanations"
    listing = f"{BUCKET}/?list-type=2&prefix={prefix}/"
    answers = {
        listing: f"<Key>{prefix}/batch-0.jsonl.gz</Key><NextContinuationToken>a/b=</NextContinuationToken>".encode(),
        f"{listing}&continuation-token=a%2Fb%3D": (
            f"<Key>{prefix}/batch-1.jsonl.gz</Key><Key>../../x.jsonl.gz</Key>".encode()
        ),
        f"{BUCKET}/{prefix}/batch-0.jsonl.gz": gzip.compress(lines().encode()),
        f"{BUCKET}/{prefix}/batch-1.jsonl.gz": gzip.compress(lines(SOURCE, {30: "more"}).encode()),
    }
    asked = []

    def get(url: str) -> bytes:
        asked.append(url)
        return answers[url]

    answers[f"{BUCKET}/../../x.jsonl.gz"] = b"never asked for"
    folder = fetch_explanations(SOURCE, cache=tmp_path, get=get)
    assert folder == tmp_path / SOURCE
    assert f"{BUCKET}/../../x.jsonl.gz" not in asked
    assert len(read_explanations(explanation_files(tmp_path, SOURCE), SOURCE)) == 5
    before = len(asked)
    fetch_explanations(SOURCE, cache=tmp_path, get=get)
    assert len(asked) == before + 2, "only the listing is read again"
    with pytest.raises(FeatclError, match="exports no explanations"):
        fetch_explanations(SOURCE, cache=tmp_path, get=lambda url: b"")
    for wrong in ("gemma-2-2b", "../x/y", "a/../b", "a/.."):
        with pytest.raises(FeatclError, match="is no Neuronpedia id"):
            fetch_explanations(wrong, cache=tmp_path, get=get)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1: not JSON"),
        ("[1]", "modelId is missing"),
        ('{"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "1"}', "description is missing"),
        (lines(SOURCE, {48: "x"}), r"line 1: feature 48, but the SAE has features 0 to 47"),
        (lines().replace('"7"', '"-7"'), "line 1: index should be"),
        (lines("other/one"), "no explanation of gemma-2-2b.*it has other/one"),
        ("", "no explanation of"),
    ],
)
def test_faults_name_file_and_line(known, tmp_path, text, says):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(FeatclError, match=says) as caught:
        select_features(*known, selector="explanations", query="grief", k=1, explanations=tmp_path / "x.jsonl")
    assert "\n" not in str(caught.value)
    assert "x.jsonl" in str(caught.value)


def test_files_that_are_not_there_or_not_gzip(known, tmp_path):
    with pytest.raises(FeatclError, match="no explanations"):
        select_features(*known, selector="explanations", query="a", k=1, explanations=tmp_path / "nowhere")
    (tmp_path / "x.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(FeatclError, match="cannot read these explanations"):
        select_features(*known, selector="explanations", query="a", k=1, explanations=tmp_path)
