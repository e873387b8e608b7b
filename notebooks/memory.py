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
# # Memory
#
# A memory of fixed size that keeps learning while it is read (Titans, arXiv:2501.00663). What it has stored is a state:
# a value that is passed in and out. First the memory alone, on random items; then on a model.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import featcl
from featcl.memory import MemoryState, NeuralMemory, capacity, recall_curve

# %% [markdown]
# ## Storing
#
# `retrieved, state = memory(x, state)`. The size of the state depends on the memory's shape, not on how much was read.

# %%
memory = NeuralMemory(64, heads=2, depth=1, chunk_size=16, expansion=8.0)
tokens = torch.randn(1, 100, 64, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    _, state = memory(tokens)
    _, much_later = memory(tokens.repeat(1, 10, 1), state)
print(state.nbytes == much_later.nbytes, state.nbytes, "bytes")
state

# %% [markdown]
# ## Recalling
#
# Random items are stored one after the other, and each is read back at the end: how often is what is read nearest to
# its own value, by how many items came after it? Recall falls with what came after; a deeper memory is larger. The
# control asks with another item's key.

# %%
gates = (0.1, 0.5, 0.0)  # step, momentum, decay of every item
settings = {"items": 256, "after": (4, 16, 32, 64, 128), "gates": gates}
linear = recall_curve(memory, **settings)
deep = recall_curve(NeuralMemory(64, heads=2, depth=2, chunk_size=16, expansion=8.0), **settings)
control = recall_curve(memory, **settings, shuffled=True)
figure, axes = plt.subplots(figsize=(5, 2.4), dpi=80)
axes.plot(linear.after, linear.recalled, marker="o", label=f"linear, {linear.nbytes:,} bytes")
axes.plot(deep.after, deep.recalled, marker="s", label=f"two layers, {deep.nbytes:,} bytes")
axes.plot(control.after, control.recalled, marker="^", label="another item's key")
axes.set(xlabel="items stored after it", ylabel="share recalled", ylim=(-0.05, 1.05))
axes.legend(fontsize=7)
plt.show()

# %% [markdown]
# ## Size
#
# How many items are held at once, by the size of the state: of `stored` items, the share that is recalled after the
# last.

# %%
memories = [NeuralMemory(64, heads=2, head_dim=head_dim, chunk_size=16) for head_dim in (8, 16, 32)]
found = [capacity(each, stored=(8, 16, 32, 64)) for each in memories]
pd.DataFrame(
    [each.recalled for each in found],
    index=pd.Index([each.nbytes for each in found], name="bytes of state"),
    columns=pd.Index(found[0].stored, name="stored"),
).round(2)

# %% [markdown]
# ## On a model
#
# A memory is attached to one block of a frozen model. Its gate is zero until it is trained, so the logits are
# bit-equal; the state is written all the same. A pass keeps nothing unless it runs inside `writing()`.

# %%
model, tokenizer = featcl.load_model("lab/olmo2")
document = tokenizer("dora drinks cider. gerda likes grey. oscar likes black. anton eats beans.", return_tensors="pt")
other = tokenizer("the farmers rest in the school. the nurse reads in the theatre.", return_tensors="pt")
with torch.no_grad():
    plain = model(**document).logits
attached = featcl.attach_memory(
    model, NeuralMemory(model.config.hidden_size, heads=4, depth=2, chunk_size=4), layer=2, form="gate"
)
with torch.no_grad():
    print("bit-equal to the model without it:", torch.equal(plain, model(**document).logits))

# %% [markdown]
# What was read surprises it less when it comes again. Every user has a state of their own.

# %%
surprise = {"before": [attached.surprise(**document).item(), attached.surprise(**other).item()]}
with attached.user("anna"):
    with attached.writing(), torch.no_grad():
        model(**document)
    attached.settle()
    surprise["anna, after reading"] = [attached.surprise(**document).item(), attached.surprise(**other).item()]
    state = attached.state
surprise["somebody else"] = [attached.surprise(**document).item(), attached.surprise(**other).item()]
pd.DataFrame(surprise, index=["what anna read", "another text"]).round(3)

# %%
state

# %% [markdown]
# A state is a value: saved, loaded, given to somebody, forgotten.

# %%
folder = Path(tempfile.mkdtemp())
state.save(folder / "anna.safetensors")
print(MemoryState.load(folder / "anna.safetensors").equal(state))
del attached.users["anna"]
attached.users

# %%
model = attached.detach()

# %% [markdown]
# ## Training what stores and recalls
#
# Storing is not yet answering: projections and gate are trained once, by distilling the model that reads a whole text
# into the same model that reads it in windows, with nothing but the memory between them. A run does it before its
# stream. This one is far too short for recall, which takes several hundred steps: look at `memory/kl_memory` against
# `memory/kl_truncated`, and at `memory/recall_memory` between those of the truncated and the full context.

# %%
base = folder / "base.yaml"
base.write_text(f"""
study: memory
model: lab/olmo2
stream: {{name: lab/applications, tasks: [home_facts], limit: 4}}
features: {{sae: lab/olmo2/resid_post_3, selector: contrast, k: 16}}
memory:
  layer: 3
  heads: 4
  conv: 2
  chunk_size: 16
  train: {{steps: 30, batch: 8, lr: 1.0e-2, window: 48, context: 112}}
evaluation: {{suites: [], canaries: null}}
tracking: {{wandb: disabled, samples: 0}}
output: {folder}
""")
result = featcl.run(featcl.RunConfig.load(base))
measured = pd.DataFrame({when: result.summary["memory"][when] for when in ("untrained", "trained")})
names = ["kl_memory", "kl_truncated", "closed", "recall_memory", "recall_truncated", "recall_full"]
measured.loc[[f"memory/{name}" for name in names]].astype(float).round(3)

# %% [markdown]
# The study with all its controls, and what it found: `python -m featcl.studies.memory_recall experiments/memory`.
