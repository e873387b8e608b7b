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
# # Anatomy of an update
#
# What an update is made of: features, versions, tokens, layers. A model learns a few facts; then the update is taken
# apart.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from transformer_lens.patching import get_act_patch_resid_pre

import featcl
from featcl.evaluation.samples import sample_completions
from featcl.lab.streams import load_stream
from featcl.learning import RunLedger
from featcl.streams import Chat
from featcl.studies.ledger import log_run
from featcl.studies.ledger_blame import blame_run
from featcl.studies.ledger_diff import diff_runs

# %%
model, tokenizer = featcl.load_model("lab/olmo2")
sae = featcl.load_sae("lab/olmo2/resid_post_3", model=model, tokenizer=tokenizer)
chat = Chat(tokenizer)
stream = load_stream("lab/home", tasks=["home_facts"])
people = [chat.encode(talk, mask="none").input_ids for talk in stream.positive[:200]]
others = [chat.encode(talk, mask="none").input_ids for talk in stream.negative[:200]]
directions = featcl.select_features(sae, model, tokenizer, selector="contrast", positive=people, negative=others, k=24)

# %% [markdown]
# A ledger keeps every accepted update: what it was learned from, and how it changed the coordinates, bit for bit. A run
# (`featcl run`) keeps one in its folder; here the notebook does.

# %%
folder = Path(tempfile.mkdtemp())
adapter = featcl.constrain(model, directions, kind="both")
ledger = RunLedger(folder / "ledger", adapter)
learner = featcl.Learner(model, tokenizer, adapter, lr=3e-3, steps=2, max_kl_per_update=0.3, ledger=ledger)
updates = [learner.observe(trajectory) for trajectory in stream.tasks[0].trajectories[:24]]
updates[-1]

# %% [markdown]
# ## Features
#
# Raw coordinates are not feature strengths: the basis is orthonormal, features are not. The table is exact.

# %%
report = adapter.report(top=6)
report

# %% [markdown]
# ## Versions
#
# The log, newest first; a line names the features that moved most.

# %%
log = log_run(folder)
log.entries[0]

# %%
diff_runs(folder, "v1", "head", top=6)

# %% [markdown]
# Which experiences moved the strongest feature. A share says what happened when the experience was learned, not what
# would be without it.

# %%
blame_run(folder, feature=str(report.rows[0].feature))

# %% [markdown]
# An update can be subtracted, since coordinates enter linearly. That is exact in the weights; what was learned later
# had seen it. A revert is a version too.

# %%
learner.revert(3)

# %%
print(log_run(folder).entries[0].learned)
learner.rollback(learner.versions[-2])

# %% [markdown]
# ## Tokens
#
# A reply of the adapted model, coloured by how far each prediction has moved from the base model's.

# %%
question = stream.tasks[0].trajectories[0].messages[-2:-1]
prompts = [chat.prompt(question)]
[reply] = sample_completions(adapter, chat, prompts, generator=torch.Generator().manual_seed(0), temperature=0.0)
reply

# %% [markdown]
# ## Leak
#
# Behind a norm with gains g, a write along D comes out along g ⊙ D. The basis is made of D ⊘ g, so that the promise is
# exact; `fold_norms=False` is the control. OLMo-2 and Gemma-2 both norm what their blocks write.

# %%
ids = torch.tensor(prompts)
adapter.leak(ids)

# %%
plain_model, _ = featcl.load_model("lab/olmo2")
unfolded = featcl.constrain(plain_model, directions, kind="both", fold_norms=False)
featcl.Learner(plain_model, tokenizer, unfolded, lr=3e-3).observe(stream.tasks[0].trajectories[0])

gemma, gemma_tokenizer = featcl.load_model("lab/gemma2")
gemma_sae = featcl.load_sae("lab/gemma2/resid_post_3", model=gemma, tokenizer=gemma_tokenizer)
some = featcl.select_features(gemma_sae, gemma, gemma_tokenizer, selector="ids", k=8, feature_ids=range(8))
gemma_folded = featcl.constrain(gemma, some, kind="both")
featcl.Learner(gemma, gemma_tokenizer, gemma_folded, lr=3e-3).observe(stream.tasks[0].trajectories[0])
gemma_ids = torch.tensor([Chat(gemma_tokenizer).prompt(question)])

plain_gemma, _ = featcl.load_model("lab/gemma2")
gemma_unfolded = featcl.constrain(plain_gemma, some, kind="both", fold_norms=False)
featcl.Learner(plain_gemma, gemma_tokenizer, gemma_unfolded, lr=3e-3).observe(stream.tasks[0].trajectories[0])

pd.DataFrame(
    {
        "OLMo-2": [adapter.leak(ids).leak, unfolded.leak(ids).leak],
        "Gemma-2": [gemma_folded.leak(gemma_ids).leak, gemma_unfolded.leak(gemma_ids).leak],
    },
    index=["gains folded into the basis", "gains left out"],
)

# %% [markdown]
# ## Layers
#
# TransformerLens reads the adapted model through a bridge; the logits are compared before it is handed out. The logit
# lens: what each block's output would say as the next token, base against adapted.

# %%
adapted = featcl.as_bridge(adapter, tokenizer)
with adapter.disabled():
    base = featcl.as_bridge(adapter, tokenizer)
_, adapted_cache = adapted.run_with_cache(ids)
_, base_cache = base.run_with_cache(ids)

# %%
adapted_stream, blocks = adapted_cache.accumulated_resid(layer=-1, incl_mid=False, pos_slice=-1, return_labels=True)
base_stream = base_cache.accumulated_resid(layer=-1, incl_mid=False, pos_slice=-1)
adapted_lens = adapted.unembed(adapted.ln_final(adapted_stream))[:, 0]
base_lens = base.unembed(base.ln_final(base_stream))[:, 0]
pd.DataFrame(
    {
        "base": tokenizer.batch_decode(base_lens.argmax(-1)[:, None]),
        "adapted": tokenizer.batch_decode(adapted_lens.argmax(-1)[:, None]),
    },
    index=blocks,
).T

# %% [markdown]
# Activation patching: the base model runs with the adapted model's stream put in at one block and one token. Where the
# adapted answer's logit comes back, the update has done its work by then. Adapted blocks write; what they wrote at
# earlier tokens is read at later ones.

# %%
learned, known = adapted_lens[-1].argmax(), base_lens[-1].argmax()
patched = get_act_patch_resid_pre(
    base, ids, adapted_cache, lambda logits: logits[0, -1, learned] - logits[0, -1, known]
)

# %%
figure, axes = plt.subplots(figsize=(7, 2), dpi=80)
image = axes.imshow(patched, aspect="auto", cmap="cividis")
axes.set_xticks(range(ids.shape[1]), tokenizer.batch_decode(ids[0][:, None]), rotation=60, ha="right", fontsize=7)
axes.set_ylabel("stream before block")
figure.colorbar(image, label="logit difference")
plt.show()
