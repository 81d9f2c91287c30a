"""Read and write SAEs on disk.

The layout is SAELens' (version 6), so that the tools of the field open what we write: `cfg.json` and
`sae_weights.safetensors` with `W_enc` [d_in, d_sae], `W_dec` [d_sae, d_out], `b_enc`, `b_dec`, for jumprelu `threshold`,
and for a skip transcoder `W_skip` [d_out, d_in]. A BatchTopK is written as the jumprelu that it is at inference;
`metadata.saehook` remembers what it was.

Beside them lies `stats.safetensors` with what `LatentStats` says, in float32: `max_act`, `density`, `mean_act` [d_sae], and
in files of later versions `quantiles` [d_sae, levels] at `quantile_levels` [levels] and `mean_error` [d_out]. Its header has
`tokens`, and nothing else: safetensors writes several entries in an order of its own, and files are to be the same bytes.

Of the files of others, which `saehook.formats` reads, pickles are opened only as far as they hold plain tensors. Names, shapes
and dtypes are checked against the configuration before a tensor is read.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saehook.config import (
    AbsTopK,
    BatchTopK,
    GroupMax,
    JumpReLU,
    SAEConfig,
    TopK,
    activation_to_dict,
    mask_rule_from_data,
)
from saehook.errors import ArgumentError, FileError, FormatError, MissingStatError
from saehook.files import atomic_write, atomically, sha256
from saehook.formats import Found, read_sae, saelens
from saehook.formats.folder import MAX_CONFIG_BYTES as MAX_CONFIG_BYTES
from saehook.formats.folder import read_json
from saehook.sae import QUANTILE_LEVELS, SAE, LatentStats
from saehook.site_spellings import transformerlens_name

logger = logging.getLogger(__name__)

SCHEMA = 1
CONFIG, WEIGHTS, STATS = "cfg.json", "sae_weights.safetensors", "stats.safetensors"
SPARSITY = "sparsity.safetensors"
"""Of SAELens: `sparsity` [d_sae], log10 of the share of tokens on which a latent fired, plus 1e-10."""
SAELENS_VERSION = "6.54.12"
"""The version of SAELens whose layout this is; it reads the field to choose its reader."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def save_sae(
    sae: SAE,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    write: Callable[[Path], None] | None = None,
) -> Path:
    """Write an SAE into the folder `path`; files of the same name there are replaced, each at once.

    Args:
        dtype: of the weights in the file (float32, bfloat16, float16); None: the SAE's. `threshold` is always float32.
        write: writes the file of the weights, of an SAE that this process has not whole (`distributed.sharded_sae`).

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
    if write is None:
        tensors = _tensors(sae, dtype)
        write = lambda file: save_file(tensors, file)  # noqa: E731
    config: dict[str, Any] = {
        "architecture": _architecture(sae.config),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": names[dtype],
        "device": "cpu",
        "apply_b_dec_to_input": sae.config.subtract_b_dec,
        "normalize_activations": _normalize(sae.config),
        "reshape_activations": "none",
    }
    if isinstance(activation, (TopK, AbsTopK, GroupMax)):
        config |= {"k": activation.k, "rescale_acts_by_decoder_norm": False}
    if sae.is_transcoder:
        config["d_out"] = sae.d_out
    config["metadata"] = {
        **sae.metadata.get("saelens", {}),
        "sae_lens_version": SAELENS_VERSION,
        "training_architecture": activation_to_dict(activation)["name"],
        "hf_hook_name": sae.site,
        **({"hf_hook_name_out": sae.site_out} if sae.is_transcoder else {}),
        **{key: name for key, name in _hooks(sae).items() if name is not None},
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
        write(partial)
    if sae.stats is not None:
        facts = {name: getattr(sae.stats, name) for name in (*_STATS, *_LATER_STATS)}
        stats = {name: x.detach().float().cpu().contiguous() for name, x in facts.items() if x is not None}
        if "quantiles" in stats:
            stats["quantile_levels"] = torch.tensor(QUANTILE_LEVELS)
        with atomically(path / STATS) as partial:
            save_file(stats, partial, metadata={"tokens": str(sae.stats.tokens)})
    else:
        (path / STATS).unlink(missing_ok=True)
    if sae.density is not None:
        with atomically(path / SPARSITY) as partial:
            save_file({"sparsity": (sae.density.detach().float().cpu() + 1e-10).log10()}, partial)
    else:
        (path / SPARSITY).unlink(missing_ok=True)
    atomic_write(path / CONFIG, text)
    return path


def _tensors(sae: SAE, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the file of the weights holds.

    Raises:
        ArgumentError: NaN or infinity.
    """
    tensors = {name: getattr(sae, name).detach().to("cpu", dtype).contiguous() for name in _WEIGHTS}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.detach().to("cpu", dtype).contiguous()
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold.detach().float().cpu().expand(sae.d_sae).contiguous()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArgumentError(f"{name} holds NaN or infinity in {dtype}; the SAE is not written.")
    return tensors


_WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec")
_STATS = ("max_act", "density", "mean_act")
_LATER_STATS = ("quantiles", "mean_error")
"""What older files do not have."""
_OURS = {"schema", "activation", "site", "site_out", "mask_rule", "saelens"}
"""What stands under `metadata.saehook` and is no metadata of the SAE."""


def _architecture(config: SAEConfig) -> str:
    kind = JumpReLU if isinstance(config.activation, BatchTopK) else type(config.activation)
    if config.d_out is None:
        return next(name for name, known in saelens.ARCHITECTURES.items() if known is kind)
    known = (kind, config.skip)
    found = next((name for name, value in saelens.TRANSCODERS.items() if value == known), None)
    if found is None:
        raise ArgumentError(f"a transcoder with {config.activation} has no name in the layout of SAELens.")
    return found


def _hooks(sae: SAE) -> dict[str, str | None]:
    """TransformerLens' names of the sites, by which SAELens attaches."""
    out = {"hook_name_out": transformerlens_name(sae.site_out)} if sae.is_transcoder else {}
    return {"hook_name": transformerlens_name(sae.site), **out}


def _normalize(config: SAEConfig) -> str:
    return next(name for name, ours in saelens.NORMALIZATIONS.items() if ours == config.normalize)


def file_hashes(sae: SAE) -> dict[str, str]:
    """sha256 of the files that an SAE was read from, by name; none for one made in Python, or whose files are gone."""
    if sae.source is None:
        return {}
    if sae.source.is_file():
        return {sae.source.name: sha256(sae.source)}
    return {name: sha256(sae.source / name) for name in (CONFIG, WEIGHTS, STATS) if (sae.source / name).is_file()}


@overload
def load_sae(
    path: str | Path,
    sub: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
    revision: str | None = None,
    k: int | None = None,
    input_scale: float | None = None,
    rows: None = None,
) -> SAE: ...
@overload
def load_sae(
    path: str | Path,
    sub: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
    revision: str | None = None,
    k: int | None = None,
    input_scale: float | None = None,
    rows: Iterable[int],
) -> Tensor: ...
def load_sae(
    path: str | Path,
    sub: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    mapped: bool = False,
    revision: str | None = None,
    k: int | None = None,
    input_scale: float | None = None,
    rows: Iterable[int] | None = None,
) -> SAE | Tensor:
    """Read an SAE in any format of `saehook.formats`, ours among them, which is found by looking at the files.

    `sae.site`, `sae.metadata["lm"]` and `sae.metadata["source"]` hold what the files and their place say. Weights that are
    stored in `dtype` and as we have them stay a map of the file: nothing is copied until something is written.

    Args:
        path: a folder or file of weights, or `owner/name` on the hub, also `hf:owner/name[,revision=..]`.
        sub: folder or file in it, where it holds several SAEs: `layer_12/width_16k/average_l0_82`, `layers.10`.
        dtype: of the weights, whatever the file's is; `threshold` is float32.
        mapped: leave the weights in the file, in its dtype, and read only what is used: of the decoder the rows of steered
            latents. On the CPU, whatever `dtype` says; what is read is then checked when it is used. The file must not be
            overwritten in place meanwhile (`save_sae` puts a new one there).
        revision: branch, tag or commit on the hub.
        k: latents per token, for a TopK whose files do not say it.
        input_scale: what x was multiplied by in training, for SAEs whose files say only that it was; it is folded.
        rows: read only these rows of the decoder, the directions of these latents, and return them, [len(rows), d_out].

    Raises:
        ArgumentError: `mapped`, and another device than the CPU.
        FileError: nothing is there, or several SAEs are; they are named.
        FormatError: damaged, unsafe, of an unknown format, or contradicting itself; the message says what was expected.
    """
    if mapped and device is not None and torch.device(device).type != "cpu":
        raise ArgumentError(
            f"mapped=True leaves the weights in the file, so they cannot be on {device}. Leave one out."
        )
    known = {"k": k, "input_scale": input_scale}
    found, tensors = read_sae(path, sub, revision=revision, rows=rows, known=known, check=not mapped)
    if rows is not None:
        return tensors["W_dec"].to(device or "cpu", dtype)
    ours, foreign = _own_metadata(found)
    sae = SAE(
        found.config,
        site=found.site,
        site_out=found.site_out,
        device="meta",
        dtype=_dtype(tensors, found, mapped, dtype),
    )
    sae.mapped = mapped
    # Not resolved where it is a file: in the hub's cache that is a link, and its place says what it is.
    sae.source = found.path.parent.resolve() if found.format == "saelens" else found.path.absolute()
    if sae.threshold is not None and "threshold" not in tensors:
        sae.register_parameter("threshold", None)
    for name, tensor in tensors.items():
        if not mapped or tensor.ndim < 2:
            tensor = tensor.to(device or "cpu", torch.float32 if name == "threshold" else sae.dtype)
            tensor = tensor if name == "W_enc" else tensor.contiguous()
        setattr(sae, name, nn.Parameter(tensor, requires_grad=not mapped))
    folder = found.path.parent
    if found.format == "saelens" and (folder / STATS).exists():
        sae.stats = _read_stats(folder / STATS, sae.d_sae, sae.d_out)
    if found.format == "saelens" and (folder / SPARSITY).exists():
        log_density = _read_tensors(folder / SPARSITY, {"sparsity": (sae.d_sae,)})["sparsity"]
        sae.density = (10.0 ** log_density.float() - 1e-10).clamp_(0.0, 1.0)
    if "mask_rule" in ours:
        try:
            sae.mask_rule = mask_rule_from_data(ours["mask_rule"])
        except FormatError as error:
            raise FormatError(f"{folder / CONFIG}: {error}") from None
    sae.metadata = {key: value for key, value in ours.items() if key not in _OURS}
    if foreign:
        sae.metadata["saelens"] = foreign
    if not ours:
        if found.lm is not None:
            sae.metadata["lm"] = {"id": found.lm, "revision": None}
        sae.metadata["source"] = found.provenance.to_dict()
        for note in found.notes:
            logger.warning("%s: %s.", found.path, note)
    return sae


def _dtype(tensors: dict[str, Tensor], found: Found, mapped: bool, dtype: torch.dtype) -> torch.dtype:
    """Of the weights: that of the file where they stay there."""
    if not mapped:
        return dtype
    if len({tensors[name].dtype for name in ("W_enc", "W_dec")}) > 1 or tensors["W_enc"].dtype != found.dtype:
        raise ArgumentError(
            f"mapped=True leaves the weights in {found.path}, and something has to be folded into them. Leave it out."
        )
    return found.dtype


def _own_metadata(found: Found) -> tuple[dict[str, Any], dict[str, Any]]:
    """What we wrote beside the layout of SAELens, and what else stands in its metadata."""
    if found.format != "saelens":
        return {}, {}
    path = found.path.parent / CONFIG
    metadata = read_json(path).get("metadata") if path.is_file() else None
    metadata = metadata if isinstance(metadata, dict) else {}
    ours = metadata.get("saehook")
    ours = dict(ours) if isinstance(ours, dict) else {}
    if ours.get("schema", SCHEMA) != SCHEMA:
        raise FormatError(f"{path} has schema {ours['schema']!r}; this version reads {SCHEMA}. Update saehook.")
    known = {"saehook", "sae_lens_version", "training_architecture", "hf_hook_name", "hf_hook_name_out"}
    known |= {"hook_name", "hook_name_out"} if ours else set()
    return ours, {key: value for key, value in metadata.items() if key not in known}


def _read_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], optional: dict[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """The tensors of a safetensors file, those of `shapes` and maybe of `optional`, finite and of a float dtype."""
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
        if not torch.isfinite(tensor).all():
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
    return DTYPES.get(read_json(Path(path) / CONFIG).get("dtype", "float32"), torch.float32)
