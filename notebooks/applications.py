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
# # Applications
#
# A home assistant that learns how a family wants to be spoken to, and a coding agent that learns that an API was
# renamed. Both may change only what their bundle of features names.

# %%
from dataclasses import replace

import pandas as pd

import featcl
from featcl.evaluation import score_items
from featcl.features import Bundle
from featcl.lab.environments import CodeEnvironment
from featcl.lab.streams import load_stream
from featcl.lab.suites import load_suite
from featcl.lab.world import make_world
from featcl.streams import Chat

pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## A family's style
#
# Four people, each with a register, a form of address and a closing word; others are answered plainly. Items ask in
# phrasings and rooms that the stream never shows.

# %%
model, tokenizer = featcl.load_model("lab/olmo2")
sae = featcl.load_sae("lab/olmo2/resid_post_3", model=model, tokenizer=tokenizer)
chat = Chat(tokenizer)
[family] = load_stream("lab/home", tasks=["home_style"]).tasks
make_world("development").styles

# %%
directions = Bundle.load("home-assistant").merged(sae, model, tokenizer)
adapter = featcl.constrain(model, directions, kind="both")
learner = featcl.Learner(model, tokenizer, adapter, lr=5e-3, steps=2, max_kl_per_update=0.5)
adapter

# %%
general = load_suite("lab/general", items=6)
before = [score_items(adapter.model, chat, items) for items in (family.items, general)]
updates = [learner.observe(trajectory) for trajectory in family.trajectories[:64]]
after = [score_items(adapter.model, chat, items) for items in (family.items, general)]

# %% [markdown]
# Two numbers belong together: what was learned, and what of the rest is left.

# %%
pd.DataFrame(
    {"before": [sum(right) / len(right) for right in before], "after": [sum(right) / len(right) for right in after]},
    index=["the family's style", "general suite"],
).round(2)

# %%
asked = [[message] for item in family.items[:40:8] for message in item.messages]
pd.DataFrame(
    {
        "asked": [messages[0]["content"] for messages in asked],
        "said": [str(learner.chat(messages)) for messages in asked],
        "wanted": [item.answer for item in family.items[:40:8]],
    }
)

# %% [markdown]
# ### Corrected while talking
#
# A reply can be judged; what was judged is learned from, one update each. The trust region is opened here, so that one
# correction is enough; for live use keep it small, and mind what a correction costs elsewhere. `undo` goes back
# exactly.

# %%
learner.reconfigure(steps=8, max_kl_per_update=5.0)
question = [{"role": "user", "content": "edith here. turn on the hall lamp."}]
reply = learner.chat(question)
learner.feedback(reply.id, correction="certainly edith, the hall lamp is now on.")
learned = learner.learn()
print(f"before: {reply}\nafter:  {learner.chat(question)}")

# %%
learned.updates[0]

# %%
learner.undo()
print("undone:", learner.chat(question))

# %% [markdown]
# ## A renamed API
#
# Functions of `core` have new names. The model knows the old ones well: what it learns contradicts what it knew. The
# bundle is another, so the model is loaded anew.

# %%
model, tokenizer = featcl.load_model("lab/olmo2")
[renamed] = load_stream("lab/coding", tasks=["code_rename"]).tasks
make_world("development").renamed

# %%
directions = Bundle.load("coding-agent").merged(sae, model, tokenizer)
adapter = featcl.constrain(model, directions, kind="both")
learner = featcl.Learner(model, tokenizer, adapter, lr=5e-3, steps=2, max_kl_per_update=0.5)
before = [score_items(adapter.model, chat, items) for items in (renamed.items, general)]

# %% [markdown]
# The agent also acts: it calls a tool that runs its code in a system where the new names hold, and reports the result.
# The reward is half for what was run and half for what was said.

# %%
environments = [replace(CodeEnvironment.of_world(make_world("development")), library="core") for _ in range(8)]
seeds = range(24)
episodes = {"before": learner.act(environments, seeds, temperature=0.0, max_new_tokens=40)}
updates = [learner.observe(trajectory) for trajectory in renamed.trajectories[:64]]
episodes["after"] = learner.act(environments, seeds, temperature=0.0, max_new_tokens=40)
after = [score_items(adapter.model, chat, items) for items in (renamed.items, general)]

# %%
pd.DataFrame(
    {"before": [sum(right) / len(right) for right in before], "after": [sum(right) / len(right) for right in after]},
    index=["new names", "general suite"],
).round(2)

# %% [markdown]
# Whether what was learned in conversations carries over to acting is another question than whether it was learned. Two
# things to look for in a call: the new name, and whether the call is still whole, although conversations end where the
# code ends.

# %%
pd.DataFrame({when: [episode.reward for episode in played] for when, played in episodes.items()}).mean().to_frame(
    "reward"
)

# %%
pd.DataFrame(
    {when: [played[number].messages[2]["content"] for number in range(4)] for when, played in episodes.items()}
)
