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
# # Forgetting
#
# What learning one thing costs the others: the matrix R, the frontier of acquiring and keeping, answers that flip, and
# a guard that notices and goes back. Budgets are small here (two tasks, few conversations, one seed); a study is made
# the same way, with `featcl sweep` and at least three seeds.

# %%
import tempfile
from pathlib import Path

import pandas as pd
from IPython.display import Image

import featcl
from featcl.learning.history import History
from featcl.studies.ledger import log_run
from featcl.tracking import plots

# %% [markdown]
# ## A run
#
# A config says all; any key can be overridden, here as on the command line. Two tasks are learned one after the other,
# and R is read: a row per training (the first is the base model), a column per task and per skill of the general suite.

# %%
folder = Path(tempfile.mkdtemp())
base = folder / "base.yaml"
base.write_text(f"""
study: forgetting
model: lab/olmo2
stream: {{name: lab/applications, tasks: [home_facts, code_library], limit: 32}}
features: {{sae: lab/olmo2/resid_post_3, selector: contrast, k: 32}}
learner: {{objectives: [{{name: sft}}], steps: 2}}
evaluation: {{suites: [lab/general], canaries: {{every: 10, items: 48}}}}
tracking: {{wandb: disabled, samples: 0}}
output: {folder}
""")
settings = [(kind, lr) for kind in ("both", "none") for lr in (1e-3, 3e-3)]
results = [
    featcl.run(featcl.RunConfig.load(base, [f"arm={kind}-{lr}", f"adapter.kind={kind}", f"learner.lr={lr}"]))
    for kind, lr in settings
]
result = results[1]
result

# %% [markdown]
# ## The frontier
#
# More acquired, more forgotten: an arm is better only if its line lies to the upper right. One point says nothing, and
# neither does one seed.

# %%
metrics = [found.summary["metrics"] for found in results]
points = [
    plots.FrontierPoint(kind, found["learning_accuracy"], 1 - found["forgetting_max_past"], lr=lr)
    for (kind, lr), found in zip(settings, metrics, strict=True)
]
Image(plots.frontier(result.path / "frontier.png", points), width=420)

# %% [markdown]
# ## Flips
#
# A mean that stays may hide answers that changed both ways. Between the base model and the end:

# %%
flips = result.matrix.flips()
pd.DataFrame(
    {
        "right → wrong": [len(column.right_to_wrong) for column in flips],
        "wrong → right": [len(column.wrong_to_right) for column in flips],
        "unchanged": [column.unchanged for column in flips],
    },
    index=[column.column for column in flips],
).T

# %% [markdown]
# The canaries show it between evaluations: a small fixed set, looked at every few updates.

# %%
Image(result.path / "plots" / "forgetting.png", width=420)

# %% [markdown]
# ## Garbage, an alarm, a rollback
#
# Now half of the stream is wrong, contradictory or adversarial. The guard draws fresh items for every look and bets
# against "on average no more than `tolerance` is lost"; the probability that it ever alarms falsely is at most `alpha`.
# An alarm goes back to the newest version that was found safe.

# %%
guard = "{every: 8, items: 128, tolerance: 0.2, pool: 1000, action: rollback}"
guarded = featcl.run(
    featcl.RunConfig.load(base, ["arm=guarded", "stream.garbage=0.5", "learner.lr=5e-3", f"learner.guard={guard}"])
)
log = log_run(guarded.path, everything=True)
happened = [entry for entry in reversed(log.entries) if entry.kind in ("rollback", "note")]
pd.DataFrame([(entry.version, entry.kind, entry.learned) for entry in happened], columns=["version", "kind", "what"])

# %% [markdown]
# What was rolled back is still told, but is no longer on the line from the base to the head. The wealth of the guard's
# test, and where it reached its threshold:

# %%
history = History(guarded.path / "ledger")
print(f"{len(history.line)} versions on the line, head v{history.head}")
records = pd.DataFrame(featcl.tracking.read_metrics(guarded.path / "metrics.jsonl").records)
columns = ["update", "guard/loss", "guard/wealth", "guard/threshold", "guard/alarms"]
records.dropna(subset="guard/wealth")[columns].round(3)

# %% [markdown]
# Next: several seeds and arms with intervals, `featcl sweep experiments/quickstart --seeds 0,1,2`; what is measured and
# what it means, `docs/concepts/evidence.md`.
