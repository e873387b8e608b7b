"""Looking at features: contexts, histograms and logit effects are the numbers they claim to be, and HTML is safe."""

from __future__ import annotations

import dataclasses
import importlib
import re
from html.parser import HTMLParser

import pytest
import torch

from featcl.errors import FeatclError
from featcl.features import Directions, check_sae, load_sae, select_features
from featcl.features.logits import final_inverse_rms, logit_effects
from featcl.features.show import directions_card, neuronpedia_page, sae_card, show
from featcl.features.tokens import token_batches, token_text, token_windows
from featcl.models import inner_model, residual_stream

TEXTS = [
    f"the {noun} is {state} & <b>{noun}</b>" for noun in ("lamp", "door", "kettle") for state in ("on", "off", "old")
]
IDS = (3, 17, 40)


def quiet(source):
    """The SAE with biases that let every feature fire on some tokens and not on others."""
    source.b_dec.data.zero_()
    source.b_enc.data.zero_()
    source.threshold.data.mul_(0.5)
    source.cfg.metadata["prepend_bos"] = False
    return source


@pytest.fixture
def looked_at(tiny, sae):
    model, tokenizer = tiny()
    source = quiet(sae("jumprelu"))
    return source, model, tokenizer, show(source, model, tokenizer, TEXTS, IDS, contexts=3)


def all_acts(source, model, tokenizer) -> list[torch.Tensor]:
    """Reference: SAELens' encode on each text alone, no padding."""
    return [
        source.encode(residual_stream(model, torch.tensor([tokenizer(text).input_ids]), layer=1))[0] for text in TEXTS
    ]


def test_statistics_equal_a_direct_computation(looked_at):
    source, model, tokenizer, found = looked_at
    acts = torch.cat(all_acts(source, model, tokenizer))
    for feature, dashboard in zip(IDS, found, strict=True):
        mine = acts[:, feature]
        assert dashboard.tokens == len(mine)
        assert dashboard.active == int((mine > 0).sum()) > 0
        assert dashboard.mean == pytest.approx(float(mine[mine > 0].mean()), rel=1e-4)
        assert sum(dashboard.histogram) == dashboard.active
        edges = torch.linspace(0, dashboard.top, len(dashboard.histogram) + 1)
        expected = torch.histogram(mine[mine > 0], edges).hist.long().tolist()
        assert sum(abs(a - b) for a, b in zip(expected, dashboard.histogram, strict=True)) <= 2  # rounding at an edge


def test_contexts_are_the_strongest_windows(looked_at):
    source, model, tokenizer, found = looked_at
    acts = all_acts(source, model, tokenizer)
    for feature, dashboard in zip(IDS, found, strict=True):
        peaks = sorted((float(window[:, feature].max()) for window in acts), reverse=True)
        assert [context.strength for context in dashboard.contexts] == pytest.approx(peaks[:3], rel=1e-4)
        for context in dashboard.contexts:
            text = "".join(context.tokens)
            [index] = [i for i, whole in enumerate(TEXTS) if text in whole and context.strength == pytest.approx(
                float(acts[i][:, feature].max()), rel=1e-4)]  # fmt: skip
            start = TEXTS[index].index(text)
            expected = acts[index][start : start + len(context.tokens), feature]
            assert torch.allclose(torch.tensor(context.feature_acts), expected, atol=1e-4)
            assert context.feature_acts[context.peak] == max(context.feature_acts)


def test_a_histogram_whose_range_grows_loses_no_token(tiny, sae):
    """Weak texts first: the range is set by them and has to double."""
    model, tokenizer = tiny()
    source = quiet(sae("jumprelu"))
    order = sorted(TEXTS, key=lambda text: float(all_of(source, model, tokenizer, text).max()))
    one = show(source, model, tokenizer, order, IDS[0])
    module = importlib.import_module("featcl.features.show")

    with pytest.MonkeyPatch.context() as patch:
        rows = module.feature_rows
        patch.setattr(module, "feature_rows", lambda *a, **k: rows(*a, **{**k, "batch_tokens": 1}))
        grown = module.show(source, model, tokenizer, order, IDS[0])
    assert sum(grown[0].histogram) == sum(one[0].histogram) == one[0].active
    assert grown[0].top >= one[0].top
    assert [c.strength for c in grown[0].contexts] == pytest.approx([c.strength for c in one[0].contexts], rel=1e-4)


def all_of(source, model, tokenizer, text: str) -> torch.Tensor:
    return source.encode(residual_stream(model, torch.tensor([tokenizer(text).input_ids]), layer=1))[0, :, IDS[0]]


# --- logits -----------------------------------------------------------------------------------------------------------


def olmo1():
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return OlmoForCausalLM(OlmoConfig(**shape, num_attention_heads=4, eos_token_id=0, pad_token_id=1)).eval()


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "llama", "olmo1"])
def test_logit_effects_are_the_derivative_of_the_models_own_head(tiny, family):
    """Where h is orthogonal to d the norm's divisor does not move to first order, and the formula is exact."""
    model = olmo1() if family == "olmo1" else tiny(family)[0]
    generator = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=-1)
    h = 3 * torch.randn(32, generator=generator)
    if family == "olmo1":
        d, h = d - d.mean(), h - h.mean()
    h = h - (h @ d) / (d @ d) * d
    inner = inner_model(model)

    def head(x):
        return inner.lm_head(inner.model.norm(x[None, None]))[0, 0]

    _, derivative = torch.func.jvp(head, (h,), (d,))
    inverse_rms = float((h.pow(2).mean() + 1e-6).rsqrt())
    found = logit_effects(model, d[None], inverse_rms=inverse_rms)[0]
    expected = derivative - derivative.mean()
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    gainless = d @ inner.lm_head.weight.T * inverse_rms  # negative control: without the norm's gain
    if family != "olmo1":
        assert (gainless - gainless.mean() - expected).abs().max() > 0.05 * expected.abs().max()


def test_the_mean_of_olmo1s_norm_matters():
    """Negative control: the ones direction does nothing behind a norm that subtracts the mean."""
    assert logit_effects(olmo1(), torch.ones(1, 32)).abs().max() < 1e-5


def test_final_inverse_rms_is_that_of_the_last_hidden_state(tiny):
    model, tokenizer = tiny()
    [batch] = token_batches(token_windows(tokenizer, TEXTS, context=64), tokenizer)
    before_norm = residual_stream(model, batch.input_ids, batch.attention_mask, layer=2)[batch.counted]
    expected = before_norm.pow(2).mean(-1).rsqrt().mean()
    assert final_inverse_rms(model, batch) == pytest.approx(float(expected), rel=1e-3)


def test_promoted_tokens_are_the_highest_logits(looked_at):
    source, model, tokenizer, found = looked_at
    effects = logit_effects(model, torch.nn.functional.normalize(source.W_dec[list(IDS)], dim=-1))
    for row, dashboard in enumerate(found):
        order = effects[row, : len(tokenizer)].argsort(descending=True)
        assert dashboard.promoted[0][0] == token_text(tokenizer, int(order[0]))
        assert dashboard.suppressed[0][0] == token_text(tokenizer, int(order[-1]))
        assert dashboard.promoted[0][1] > 0 > dashboard.suppressed[0][1]
        values = [value for _, value in dashboard.suppressed]
        assert values == sorted(values)


# --- HTML -------------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_escaped_and_loads_nothing(looked_at, tmp_path):
    *_, found = looked_at
    hostile = dataclasses.replace(
        found[0],
        label="<script>alert(1)</script>",
        source='"><img src=x onerror=alert(1)>',
        neuronpedia="https://www.neuronpedia.org/gemma-2-2b/20-res/3",
    )
    for page in (hostile._repr_html_(), found._repr_html_()):
        tags = Tags(page)
        assert {"script", "img", "link", "object"}.isdisjoint(tag for tag, _ in tags.found)
        for tag, attributes in tags.found:
            assert "src" not in attributes, tag  # an iframe gets its address when it is opened
            assert "onerror" not in attributes
    assert "<script>alert(1)</script>" in Tags(hostile._repr_html_()).text
    [iframe] = [attributes for tag, attributes in Tags(hostile._repr_html_()).found if tag == "iframe"]
    assert iframe["loading"] == "lazy"
    assert iframe["data-src"] == "https://www.neuronpedia.org/gemma-2-2b/20-res/3?embed=true"
    assert "<b>" in Tags(found._repr_html_()).text  # of the texts, shown as text
    assert "<iframe" not in found._repr_html_()
    found.save(tmp_path / "all.html")
    hostile.save(tmp_path / "one.html")
    page = (tmp_path / "all.html").read_text()
    Tags(page.removeprefix("<!doctype html>"))
    assert page.count("<h3>") == 3
    assert "url(" not in page
    assert not re.search(r"https?://", page)


def test_neuronpedia_pages():
    assert neuronpedia_page("gemma-2-2b/20-gemmascope-res-16k", 7) == (
        "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/7"
    )
    for wrong in (None, "", "x", "a/b/c", "javascript:alert(1)/x", '"/onload=x'):
        assert neuronpedia_page(wrong, 7) is None


def test_directions_and_saes_show_themselves(tiny, sae, looked_at):
    source, model, tokenizer, _ = looked_at
    source.cfg.metadata["neuronpedia_id"] = "a/b"
    chosen = select_features(source, model, tokenizer, selector="contrast", k=2, positive=TEXTS[:4], negative=TEXTS[4:])
    tags = Tags(chosen._repr_html_())
    assert [a["href"] for tag, a in tags.found if tag == "a"] == [
        f"https://www.neuronpedia.org/a/b/{feature}" for feature in chosen.feature_ids
    ]
    assert "effect" in tags.text
    plain = Directions.from_vectors(torch.eye(32)[:2], layer=1, names=("<i>", "b"))
    assert "<i>" in Tags(directions_card(plain)).text
    assert "jumprelu" in Tags(sae_card(source)).text
    named = show(chosen, model, tokenizer, TEXTS)
    assert [dashboard.feature_id for dashboard in named] == list(chosen.feature_ids)
    assert named[0].scores["effect"] == chosen.manifest["scores"]["effect"][0]
    assert named[0].neuronpedia == f"https://www.neuronpedia.org/a/b/{chosen.feature_ids[0]}"


@pytest.mark.parametrize(("hook_name", "width"), [("blocks.1.attn.hook_z", 32), ("blocks.1.hook_mlp_out", 32)])
def test_other_sites_show_their_direction_in_the_stream(tiny, sae, hook_name, width):
    model, tokenizer = tiny("gemma2")
    source = sae("jumprelu", d_model=width)
    source.cfg.metadata["hook_name"] = hook_name
    [found] = show(source, model, tokenizer, TEXTS, [5])
    assert found.tokens > 0
    assert found.hook_name == hook_name


def test_bad_input(tiny, sae):
    model, tokenizer = tiny()
    source = quiet(sae("jumprelu"))
    plain = Directions.from_vectors(torch.eye(32)[:2], layer=1)
    for says, args in (
        ("feature 48 does not exist", (source, model, tokenizer, TEXTS, [48])),
        ("name some by feature_ids", (source, model, tokenizer, TEXTS)),
        ("carry no encoder", (plain, model, tokenizer, TEXTS)),
        ("no tokens besides BOS", (source, model, tokenizer, [""], [1])),
        ("cannot be read feature by feature", (sae("gated"), model, tokenizer, TEXTS, [1])),
    ):
        with pytest.raises(FeatclError, match=says):
            show(*args)
    assert check_sae(source, model, tokenizer, TEXTS, strict=False).tokens > 0


def test_a_loaded_sae_shows_itself_and_still_copies(sae_folder):
    import copy

    loaded = load_sae(sae_folder("jumprelu"))
    assert "blocks.1.hook_resid_post" in loaded._repr_html_()
    twin = copy.deepcopy(loaded)
    twin.cfg.metadata["source"] = "the twin"
    assert "the twin" in twin._repr_html_()
    assert "the twin" not in loaded._repr_html_()
    assert loaded.state_dict().keys() == twin.state_dict().keys()


def test_jupyter_picks_the_html(looked_at):
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    *_, found = looked_at
    for shown in (found, found[0]):
        data, _ = formatters.DisplayFormatter().format(shown)
        assert "Feature 3" in data["text/html"]
