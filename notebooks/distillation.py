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
# # Distillation
#
# Three ways to learn the same conversations: imitate them (`sft`), learn from oneself as one is with the notes in
# front (`self_distillation`), and imitate with the base model as a brake (`sft` + `recover`). Then the estimators of
# the divergence, side by side.

# %%
import tempfile
from pathlib import Path

import pandas as pd
import torch

import featcl
from featcl.lab.streams import load_stream
from featcl.objectives import kl_divergence
from featcl.objectives.distillation import sampled_reverse_kl
from featcl.streams import Chat

# %% [markdown]
# ## Signals
#
# The same stream, features and adapter; only the objective differs. The task is latent: the base model can do it when
# it is told how in its context, which is what self-distillation needs. `recover` pulls towards the base model on
# background texts.

# %%
folder = Path(tempfile.mkdtemp())
base = folder / "base.yaml"
base.write_text(f"""
study: distillation
model: lab/olmo2
stream: {{name: lab/home, tasks: [home_style], limit: 32}}
features: {{sae: lab/olmo2/resid_post_3, selector: contrast, k: 32}}
adapter: {{kind: both}}
learner: {{lr: 3.0e-3, steps: 2}}
evaluation: {{suites: [lab/general], canaries: null}}
tracking: {{wandb: disabled, samples: 0}}
output: {folder}
""")
signals = {
    "sft": ["learner.objectives=[{name: sft}]"],
    "self_distillation": ["learner.objectives=[{name: self_distillation}]", "learner.lr=1e-3", "learner.steps=1"],
    "sft-recover": ["learner.objectives=[{name: sft}, {name: recover, weight: 1.0}]"],
}
results = {
    name: featcl.run(featcl.RunConfig.load(base, [f"arm={name}", *overrides])) for name, overrides in signals.items()
}
results["self_distillation"]

# %% [markdown]
# What each acquired, and what it cost: look at `learning_accuracy` beside `general_change`, and at how far the weights
# went for it. Self-distillation learns from what the student itself says, so it selects among what the student can say
# already, and it wants a smaller rate: at that of `sft` it may destroy more than it teaches. In the quickstart's config
# `sft` comes first.

# %%
metrics = ["learning_accuracy", "general_change"]
table = pd.DataFrame({name: result.summary["metrics"] for name, result in results.items()}).T[metrics].astype(float)
table.assign(delta_norm=[result.summary["delta_norm"] for result in results.values()]).round(3)

# %% [markdown]
# ## Estimators
#
# A teacher that knows the tasks scores a conversation; the student is the base model. Full vocabulary, the teacher's
# most likely tokens with a bucket for the rest (a lower bound), and the sampled token alone. `alpha` goes from the
# forward KL (0) to the reverse (1).

# %%
model, tokenizer = featcl.load_model("lab/olmo2")
teacher, _ = featcl.load_model("lab/olmo2/teacher")
trajectory = load_stream("lab/home", tasks=["home_style"]).tasks[0].trajectories[0]
encoded = Chat(tokenizer).encode(trajectory.messages)
ids = torch.tensor([encoded.input_ids])
mask = torch.tensor([encoded.loss_mask])[:, 1:]
with torch.no_grad():
    student_logits, teacher_logits = model(ids).logits[:, :-1], teacher(ids).logits[:, :-1]

# %%
alphas, sizes = [0.0, 0.5, 1.0], [1, 4, 16, None]
pd.DataFrame(
    [
        [kl_divergence(student_logits, teacher_logits, mask=mask, alpha=alpha, top_k=size).item() for size in sizes]
        for alpha in alphas
    ],
    index=["forward", "between, 0.5", "reverse"],
    columns=["top 1 + tail", "top 4 + tail", "top 16 + tail", "full"],
).round(3)

# %% [markdown]
# One sampled token per position estimates the reverse KL without bias, and with much variance: many draws agree with
# the full vocabulary, a single one need not. As a loss its gradient is that of a policy gradient; the log-ratio itself
# has none on average.

# %%
student_log, teacher_log = student_logits[mask].log_softmax(-1), teacher_logits[mask].log_softmax(-1)
draws = torch.multinomial(student_log.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(0))
estimates = sampled_reverse_kl(student_log.gather(-1, draws), teacher_log.gather(-1, draws)).mean(0)
pd.Series(
    {
        "full vocabulary": kl_divergence(student_logits, teacher_logits, mask=mask).item(),
        "mean of 4000 draws": estimates.mean().item(),
        "standard deviation of one draw": estimates.std().item(),
    },
    name="reverse KL, nats per token",
).to_frame().round(3)

# %% [markdown]
# The same choice as an objective, on the student's own samples. At a rate of almost nothing all of them measure loss
# and gradient at the base model. The reverse KL weighs tokens by the student's own probability: where the student is
# sure of something else, it is large and has almost no gradient, whatever the estimator. The forward KL has one.

# %%
sae = featcl.load_sae("lab/olmo2/resid_post_3", model=model, tokenizer=tokenizer)
directions = featcl.select_features(sae, model, tokenizer, selector="ids", k=32, feature_ids=range(32))
adapter = featcl.constrain(model, directions, kind="both")
options = {"full": {}, "top 16 + tail": {"top_k": 16}, "sampled": {"estimator": "sampled"}, "forward": {"alpha": 0.0}}
settings = {"teacher": teacher, "optimizer": "sgd", "lr": 1e-9}
learners = [
    featcl.Learner(model, tokenizer, adapter, objective={"name": "distillation", **option}, **settings)
    for option in options.values()
]
steps = [learner.observe(trajectory).record() for learner in learners]
pd.DataFrame(steps, index=list(options))[["train/loss", "optim/grad_norm", "seconds"]].round(4)
