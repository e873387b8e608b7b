"""Steering: a direction that writes a letter has an effect on texts of that letter, random directions have none."""

from __future__ import annotations

import json

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import Directions, random_directions, validate
from featcl.features.steering import mean_log_likelihood
from featcl.features.tokens import token_batches

POSITIVE = [f"z{'z' * (i % 5)}z" for i in range(8)]
NEGATIVE = [f"a{'a' * (i % 5)}a" for i in range(8)]


@pytest.fixture
def writing(tiny):
    """A model that copies: the stream is the embedding, and the unembedding is the embedding too."""
    model, tokenizer = tiny(n_layers=2)
    for name, parameter in model.named_parameters():
        parameter.data *= 0 if "o_proj" in name or "down_proj" in name else 1
    model.model.norm.weight.data.fill_(1)
    model.lm_head.weight.data = 0.5 * model.model.embed_tokens.weight.data.clone()
    z, a = (model.lm_head.weight.data[tokenizer(letter).input_ids[0]] for letter in "za")
    return model, tokenizer, z, a


def directions_of(*rows, ids=None) -> Directions:
    return Directions.from_vectors(torch.stack(rows), layer=1, feature_ids=ids)


def test_a_direction_that_writes_the_letter_has_an_effect(writing):
    model, tokenizer, z, a = writing
    away = torch.randn(32, generator=torch.Generator().manual_seed(9))
    chosen = directions_of(z - a, a - z, away, ids=[5, 6, 7])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = validate(chosen, model, tokenizer, positive=POSITIVE, negative=NEGATIVE, strengths=(0.25, 0.5))
    assert found.effective == (True, False, False)
    assert found.best(5).low > 0
    assert found.best(6).high < 0, "the other letter"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    text = str(found)
    assert text.startswith("1 of 3 directions have an effect")
    assert text.count("no effect") == 2
    assert json.loads(json.dumps(found.to_json()))["effective"] == [True, False, False]


def test_the_effect_by_hand(writing):
    """E at one strength from logits computed without any hook."""
    model, tokenizer, z, a = writing
    found = validate(directions_of(z - a), model, tokenizer, positive=POSITIVE, negative=NEGATIVE, strengths=(0.5,))
    unit, means = (z - a) / (z - a).norm(), []
    embed = model.model.embed_tokens.weight
    for texts in (POSITIVE, NEGATIVE):
        changes = []
        for text in texts:
            ids = torch.tensor(tokenizer(text).input_ids)
            scores = []
            for push in (0.0, 0.5 * found.norm):
                logits = model.lm_head(model.model.norm(embed[ids] + push * unit))
                scores.append(logits[:-1].log_softmax(-1).gather(1, ids[1:, None]).mean())
            changes.append(float(scores[1] - scores[0]))
        means.append(sum(changes) / len(changes))
    assert found.effects[0].effect == pytest.approx(means[0] - means[1], rel=1e-4)
    hidden = torch.cat([embed[torch.tensor(tokenizer(text).input_ids)] for text in (*POSITIVE, *NEGATIVE)])
    assert found.norm == pytest.approx(float(hidden.norm(dim=-1).mean()), rel=1e-5)


def test_random_directions_are_rarely_called_effective(writing):
    """The negative control of the whole procedure: 31 random directions against 100, at most 10 % marked."""
    model, tokenizer, *_ = writing
    chance = directions_of(*torch.randn(31, 32, generator=torch.Generator().manual_seed(77)))
    arguments = {"positive": POSITIVE, "negative": NEGATIVE, "strengths": (0.5,), "seeds": range(100)}
    found = validate(chance, model, tokenizer, **arguments)
    assert sum(found.effective) <= 3


def test_directions_without_effect_are_marked_and_stay_marked(writing, tmp_path):
    model, tokenizer, z, a = writing
    chosen = directions_of(z - a, a - z, ids=[5, 6])
    assert chosen.without_effect == ()
    found = validate(chosen, model, tokenizer, positive=POSITIVE, negative=NEGATIVE, strengths=(0.5,))
    marked = found.mark(chosen)
    assert marked.without_effect == (6,)
    assert marked.digest == chosen.digest
    marked.save(tmp_path)
    assert Directions.load(tmp_path).without_effect == (6,)
    assert Directions.load(tmp_path).manifest["validation"]["best"][0]["feature"] == 5
    with pytest.raises(FeatclError, match="other directions"):
        found.mark(random_directions(directions_of(z)))


def test_the_same_input_gives_the_same_numbers_in_any_batches(writing):
    model, tokenizer, z, a = writing
    arguments = {"positive": POSITIVE, "negative": NEGATIVE, "strengths": (0.5,), "seeds": range(5)}
    first = validate(directions_of(z - a), model, tokenizer, **arguments)
    again = validate(directions_of(z - a), model, tokenizer, **arguments)
    assert first == again
    small = validate(directions_of(z - a), model, tokenizer, batch_tokens=8, **arguments)
    assert small.effects[0].effect == pytest.approx(first.effects[0].effect, rel=1e-4)
    alone = validate(directions_of(z - a), model, tokenizer, **{**arguments, "negative": None})
    assert alone.effects[0].effect != pytest.approx(first.effects[0].effect, rel=1e-2)


def test_padding_does_not_count(tiny):
    model, tokenizer = tiny()
    [together] = token_batches([[10, 11, 12], [10, 11, 12, 13, 14]], tokenizer)
    [alone] = token_batches([[10, 11, 12]], tokenizer)
    likelihoods = [
        mean_log_likelihood(model(b.input_ids, attention_mask=b.attention_mask).logits, b) for b in (together, alone)
    ]
    assert float(likelihoods[0][0]) == pytest.approx(float(likelihoods[1][0]), rel=1e-5)


def test_bad_input(writing):
    model, tokenizer, z, _ = writing
    for arguments, says in (
        ({"positive": ["zz"]}, "two or more positive"),
        ({"positive": POSITIVE, "negative": ["aa"]}, "two or more negative"),
        ({"positive": ["zz", "z"]}, "fewer than two tokens"),
        ({"positive": POSITIVE, "strengths": ()}, "at least one strength"),
    ):
        with pytest.raises(FeatclError, match=says):
            validate(directions_of(z), model, tokenizer, **arguments)


def test_any_score_of_a_text_will_do(writing):
    """Twice the mean log-likelihood gives twice the effect."""
    model, tokenizer, z, a = writing
    arguments = {"positive": POSITIVE, "negative": NEGATIVE, "strengths": (0.5,), "seeds": range(5)}
    once = validate(directions_of(z - a), model, tokenizer, **arguments)
    twice = validate(directions_of(z - a), model, tokenizer, **arguments, score=lambda *x: 2 * mean_log_likelihood(*x))
    assert twice.effects[0].effect == pytest.approx(2 * once.effects[0].effect)
    none = validate(
        directions_of(z - a), model, tokenizer, **arguments, score=lambda logits, batch: torch.zeros(len(logits))
    )
    assert (none.effects[0].effect, none.effective) == (0, (False,))
