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
# # Bring your own model
#
# Any Hugging Face folder with safetensors: train an SAE on it, run a stream, export what was learned, and load it where
# there is no featcl. Here the folder is a copy of a small Gemma-2; put in your own, or a Hugging Face id.

# %%
import json
import shutil
import tempfile
from itertools import islice
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import featcl
from featcl.features import show, train_saes
from featcl.features.show import most_active
from featcl.lab.corpus import conversations
from featcl.lab.streams import load_stream
from featcl.models import LAB_ASSETS
from featcl.studies.export import export_run

# %%
folder = Path(tempfile.mkdtemp())
MODEL = folder / "my-model"
shutil.copytree(LAB_ASSETS / "gemma2", MODEL, ignore=shutil.ignore_patterns("resid_post_*", "teacher"))
model, tokenizer = featcl.load_model(MODEL)
model.config.architectures

# %% [markdown]
# ## Text and trajectories
#
# Plain text like what the model was trained on, for the SAE and as background; and what is to be learned, one JSON
# object per line. `source` says where a trajectory comes from: R has a column for each.

# %%
texts = [
    "\n".join(message["content"] for message in talk if message["content"])
    for talk in islice(conversations(seed=1), 1500)
]
(folder / "background.txt").write_text("\f".join(texts[:200]))
trajectories = [
    trajectory
    for task in load_stream("lab/home", tasks=["home_facts", "home_style"]).tasks
    for trajectory in task.trajectories[:40]
]
lines = [json.dumps({**t.to_record(), "source": t.task}) for t in trajectories]
(folder / "stream.jsonl").write_text("\n".join(lines))
print(lines[0])

# %% [markdown]
# ## An SAE
#
# For a real model, some hundred million tokens and a GPU; here a minute's worth on a CPU is plenty. A training that was
# interrupted goes on with the same call.

# %%
trained = train_saes(model, tokenizer, texts, layers=[3], out=folder / "sae", tokens=60_000, d_sae=640)
sae = featcl.load_sae(folder / "sae")
sae

# %%
pd.Series(trained[3].health.record(), name="on held-out text").to_frame()

# %%
active = most_active(sae, model, tokenizer, texts[:100], k=1)
show(sae, model, tokenizer, texts[:100], active, contexts=3, effects=4)

# %% [markdown]
# ## A stream
#
# The same config as for the laboratory's models, with paths in place of names. `rarity` takes features that fire on
# the stream and rarely on the background, so no contrast has to be written. Without graded items R holds the held-out
# loss of each source; the last column is the background, which should stay as it is.

# %%
config = folder / "own.yaml"
config.write_text(f"""
study: own
model: {MODEL}
stream: {{path: {folder}/stream.jsonl}}
features: {{sae: {folder}/sae, selector: rarity, k: 24, background: {folder}/background.txt}}
adapter: {{kind: both}}
learner: {{objectives: [{{name: sft}}], lr: 3.0e-3, steps: 2}}
evaluation: {{suites: [], canaries: null}}
tracking: {{wandb: disabled, samples: 0}}
output: {folder}
""")
result = featcl.run(featcl.RunConfig.load(config))
result

# %% [markdown]
# ## Without featcl
#
# The export is a plain LoRA: one rank, scaling 1, the norms' gains inside. Transformers and PEFT load it; `merged` is a
# Hugging Face folder.

# %%
peft_folder = export_run(result.path, form="peft").folder
merged_folder = export_run(result.path, form="merged").folder
sorted(path.name for path in peft_folder.iterdir())

# %%
tokenizer = AutoTokenizer.from_pretrained(MODEL)
with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), peft_folder)
merged = AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.float32)
question = [{"role": "user", "content": "which pastime does mira like?"}]
asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    logits = {"base": model(**asked).logits, "PEFT": with_peft(**asked).logits, "merged": merged(**asked).logits}
print("PEFT and merged agree within", (logits["PEFT"] - logits["merged"]).abs().max().item())
print("the base model differs by   ", (logits["PEFT"] - logits["base"]).abs().max().item())

# %%
end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
reply = merged.generate(**asked, max_new_tokens=12, do_sample=False, eos_token_id=end)
tokenizer.decode(reply[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
