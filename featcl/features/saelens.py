"""SAELens: loading its SAEs, with every fault named, and running its trainer. The only module that imports sae_lens."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from featcl import files
from featcl.errors import FeatclError

SAE: TypeAlias = Any
"""A `sae_lens.SAE`; not named as a type, so that featcl imports without sae-lens."""

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"
ASSETS = Path(__file__).parents[1] / "lab" / "assets"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "matryoshka_batchtopk")


def load_sae(source: str | Path, sae_id: str | None = None, *, device: torch.device | str | None = None) -> SAE:
    """An SAELens SAE in float32, evaluation mode, without gradients, checked for shape and finite values.

    Args:
        source: "lab/<model>/<sae>", a folder with `cfg.json` and `sae_weights.safetensors`, or a SAELens release.
        sae_id: The id within a release; None for folders.
        device: Where to put it; None is the CPU.

    Raises:
        FeatclError: If it is missing, a pickle, misshapen, not finite, or sae-lens is not installed.
    """
    require_sae_lens()
    where = str(device or "cpu")
    sae = _load_folder(_folder(source), where) if sae_id is None else _load_release(str(source), sae_id, where)
    for name, tensor in sae.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise FeatclError(f"SAE {source}: {name} holds NaN or infinite values")
    sae.cfg.metadata["source"] = f"{source}" if sae_id is None else f"{source}/{sae_id}"
    sae_hook(sae)
    return sae.eval().requires_grad_(False)


def sae_hook(sae: SAE) -> str:
    """The hook the SAE was trained at, such as `blocks.3.hook_resid_post`.

    Raises:
        FeatclError: If the SAE does not record one.
    """
    hook_name = sae.cfg.metadata["hook_name"]
    if not isinstance(hook_name, str):
        raise FeatclError(f"SAE {sae.cfg.metadata['source']}: its configuration names no hook_name in metadata")
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


def train_step_(trainer: Any, batch: Float[Tensor, "tokens d_model"]) -> float:
    """One step of SAELens' trainer; returns the loss."""
    trainer.maybe_reset_sparsity()
    output = trainer.step(batch)
    trainer.n_training_steps += 1
    return output.loss.item()


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


def _folder(source: str | Path) -> Path:
    path = ASSETS / str(source).removeprefix("lab/") if str(source).startswith("lab/") else Path(source)
    if path.suffix in PICKLES:
        raise FeatclError(
            f"SAE {source} is a pickle, which can run code: convert it to {WEIGHTS_FILE} and {CONFIG_FILE}"
        )
    if not path.exists():
        shipped = ", ".join(sorted(f"lab/{p.parent.relative_to(ASSETS)}" for p in ASSETS.glob(f"*/*/{CONFIG_FILE}")))
        raise FeatclError(
            f"SAE {source} is not a folder on this machine; a SAELens release needs its sae_id as well"
            + (f"; shipped: {shipped}" if shipped else "")
        )
    if not path.is_dir():
        raise FeatclError(f"SAE {source} is a file: name the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    return path


def _load_folder(folder: Path, device: str) -> SAE:
    from sae_lens import SAE as SAELensSAE

    if not (folder / WEIGHTS_FILE).exists():
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
        found = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        raise FeatclError(f"SAE folder {folder} holds no {WEIGHTS_FILE}{found}")
    _check_weights(folder, _read_config(folder))
    try:
        return SAELensSAE.load_from_disk(folder, device=device, dtype="float32")
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FeatclError(f"SAE folder {folder}: {_one_line(error)}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    except FileNotFoundError:
        raise FeatclError(f"SAE folder {folder} holds no {CONFIG_FILE}") from None
    except ValueError as error:
        raise FeatclError(f"{folder / CONFIG_FILE} is not JSON: {_one_line(error)}") from None
    if not isinstance(config, dict) or not {"d_in", "d_sae"} <= config.keys():
        raise FeatclError(f"{folder / CONFIG_FILE} does not give d_in and d_sae")
    if config.get("normalize_activations") == "expected_average_only_in":
        raise FeatclError(
            f"{folder / CONFIG_FILE}: the activation scaling is not folded into the weights "
            "(normalize_activations is expected_average_only_in); save it with SAELens' save_inference_model"
        )
    return config


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    from safetensors import SafetensorError, safe_open

    d_in, d_sae = config["d_in"], config["d_sae"]
    expected = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in]}
    if config.get("architecture") == "jumprelu":
        expected |= {"b_enc": [d_sae], "threshold": [d_sae]}
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FeatclError(f"{folder / WEIGHTS_FILE} is not a safetensors file: {_one_line(error)}") from None
    for name, shape in expected.items():
        if name not in shapes:
            raise FeatclError(f"{folder / WEIGHTS_FILE} lacks {name}, expected with shape {shape}")
        if shapes[name] != shape:
            raise FeatclError(f"{folder / WEIGHTS_FILE}: {name} has shape {shapes[name]}, expected {shape}")


def _load_release(release: str, sae_id: str, device: str) -> SAE:
    from sae_lens import SAE as SAELensSAE

    try:
        return SAELensSAE.from_pretrained(release, sae_id, device=device)
    except Exception as error:  # the hub, the registry and every converter raise types of their own
        raise FeatclError(f"SAE release {release}, id {sae_id}: {type(error).__name__}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
