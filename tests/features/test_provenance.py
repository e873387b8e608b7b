"""No selector sees the future: texts compared by digest, in `select_features` and in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from featcl.build import build
from featcl.config import RunConfig
from featcl.errors import FeatclError
from featcl.features import select_features
from featcl.features.provenance import refuse_overlap, text_blocks, text_digests, without_overlap
from featcl.models import model_digest
from featcl.streams import Chat
from tests.features.conftest import make_sae

TEXTS = [f"text number {i} about lamps and doors" for i in range(6)]


def test_a_text_and_its_ids_are_the_same_text(tiny):
    _, tokenizer = tiny()
    ids = tokenizer(TEXTS[0]).input_ids
    with_bos = [tokenizer.bos_token_id, *ids]
    assert text_digests([TEXTS[0]], tokenizer) == text_digests([ids], tokenizer) == text_digests([with_bos], tokenizer)
    assert text_digests(["a  b\nc "], tokenizer) == text_digests(["a b c"], tokenizer)
    assert text_digests([TEXTS[0]], tokenizer).isdisjoint(text_digests([TEXTS[1]], tokenizer))
    assert len(text_digests(TEXTS, tokenizer)) == 6


def test_a_document_counts_by_its_parts(tiny):
    """A file of which the last blocks are scored, given whole; or a line that is a message of the stream."""
    _, tokenizer = tiny()
    document = "\n".join(f"line {i} of a long document about nothing" for i in range(100))
    scored = text_digests(text_blocks(document)[-1:], tokenizer)
    with pytest.raises(FeatclError, match=r"1 of the 1 texts in positive .*'line 0 of a long"):
        refuse_overlap({"positive": [document]}, scored, tokenizer)
    refuse_overlap({"positive": [document]}, scored, tokenizer, parts=False)  # the control
    with pytest.raises(FeatclError, match="negative"):
        refuse_overlap({"negative": [document]}, ["line 7 of a long document about nothing"], tokenizer)
    refuse_overlap({"negative": [document]}, ["line 7 of a long document about something"], tokenizer)
    refuse_overlap({"negative": ["yes\nno\nwell then"]}, ["yes", "well then"], tokenizer)  # too short to mean anything
    assert "\n".join(text_blocks(document)) == document


def test_without_overlap_keeps_the_rest_in_order(tiny):
    _, tokenizer = tiny()
    seen = text_digests(TEXTS[1:3], tokenizer)
    assert without_overlap(TEXTS, seen, tokenizer) == [TEXTS[0], *TEXTS[3:]]


@pytest.mark.parametrize("name", ["positive", "negative", "stream", "background"])
def test_a_selector_that_would_see_the_future_is_refused(sae, tiny, name):
    arguments = {"positive": TEXTS[:2], "negative": TEXTS[2:4], "stream": TEXTS[:2], "background": TEXTS[2:4]}
    arguments[name] = [TEXTS[0], "to come: text number 99"]
    model, tokenizer = tiny()
    source = sae("standard")
    with pytest.raises(FeatclError, match=rf"1 of the 2 texts in {name} belong to the stream still to come") as caught:
        select_features(
            source, model, tokenizer, selector="contrast", k=2, held_out=["to come: text number 99"], **arguments
        )
    assert "\n" not in str(caught.value)
    found = select_features(source, model, tokenizer, selector="contrast", k=2, held_out=TEXTS[4:], **arguments)
    same = select_features(source, model, tokenizer, selector="contrast", k=2, **arguments)
    assert found.digest == same.digest, "checking changes nothing"


def test_the_manifest_says_where_directions_come_from(sae, tiny):
    model, tokenizer = tiny()
    arguments = {"positive": TEXTS[:3], "negative": TEXTS[3:], "selector": "contrast", "k": 2}
    manifest = select_features(sae("standard"), model, tokenizer, **arguments).manifest
    assert manifest["sae"] == "test"
    assert manifest["hook"] == "blocks.1.hook_resid_post = model.layers.1.output"
    assert manifest["model"] == model_digest(model)
    assert manifest["selector"] == "contrast"
    assert set(manifest["data"]) == {"positive", "negative"}
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    arguments["positive"] = TEXTS[:2]
    changed = select_features(sae("standard"), model, tokenizer, **arguments).manifest
    assert changed["model"] != manifest["model"]
    assert changed["data"]["positive"] != manifest["data"]["positive"]
    assert changed["data"]["negative"] == manifest["data"]["negative"]
    json.dumps(manifest)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_config(tiny_folder, tmp_path: Path) -> Callable[..., RunConfig]:
    """`run_config("features.k=4")`: a run on a file of 20 trajectories and a background file."""
    model = tiny_folder("olmo2")
    make_sae().save_model(tmp_path / "sae")
    with open(tmp_path / "stream.jsonl", "w", encoding="utf-8") as file:
        for i in range(20):
            messages = [
                {"role": "user", "content": f"what is the number of door {i}?"},
                {"role": "assistant", "content": f"the number of door {i} is {7 * i % 10}"},
            ]
            file.write(json.dumps({"id": f"t{i}", "source": "doors", "messages": messages}) + "\n")
    (tmp_path / "background.txt").write_text("\n".join(f"line {i} of quiet text about nothing" for i in range(200)))

    def make(*overrides: str) -> RunConfig:
        (tmp_path / "arm.yaml").write_text(
            f"model: {model}\noutput: {tmp_path / 'results'}\nstream: {{path: {tmp_path / 'stream.jsonl'}}}\n"
            f"features: {{sae: {tmp_path / 'sae'}, selector: rarity, k: 4, check: false, "
            f"background: {tmp_path / 'background.txt'}}}\n"
            "evaluation: {suites: [], canaries: null}\ntracking: {wandb: disabled}\n"
        )
        return RunConfig.load(tmp_path / "arm.yaml", overrides)

    return make


def test_a_run_selects_on_nothing_that_it_learns_or_scores(run_config, tiny):
    experiment = build(run_config())
    _, tokenizer = tiny()
    calibration, unseen = experiment.material.calibration, experiment.material.unseen
    assert calibration["stream"]
    assert calibration["background"]
    for texts in calibration.values():
        assert text_digests(texts, tokenizer).isdisjoint(unseen)
    taught = [
        Chat(tokenizer).encode(t.messages, mask="none").input_ids for t in experiment.material.tasks[0].trajectories
    ]
    assert text_digests(taught, tokenizer) <= unseen


def test_a_run_refuses_files_that_hold_the_stream_or_the_evaluation(run_config, tmp_path):
    contrast = ("features.selector=contrast", f"features.negative={tmp_path / 'other.txt'}")
    (tmp_path / "other.txt").write_text("one thing\f another thing\f a third thing")
    (tmp_path / "wanted.txt").write_text("it is about doors\fand their numbers")
    assert build(run_config(*contrast, f"features.positive={tmp_path / 'wanted.txt'}")).directions.k == 4  # the control
    answers = "\n".join(f"the number of door {i} is {7 * i % 10}" for i in range(20))
    (tmp_path / "leaked.txt").write_text(answers)
    with pytest.raises(FeatclError, match=r"texts in features\.positive belong to the stream still to come"):
        build(run_config(*contrast, f"features.positive={tmp_path / 'leaked.txt'}"))
    with pytest.raises(FeatclError, match=r"texts in features\.positive belong to .* the evaluation"):
        build(run_config(*contrast, f"features.positive={tmp_path / 'background.txt'}"))  # its last fifth is scored


def test_repeats_of_what_is_taught_leave_the_calibration_split(run_config, tmp_path):
    """The same conversation under many ids falls on all sides of the split."""
    run_config()
    record = json.loads((tmp_path / "stream.jsonl").read_text().splitlines()[0])
    (tmp_path / "stream.jsonl").write_text("".join(json.dumps({**record, "id": f"r{i}"}) + "\n" for i in range(20)))
    with pytest.raises(FeatclError, match="lacks its stream"):
        build(run_config())
    assert build(run_config("features.selector=ids", "features.feature_ids=[1, 2]")).directions.k == 2  # the control


def test_a_combination_in_a_config(run_config):
    found = build(run_config("features.selector={union: [rarity, gradient_energy]}")).directions
    assert found.selector == "union(rarity, gradient_energy)"
    assert found.k == 4
