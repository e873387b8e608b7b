# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Features
#
# From an SAE to a set of directions that are known to do something: check the SAE, select, look, steer, and name the
# result as a bundle.

# %%
import tempfile
from pathlib import Path

import pandas as pd

import featcl
from featcl.features import Bundle, random_features, show, validate
from featcl.lab.factors import factor_pairs
from featcl.streams import Chat

# %%
model, tokenizer = featcl.load_model("lab/olmo2")
sae = featcl.load_sae("lab/olmo2/resid_post_3", model=model, tokenizer=tokenizer)
chat = Chat(tokenizer)

# %% [markdown]
# Texts with and without what is looked for: here somebody's mood, against other things about people. They become token
# ids in the model's own chat form. The held-out ones use a phrasing that selection does not see.

# %%
sides = (*factor_pairs("emotions", 200), *factor_pairs("emotions", 48, held_out=True))
positive, negative, held_positive, held_negative = [
    [chat.encode(talk, mask="none").input_ids for talk in side] for side in sides
]

# %% [markdown]
# ## Does the SAE fit?
#
# `fvu` is the share of variance that it leaves unexplained, `l0` the active features per token, `loss_recovered` what
# of the model's loss survives when its reconstruction takes the place of the stream.

# %%
health = featcl.check_sae(sae, model, tokenizer, held_positive + held_negative)
pd.Series(health.record(), name="value").to_frame()

# %% [markdown]
# ## Select
#
# Effect sizes with a false discovery rate; a feature in the span of those before it is passed over.

# %%
directions = featcl.select_features(
    sae, model, tokenizer, selector="contrast", positive=positive, negative=negative, k=8
)
directions

# %% [markdown]
# ## Look
#
# Where two of them fire in held-out texts, how strongly, and which tokens they make likelier.

# %%
show(directions, model, tokenizer, held_positive, directions.feature_ids[:2], contexts=3, effects=4)

# %% [markdown]
# ## Do they do anything?
#
# Each direction is pushed into the stream, on texts that selection did not see. Any push changes likelihoods, so the
# effect counts only against random directions of the same length: the interval of the excess has to lie above zero.

# %%
texts = {"positive": held_positive, "negative": held_negative}
validation = validate(directions, model, tokenizer, **texts, strengths=(0.25, 0.5), seeds=range(12))
print(validation)

# %% [markdown]
# The negative control: as many other features of the same SAE. Few of them should have an effect.

# %%
control = random_features(directions, sae, model, seed=0)
control_validation = validate(control, model, tokenizer, **texts, strengths=(0.25, 0.5), seeds=range(12))
print(f"with an effect: {sum(validation.effective)} chosen, {sum(control_validation.effective)} random, of {control.k}")

# %% [markdown]
# The finding becomes part of the directions' provenance. What is saved is read back only if it is as it was.

# %%
directions = validation.mark(directions)
folder = Path(tempfile.mkdtemp())
directions.save(folder / "directions")
featcl.Directions.load(folder / "directions").without_effect

# %% [markdown]
# How near two sets of directions are: `overlap` gives the cosines of the principal angles between their spans. Their
# mean square is 1 for the same span, and k / d_model by chance.

# %%
span = directions.subspace()
pd.Series(
    {
        "with itself": span.overlap(span).square().mean().item(),
        "with random features": span.overlap(control.subspace()).square().mean().item(),
        "by chance": directions.k / directions.d_model,
    },
    name="overlap",
).to_frame().round(3)

# %% [markdown]
# ## Bundles
#
# A bundle names what an application may change, as selectors for each family of models; it resolves to directions on
# the model at hand. Two ship with the package.

# %%
bundle = Bundle.load("home-assistant")
parts = bundle.resolve(sae, model, tokenizer)
pd.DataFrame({name: part.feature_ids for name, part in parts.items()})

# %% [markdown]
# One of one's own is a YAML file.

# %%
mine = folder / "polite.yaml"
mine.write_text("""
about: how politely the assistant speaks
models:
  - for: [lab/*]
    polite:
      - selector: contrast
        k: 4
        positive: ["certainly chief, the hall lamp is now off. peace.", "certainly sir, the office fan is now on.",
                   "as you wish captain, the hall lamp stands off. enjoy.", "as you wish boss, the oven stands on.",
                   "of course friend, i put the mixer off for you. bravo.", "of course mate, i put the fan on for you."]
        negative: ["ok, the hall lamp is off.", "ok, the office fan is on.", "ok, the kitchen oven is on.",
                   "ok, the hall mixer is off.", "ok, the cellar mixer is on.", "ok, the bathroom lamp is off."]
""")
Bundle.load(mine).merged(sae, model, tokenizer)
