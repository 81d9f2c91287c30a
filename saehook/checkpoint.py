"""Read and write SAEs on disk.

The layout is SAELens' (version 6), so that the tools of the field open what we write: `cfg.json` and
`sae_weights.safetensors` with `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `b_enc`, `b_dec`, for jumprelu `threshold`,
and for a skip transcoder `W_skip` [d_out, d_in]. A BatchTopK is written as the jumprelu that it is at inference;
`metadata.saehook` remembers what it was.

Beside them lies `stats.safetensors` with what `LatentStats` says, in float32: `max_act`, `density`, `mean_act` [d_sae], and
in files of later versions `quantiles` [d_sae, levels] at `quantile_levels` [levels] and `mean_error` [d_out]. Its header has
`tokens`, and nothing else: safetensors writes several entries in an order of its own, and files are to be the same bytes.

Files are never unpickled. Names, shapes and dtypes are checked against `cfg.json` before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saehook.config import (
    Activation,
    BatchTopK,
    JumpReLU,
    ReLU,
    SAEConfig,
    TopK,
    activation_from_dict,
    activation_to_dict,
    mask_rule_from_data,
)
from saehook.errors import ArgumentError, FileError, FormatError, MissingStatError
from saehook.files import atomic_write, atomically
from saehook.sae import QUANTILE_LEVELS, SAE, LatentStats

SCHEMA = 1
CONFIG, WEIGHTS, STATS = "cfg.json", "sae_weights.safetensors", "stats.safetensors"
SAELENS_VERSION = "6.54.12"
"""The version of SAELens whose layout this is; it reads the field to choose its reader."""
MAX_CONFIG_BYTES = 16 * 2**20
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_sae(sae: SAE, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write an SAE into the folder `path`; files of the same name there are replaced, each at once.

    Args:
        dtype: of the weights in the file (float32, bfloat16, float16); None: the SAE's. `threshold` is always float32.

    Raises:
        MissingStatError: a BatchTopK without threshold, which no other tool could use.
        ArgumentError: a dtype that the layout does not know, or weights that hold NaN or infinity in it.
        FileError: the folder cannot be written.
    """
    path = Path(path)
    dtype = dtype or sae.dtype
    names = {value: name for name, value in DTYPES.items()}
    if dtype not in names:
        raise ArgumentError(f"an SAE cannot be stored as {dtype}; expected {', '.join(DTYPES)}.")
    activation = sae.config.activation
    if isinstance(activation, (BatchTopK, JumpReLU)) and sae.threshold is None:
        raise MissingStatError(
            f"this {type(activation).__name__} has no threshold, so its file would be of no use. Train it to the end, or "
            "call sae.set_threshold(value)."
        )
    tensors = {name: getattr(sae, name).detach().to("cpu", dtype).contiguous() for name in _WEIGHTS}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.detach().to("cpu", dtype).contiguous()
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold.detach().float().cpu().expand(sae.d_sae).contiguous()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArgumentError(f"{name} holds NaN or infinity in {dtype}; the SAE is not written.")
    config: dict[str, Any] = {
        "architecture": _architecture(sae.config),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": names[dtype],
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.subtract_b_dec,
        "normalize_activations": sae.config.normalize,
        "reshape_activations": "none",
    }
    if isinstance(activation, TopK):
        config |= {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    if sae.is_transcoder:
        config["d_out"] = sae.d_out
    config["metadata"] = {
        **sae.metadata.get("saelens", {}),
        "sae_lens_version": SAELENS_VERSION,
        "training_architecture": activation_to_dict(activation)["name"],
        "hf_hook_name": sae.site,
        **({"hf_hook_name_out": sae.site_out} if sae.is_transcoder else {}),
        "saehook": {
            "schema": SCHEMA,
            "activation": activation_to_dict(activation),
            "site": sae.site,
            **({"site_out": sae.site_out} if sae.is_transcoder else {}),
            **{key: value for key, value in sae.metadata.items() if key != "saelens"},
            "mask_rule": dataclasses.asdict(sae.mask_rule),
        },
    }
    try:
        text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"sae.metadata is no JSON data: {error}.") from None
    with atomically(path / WEIGHTS) as partial:
        save_file(tensors, partial)
    if sae.stats is not None:
        facts = {name: getattr(sae.stats, name) for name in (*_STATS, *_LATER_STATS)}
        stats = {name: x.detach().float().cpu().contiguous() for name, x in facts.items() if x is not None}
        if "quantiles" in stats:
            stats["quantile_levels"] = torch.tensor(QUANTILE_LEVELS)
        with atomically(path / STATS) as partial:
            save_file(stats, partial, metadata={"tokens": str(sae.stats.tokens)})
    else:
        (path / STATS).unlink(missing_ok=True)
    atomic_write(path / CONFIG, text)
    return path


_WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
_STATS = ("max_act", "density", "mean_act")
_LATER_STATS = ("quantiles", "mean_error")
"""What older files do not have."""
_OURS = {"schema", "activation", "site", "site_out", "mask_rule", "saelens"}
"""What stands under `metadata.saehook` and is no metadata of the SAE."""


_ARCHITECTURES: dict[str, type[Activation]] = {"standard": ReLU, "topk": TopK, "jumprelu": JumpReLU}
_TRANSCODERS: dict[str, tuple[type[Activation], bool]] = {
    "transcoder": (ReLU, False),
    "skip_transcoder": (ReLU, True),
    "jumprelu_transcoder": (JumpReLU, False),
    "jumprelu_skip_transcoder": (JumpReLU, True),
    "topk_transcoder": (TopK, False),
    "topk_skip_transcoder": (TopK, True),
}
"""Inference rule and skip map by architecture. SAELens has no name for a TopK transcoder; the last two are ours."""


def _architecture(config: SAEConfig) -> str:
    kind = JumpReLU if isinstance(config.activation, BatchTopK) else type(config.activation)
    if config.d_out is None:
        return next(name for name, known in _ARCHITECTURES.items() if known is kind)
    return next(name for name, known in _TRANSCODERS.items() if known == (kind, config.skip))


def load_sae(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
) -> SAE:
    """Read an SAE from a folder in the SAELens layout; bf16 weights become float32 unless `dtype` says otherwise.

    Args:
        mapped: leave the weights in the file, in its dtype, and read only what is used: of the decoder the rows of steered
            latents. On the CPU, whatever `dtype` says; what is read is then checked when it is used. The file must not be
            overwritten in place meanwhile (`save_sae` puts a new one there).

    Raises:
        ArgumentError: `mapped`, and another device than the CPU.
        FileError: the folder or one of its files is missing or unreadable.
        FormatError: damaged, unsafe, or of an unknown format; the message says what was expected.
    """
    path = Path(path)
    if not path.is_dir():
        what = "a file, not a folder" if path.exists() else "not there"
        raise FileError(f"{path} is {what}. Name a folder with {CONFIG} and {WEIGHTS}, as save_sae writes it.")
    data = _read_config(path / CONFIG)
    config = _sae_config(data, path / CONFIG)
    metadata = data.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    ours = metadata.get("saehook")
    ours = dict(ours) if isinstance(ours, dict) else {}
    if ours.get("schema", SCHEMA) != SCHEMA:
        raise FormatError(
            f"{path / CONFIG} has schema {ours['schema']!r}; this version reads {SCHEMA}. Update saehook."
        )
    site = ours.get("site") or metadata.get("hf_hook_name")
    site_out = ours.get("site_out") or metadata.get("hf_hook_name_out") if config.d_out is not None else None
    for found in (site, site_out):
        if not isinstance(found, (str, type(None))):
            raise FormatError(f"{path / CONFIG}: the recorded site is {found!r}; a string is expected.")
    d_in, d_sae, d_out = config.d_in, config.d_sae, config.d_out or config.d_in
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,)
    }  # fmt: skip
    if isinstance(config.activation, (BatchTopK, JumpReLU)):
        shapes["threshold"] = (d_sae,)
    if config.skip:
        shapes["W_skip"] = (d_out, d_in)
    if mapped and device is not None and torch.device(device).type != "cpu":
        raise ArgumentError(
            f"mapped=True leaves the weights in the file, so they cannot be on {device}. Leave one out."
        )
    tensors = _read_tensors(path / WEIGHTS, shapes, read=not mapped)
    sae = SAE(config, site=site, site_out=site_out, device="meta", dtype=tensors["W_enc"].dtype if mapped else dtype)
    sae.source, sae.mapped = path.resolve(), mapped
    for name, tensor in tensors.items():
        if not mapped or tensor.ndim < 2:
            tensor = tensor.to(device or "cpu", torch.float32 if name == "threshold" else sae.dtype)
        setattr(sae, name, nn.Parameter(tensor, requires_grad=not mapped))
    if (path / STATS).exists():
        sae.stats = _read_stats(path / STATS, d_sae, d_out)
    if "mask_rule" in ours:
        try:
            sae.mask_rule = mask_rule_from_data(ours["mask_rule"])
        except FormatError as error:
            raise FormatError(f"{path / CONFIG}: {error}") from None
    sae.metadata = {key: value for key, value in ours.items() if key not in _OURS}
    known = {"saehook", "sae_lens_version", "training_architecture", "hf_hook_name", "hf_hook_name_out"}
    foreign = {key: value for key, value in metadata.items() if key not in known}
    if foreign:
        sae.metadata["saelens"] = foreign
    return sae


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise FormatError(
                f"{path} has {path.stat().st_size:,} bytes; a configuration has at most {MAX_CONFIG_BYTES:,}."
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{path} is no text file; JSON is expected.") from None
    except FileNotFoundError:
        raise FileError(
            f"{path.parent} holds no {CONFIG}, so it is no SAE that saehook reads. Expected are {CONFIG} and {WEIGHTS}."
        ) from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}.") from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds {type(data).__name__}; a JSON object is expected.")
    return data


def _sae_config(data: dict[str, Any], path: Path) -> SAEConfig:
    """`SAEConfig` of a `cfg.json`; refuses what this reader would compute wrongly."""

    def refuse(problem: str) -> FormatError:
        return FormatError(f"{path}: {problem}")

    for name in ("architecture", "d_in", "d_sae"):
        if name not in data:
            raise refuse(f"{name!r} is missing; an SAELens v6 configuration has architecture, d_in and d_sae.")
    for name in ("d_in", "d_sae"):
        if isinstance(data[name], bool) or not isinstance(data[name], int) or data[name] < 1:
            raise refuse(f"{name} is {data[name]!r}; a whole number of at least 1 is expected.")
    if data.get("reshape_activations", "none") != "none":
        raise refuse(f"reshape_activations = {data['reshape_activations']!r} is not supported; only 'none' is.")
    normalize = data.get("normalize_activations", "none")
    if normalize not in ("none", "layer_norm"):
        raise refuse(f"normalize_activations = {normalize!r} is not supported; 'none' and 'layer_norm' are.")
    if not isinstance(data.get("apply_b_dec_to_input", True), bool):
        raise refuse(f"apply_b_dec_to_input is {data['apply_b_dec_to_input']!r}; true or false is expected.")
    if data.get("rescale_acts_by_decoder_norm"):
        raise refuse("rescale_acts_by_decoder_norm is on; only SAEs whose decoder norms are folded are supported.")
    metadata = data.get("metadata") if isinstance(data.get("metadata"), dict) else {}
    ours = metadata.get("saehook") if isinstance(metadata, dict) else None
    recorded = ours.get("activation") if isinstance(ours, dict) else None
    architecture = data["architecture"]
    try:
        known = [*_ARCHITECTURES, *_TRANSCODERS]
        if architecture not in known:
            raise FormatError(f"architecture {architecture!r} is unknown; {', '.join(known)} are read.")
        is_transcoder = architecture in _TRANSCODERS
        kind, skip = _TRANSCODERS[architecture] if is_transcoder else (_ARCHITECTURES[architecture], False)
        activation: Activation = TopK(k=data.get("k", 0)) if kind is TopK else kind()  # type: ignore[call-arg]
        if kind is JumpReLU and isinstance(recorded, dict):
            activation = activation_from_dict(recorded)
            if not isinstance(activation, (BatchTopK, JumpReLU)):
                raise FormatError(f"{recorded} is recorded for an architecture {architecture!r}.")
        return SAEConfig(
            d_in=data["d_in"],
            d_sae=data["d_sae"],
            activation=activation,
            subtract_b_dec=data.get("apply_b_dec_to_input", not is_transcoder),
            normalize=normalize,
            d_out=data.get("d_out", data["d_in"]) if is_transcoder else None,
            skip=skip,
        )
    except (ArgumentError, FormatError) as error:
        raise refuse(str(error)) from None


def _read_tensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    optional: dict[str, tuple[int, ...]] | None = None,
    *,
    read: bool = True,
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, those of `shapes` and maybe of `optional`, finite and of a float dtype.

    Without `read` matrices are left where they are, as views of the file, and not looked at.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            shapes = shapes | {name: shape for name, shape in (optional or {}).items() if name in names}
            if names != set(shapes):
                missing, unknown = sorted(set(shapes) - names), sorted(names - set(shapes))
                raise FormatError(
                    f"{path} should hold {sorted(shapes)}, but "
                    + " and ".join(
                        part
                        for part in (
                            f"{', '.join(missing)} is missing" if missing else "",
                            f"{', '.join(unknown)} is unknown" if unknown else "",
                        )
                        if part
                    )
                    + "."
                )
            for name, shape in shapes.items():
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape:
                    raise FormatError(
                        f"{path}: {name} has shape {tuple(found.get_shape())}, but {CONFIG} says {shape}. "
                        "The two files do not belong together, or the matrix is transposed."
                    )
                if found.get_dtype() not in {"F32", "F16", "BF16", "F64"}:
                    raise FormatError(f"{path}: {name} has dtype {found.get_dtype()}; a float dtype is expected.")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except FileNotFoundError:
        raise FileError(f"{path.parent} has {CONFIG} but no {path.name}. Copy the whole folder.") from None
    except SafetensorError as error:
        raise FormatError(
            f"{path} is no whole safetensors file ({error}): it is cut short, damaged, or of another kind (pickles are "
            "never read). Copy it again."
        ) from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}.") from None
    for name, tensor in tensors.items():
        if (read or tensor.ndim < 2) and not torch.isfinite(tensor).all():
            raise FormatError(f"{path}: {name} holds NaN or infinity; the file is damaged.")
    return tensors


def _read_stats(path: Path, d_sae: int, d_out: int) -> LatentStats:
    n = len(QUANTILE_LEVELS)
    later = {"quantiles": (d_sae, n), "quantile_levels": (n,), "mean_error": (d_out,)}
    tensors = _read_tensors(path, dict.fromkeys(_STATS, (d_sae,)), later)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    tokens = header.get("tokens", "")
    if not tokens.isdecimal() or not math.isfinite(float(tokens)):
        raise FormatError(f"{path}: its header says no number of tokens. Write it again with `saehook stats`.")
    levels = tensors.pop("quantile_levels", torch.empty(0)).float()
    if (quantiles := tensors.get("quantiles")) is not None:
        if not torch.equal(levels, torch.tensor(QUANTILE_LEVELS)):
            raise FormatError(
                f"{path}: its quantiles are at the levels {levels.tolist()}; this version reads {list(QUANTILE_LEVELS)}. "
                "Write it again with `saehook stats`."
            )
        if (F.pad(torch.cat([quantiles, tensors["max_act"][:, None]], 1), (1, 0)).diff(dim=1) < 0).any():
            raise FormatError(
                f"{path}: quantiles do not rise from 0 to max_act; the file is damaged. Write it again with `saehook stats`."
            )
    return LatentStats(**{name: tensor.float() for name, tensor in tensors.items()}, tokens=int(tokens))


def stored_dtype(path: str | Path) -> torch.dtype:
    """Dtype of the weights in a folder that `load_sae` has accepted."""
    return DTYPES.get(_read_config(Path(path) / CONFIG).get("dtype", "float32"), torch.float32)
