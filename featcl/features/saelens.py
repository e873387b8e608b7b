"""SAELens: loading its SAEs, with every fault named, and running its trainer. The only module that imports sae_lens."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from featcl import files
from featcl.errors import FeatclError
from featcl.features.weights import SAEParts

SAE: TypeAlias = Any
"""A `sae_lens.SAE`; not named as a type, so that featcl imports without sae-lens."""

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"
ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "matryoshka_batchtopk")


def sae_hook(sae: SAE) -> str:
    """The hook the SAE was trained at, such as `blocks.3.hook_resid_post`.

    Raises:
        FeatclError: If the SAE does not record one.
    """
    hook_name = sae.cfg.metadata["hook_name"]
    if not isinstance(hook_name, str):
        raise FeatclError(
            f"SAE {sae.cfg.metadata['source']} names no hook_name: load it with hook_name=, for example "
            "load_sae(…, hook_name='blocks.3.hook_resid_post')"
        )
    return hook_name


def require_width(sae: SAE, d_model: int) -> None:
    """Raise unless the SAE reads a residual stream of width `d_model`."""
    if sae.cfg.d_in != d_model:
        raise FeatclError(
            f"SAE {sae.cfg.metadata['source']} at {sae_hook(sae)} has width {sae.cfg.d_in}, the model's residual "
            f"stream has {d_model}: use an SAE trained on this model"
        )


def require_sae_lens() -> Any:
    """The sae_lens package, or one line that says it is missing."""
    try:
        return importlib.import_module("sae_lens")
    except ModuleNotFoundError as error:
        name = (error.name or "sae_lens").split(".")[0]
        raise FeatclError(f"SAEs need the package {name}, which is not installed: pip install sae-lens") from None


# --- training ---------------------------------------------------------------------------------------------------------


def make_trainer(
    sample: Float[Tensor, "tokens d_model"], settings: dict[str, Any], *, metadata: dict[str, Any], seed: int
) -> Any:
    """SAELens' own trainer around a fresh SAE, scaled and centred from a sample of activations.

    Args:
        sample: Activations; their mean starts b_dec, their mean norm is scaled to sqrt(d_model) while training.
        settings: `architecture`, `d_sae`, `l0`, `tokens`, `batch_size`, `lr`.
        metadata: Recorded with the SAE (hook_name, model_name, prepend_bos, …).
        seed: Of the initial weights.

    Source: Bussmann et al. 2024, arXiv:2412.06410 (BatchTopK); scaling as in SAELens `expected_average_only_in`.
    """
    require_sae_lens()
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    steps = max(1, settings["tokens"] // settings["batch_size"])
    sae_class, config_class = get_sae_training_class(settings["architecture"])
    config = config_class(
        d_in=sample.shape[1],
        d_sae=settings["d_sae"],
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(**metadata),
        decoder_init_norm=1.0,  # unit rows at the start leave fewer dead features than SAELens' 0.1 in short training
        **_architecture_options(settings, steps),
    )
    trainer_config = SAETrainerConfig(
        total_training_samples=steps * settings["batch_size"],
        train_batch_size_samples=settings["batch_size"],
        lr=settings["lr"],
        lr_end=settings["lr"],
        lr_warm_up_steps=min(50, steps // 10),
        lr_decay_steps=int(0.4 * steps),
        dead_feature_window=max(20, min(1000, steps // 10)),
        feature_sampling_window=max(1, steps // 2),
        device=str(sample.device),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sae = sae_class(config).to(sample.device)
    scale = math.sqrt(sample.shape[1]) / sample.norm(dim=-1).mean().item()
    sae.b_dec.data.copy_(sample.mean(dim=0) * scale)
    trainer = SAETrainer(trainer_config, sae, iter(()))
    trainer.activation_scaler.scaling_factor = scale
    return trainer


def train_step_(trainer: Any, batch: Float[Tensor, "tokens d_model"], *, measure: bool = False) -> dict[str, float]:
    """One step of SAELens' trainer.

    Args:
        trainer: From `make_trainer`.
        batch: Activations.
        measure: Whether to report more than the loss.

    Returns:
        `loss`; measured: also `fvu`, `l0`, `dead`, `lr` and the parts of the loss as SAELens names them.
    """
    trainer.maybe_reset_sparsity()
    output = trainer.step(batch)
    found = {"loss": output.loss.item()}
    if measure:
        log = trainer.build_train_step_log_dict(output=output, n_training_samples=trainer.n_training_samples)
        found |= {
            "fvu": 1 - log["metrics/explained_variance"],
            "l0": log["metrics/l0"],
            "dead": log["sparsity/dead_features"],
            "lr": log["details/current_learning_rate"],
        } | {name: value for name, value in log.items() if name.startswith("losses/") and "overall" not in name}
    trainer.n_training_steps += 1
    return found


def trainer_state(trainer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What a fresh trainer of the same settings needs to go on bit by bit: tensors by name, and counters."""
    tensors = {f"sae.{name}": tensor for name, tensor in trainer.sae.state_dict().items()}
    for index, parameter in enumerate(_parameters(trainer)):
        moments = trainer.optimizer.state[parameter]
        tensors |= {f"adam.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    tensors |= {name: getattr(trainer, name) for name in _RUNNING}
    return tensors, {"scale": trainer.activation_scaler.scaling_factor} | {n: getattr(trainer, n) for n in _COUNTERS}


@torch.no_grad()
def restore_trainer_(trainer: Any, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
    """Put a fresh trainer where `trainer_state` found another; its schedules are stepped, not stored."""
    for name, tensor in trainer.sae.state_dict().items():
        tensor.copy_(tensors[f"sae.{name}"])
    for index, parameter in enumerate(_parameters(trainer)):
        prefix = f"adam.{index}."
        moments = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        trainer.optimizer.state[parameter] = {
            name: t.clone() if name == "step" else t.clone().to(parameter.device) for name, t in moments.items()
        }
    for name in _RUNNING:
        getattr(trainer, name).copy_(tensors[name])
    for name in _COUNTERS:
        setattr(trainer, name, numbers[name])
    trainer.activation_scaler.scaling_factor = numbers["scale"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no optimizer step came between two of the schedule
        for _ in range(int(numbers["n_training_steps"])):
            for schedule in (trainer.lr_scheduler, *trainer.coefficient_schedulers.values()):
                schedule.step()


_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
_RUNNING = ("act_freq_scores", "n_forward_passes_since_fired")


def _parameters(trainer: Any) -> list[Tensor]:
    return [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]


def finish(trainer: Any, sample: Float[Tensor, "tokens d_model"], *, l0: float) -> Any:
    """Fold the activation scaling into the weights and, for BatchTopK, set the threshold that gives `l0` on `sample`.

    SAELens tracks that threshold as a running mean of each batch's smallest activation; on short runs it lags behind
    the weights, so it is read off the final weights instead: the value that exactly l0 · tokens activations exceed.
    """
    sae = trainer.sae
    sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.activation_scaler.scaling_factor = None
    trainer.set_final_sae_metadata()
    if hasattr(sae, "topk_threshold"):
        with torch.no_grad():
            _, hidden_pre = sae.encode_with_hidden_pre(sample)
            kept = min(int(l0 * len(sample)), hidden_pre.numel() - 1)
            sae.topk_threshold.fill_(hidden_pre.flatten().topk(kept + 1).values[-1].clamp(min=0).item())
    return sae


def save_trained(sae: Any, folder: Path, *, storage: str = "float32") -> None:
    """Write the SAE in SAELens' folder form (BatchTopK becomes JumpReLU), keys sorted; `storage` halves the file."""
    from safetensors.torch import load_file, save

    sae.to(device="cpu")
    sae.save_inference_model(folder)
    weights = {name: tensor.to(getattr(torch, storage)) for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    files.write_bytes(folder / WEIGHTS_FILE, save(weights))
    files.write_json(folder / CONFIG_FILE, json.loads((folder / CONFIG_FILE).read_text("utf-8")))


def _architecture_options(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    architecture, l0 = settings["architecture"], settings["l0"]
    if architecture == "batchtopk":
        return {"k": float(l0)}
    if architecture == "topk":
        return {"k": int(l0)}
    if architecture == "matryoshka_batchtopk":
        widths = sorted({settings["d_sae"] // 8, settings["d_sae"] // 4, settings["d_sae"] // 2, settings["d_sae"]})
        return {"k": float(l0), "matryoshka_widths": widths}
    if architecture == "jumprelu":
        return {
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": float(l0),
            "l0_warm_up_steps": steps // 5,
        }
    raise FeatclError(f"SAE architecture {architecture!r} is unknown: one of {', '.join(ARCHITECTURES)}")


# --- loading ----------------------------------------------------------------------------------------------------------


def directory() -> dict[str, Any]:
    """SAELens' own list of releases: per name `repo_id`, `conversion_func`, `saes_map` (id to folder) and more."""
    require_sae_lens()
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return get_pretrained_saes_directory()


def from_parts(parts: SAEParts, metadata: dict[str, Any], device: str) -> SAE:
    """An SAE from weights in SAELens' names."""
    from sae_lens import SAE as SAELensSAE

    config = config_of(parts, metadata, {"device": device})
    return SAELensSAE.load_from_disk(".", device=device, converter=lambda *_, **__: (config, parts.weights))


def from_folder(folder: Path, device: str) -> SAE:
    """What SAELens' `save_model` or `save_inference_model` wrote."""
    from sae_lens import SAE as SAELensSAE

    return SAELensSAE.load_from_disk(folder, device=device, dtype="float32")


def from_release(release: str, sae_id: str, device: str, converter: Any = None) -> SAE:
    """SAELens' `from_pretrained`; its scaling and neuronpedia id come from the list, the rest from the converter."""
    from sae_lens import SAE as SAELensSAE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a repository that has a release's name; of scaling: `settle_`
        return SAELensSAE.from_pretrained(release, sae_id, device=device, converter=converter)


def folder_parts(folder: Path, device: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a folder in SAELens' form, as a converter gives them."""
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    config, state = sae_lens_disk_loader(folder, device, overrides)
    if "metadata" in config:
        config["metadata"] |= {name: value for name, value in overrides.items() if name == "neuronpedia_id"}
    return config, state


def config_of(parts: SAEParts, metadata: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """SAELens' configuration dictionary; overrides that are no settings of the SAE describe it."""
    import sae_lens

    settings = {"dtype": "float32", "device": "cpu", "normalize_activations": "none", **parts.config}
    described = metadata | {name: value for name, value in overrides.items() if name not in settings}
    settings |= {name: value for name, value in overrides.items() if name in settings and name not in parts.config}
    return settings | {"metadata": {"sae_lens_version": sae_lens.__version__, **described}}


def settle_(sae: SAE, *, activation_scale: float | None = None) -> None:
    """Fold a known activation scaling, refuse an unknown one, and make the SAE a constant that is finite throughout."""
    source, processing = sae.cfg.metadata["source"], sae.cfg.normalize_activations
    if activation_scale is not None:
        if processing not in ("none", "expected_average_only_in"):
            raise FeatclError(
                f"SAE {source} processes its input itself ({processing}): no activation_scale belongs there"
            )
        sae.fold_activation_norm_scaling_factor(activation_scale)
    elif processing in ("expected_average_only_in", "covariance_whitening"):
        raise FeatclError(
            f"SAE {source}: the activation scaling is not folded into the weights (normalize_activations is "
            f"{processing}); save it with SAELens' save_inference_model, or say activation_scale="
        )
    for name, tensor in sae.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise FeatclError(f"SAE {source}: {name} holds NaN or infinite values")
    if sae.hook_z_reshaping_mode:
        sae.turn_off_forward_pass_hook_z_reshaping()
    sae.eval().requires_grad_(False)
