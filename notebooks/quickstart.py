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
# # Quickstart
#
# A model learns from five conversations, and what it may change is bounded: only features of a sparse autoencoder (SAE)
# that were chosen beforehand. Everything here ships with the package; nothing is downloaded.

# %%
import tempfile

import pandas as pd

import featcl

# %% [markdown]
# ## Load
#
# `lab/olmo2` is a small trained model of the OLMo-2 architecture. A Hugging Face id or a folder works as well. Objects
# show themselves.

# %%
model, tokenizer = featcl.load_model("lab/olmo2")
sae = featcl.load_sae("lab/olmo2/resid_post_3", model=model, tokenizer=tokenizer)
sae

# %% [markdown]
# ## Select
#
# `contrast` takes the features that tell two sets of texts apart: here statements about people against other talk.
# The texts must differ from what is learned and from what is asked later.

# %%
about_people = ["dora drinks cider.", "gerda likes grey.", "anton eats beans.", "wanda lives in dublin."]
about_people += ["oscar likes black.", "carl has a rabbit.", "emil plays guitar.", "fiona feels eager."]
other_talk = ["ok, the hall oven is off.", "noofa zorb quop green", "the farmers rest in the school.", "dirty."]
other_talk += ["flux.hesk(marks)", "the nurse reads in the theatre.", "ivan raven ladder", "reverse_marks"]
directions = featcl.select_features(
    sae, model, tokenizer, selector="contrast", positive=about_people, negative=other_talk, k=16
)
directions

# %% [markdown]
# ## Constrain
#
# `both` bounds what is written to the residual stream and what is read from it. Only the coordinates are trained; they
# are zero at the start, so this is still the base model.

# %%
adapter = featcl.constrain(model, directions, kind="both")
adapter

# %% [markdown]
# ## Learn
#
# Five facts that the model does not know. `max_kl_per_update` is the trust region: no update moves the model further
# than that on what it learned from, in nats per token.

# %%
facts = {
    "how does jonas want the evening?": "jonas wants it cool.",
    "where does elin live?": "elin lives in tokyo.",
    "which pastime does mira like?": "mira plays golf.",
    "which colour does felix like?": "felix likes purple.",
    "what animal is with tomas?": "tomas has a pony.",
}
conversations = [
    featcl.Trajectory(
        f"talk-{number}",
        source="kitchen tablet",
        messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}),
    )
    for number, (question, answer) in enumerate(facts.items(), start=1)
]

# %%
learner = featcl.Learner(model, tokenizer, adapter, objective="sft", lr=1e-2, steps=4, max_kl_per_update=1.0)
question = [{"role": "user", "content": "what animal is with tomas?"}]
before = learner.chat(question)
updates = [learner.observe(conversation) for conversation in conversations]
print(f"before: {before}\nafter:  {learner.chat(question)}")

# %%
updates[-1]

# %%
columns = ["trajectory", "version", "train/loss", "update/kl", "update/step_scale", "constraint/delta_norm"]
pd.DataFrame([update.record() for update in updates])[columns].round(3)

# %% [markdown]
# ## Look at what changed
#
# Which features the update writes and reads, and how much of what it writes lies outside the chosen span. In float32
# the leak is rounding.

# %%
adapter.report(top=5)

# %%
ids = tokenizer(about_people[0], return_tensors="pt").input_ids
adapter.leak(ids)

# %% [markdown]
# Switched off, the adapter leaves the base model, bit by bit. Every update is a version that can be returned to.

# %%
with adapter.disabled():
    print("base:      ", learner.chat(question))
learner.rollback(0)
print("rolled back:", learner.chat(question))
learner.versions

# %% [markdown]
# ## Keep it
#
# `save_adapter` writes a plain PEFT folder, which loads without featcl; `save` writes all that the next update depends
# on. Next: [features](features.ipynb), [what an update is made of](anatomy_of_an_update.ipynb),
# [what is forgotten](forgetting.ipynb).

# %%
folder = tempfile.mkdtemp()
learner.save_adapter(folder)
