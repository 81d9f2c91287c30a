"""dictionary_learning: `trainer_i/ae.pt`, a state dict, and `config.json` with `trainer` (dict_class, k, layer, lm_name, ..) and
`buffer`; `checkpoints/ae_STEP.pt` below; a backup holds the state dict as `ae`, with the factor its data was divided by.

| dict_class | tensors | b_dec subtracted | rule |
|---|---|---|---|
| AutoEncoder | encoder.weight [d_sae, d_in], encoder.bias, decoder.weight [d_in, d_sae], bias | yes | ReLU |
| AutoEncoderNew | encoder.*, decoder.weight, decoder.bias | no | ReLU |
| GatedAutoEncoder | encoder.weight, decoder.weight, decoder_bias, r_mag, mag_bias, gate_bias | yes | gated |
| AutoEncoderTopK | encoder.*, decoder.weight, b_dec, k (), threshold () | yes | the k largest, whatever the threshold |
| BatchTopKSAE | the same | yes | threshold |
| MatryoshkaBatchTopKSAE | W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec, k, threshold, group_sizes | yes | threshold |
| JumpReluAutoEncoder | W_enc, b_enc, W_dec, b_dec, threshold [d_sae] | no | threshold |

The weights are read as they stand; `from_pretrained` of an AutoEncoder scales its decoder rows to norm 1 besides.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saehook.config import Activation, BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from saehook.errors import ArgumentError, FormatError
from saehook.formats.folder import Files
from saehook.formats.folding import fold_data_scale, fold_gated
from saehook.formats.found import Contents, Provenance

LINEAR = {"encoder.weight", "encoder.bias", "decoder.weight"}
PLAIN = {"W_enc", "b_enc", "W_dec", "b_dec"}
CLASSES = {
    "AutoEncoder": LINEAR | {"bias"},
    "AutoEncoderNew": LINEAR | {"decoder.bias"},
    "GatedAutoEncoder": {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "mag_bias", "gate_bias"},
    "AutoEncoderTopK": LINEAR | {"b_dec"},
    "BatchTopKSAE": LINEAR | {"b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": PLAIN | {"k", "threshold", "group_sizes"},
    "JumpReluAutoEncoder": PLAIN | {"threshold"},
}
"""What a state dict of each class must hold; an AutoEncoderTopK has k in most versions, in later ones a threshold, too."""
OPTIONAL = {"AutoEncoderTopK": {"k", "threshold"}}
B_DEC = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
NOT_SUBTRACTED = {"AutoEncoderNew", "JumpReluAutoEncoder"}
BACKUP = {"step", "ae", "optimizer", "config", "norm_factor"}


def _state(files: Files) -> dict[str, Any]:
    inner = files.entries.get("ae")
    return inner if isinstance(inner, dict) else files.entries


def _classes(names: set[str]) -> list[str]:
    """Classes that such a state dict may be of."""
    return [name for name, needed in CLASSES.items() if needed <= names <= needed | OPTIONAL.get(name, set())]


def matches(files: Files) -> bool:
    """The names of one of the classes, alone or as `ae` of a backup; in a torch file, or with its configuration."""
    return (files.kind == "torch" or files.config("trainer") is not None) and bool(_classes(set(_state(files))))


def read(files: Files) -> Contents:
    """See `saehook.formats`."""
    factor, trainer = None, _trainer(files)
    if "ae" in files.entries:
        factor, step = files.number("norm_factor"), files.number("step")
        if not trainer and isinstance(files.entries.get("config"), dict):
            trainer = files.entries["config"]
        if unknown := files.names - BACKUP:
            raise FormatError(f"{files.path}: {', '.join(sorted(unknown))} is unknown in a backup.")
        notes = [f"a backup of step {int(step or 0):,}"]
        files.descend("ae")
    else:
        notes = []
    kind = _class(files, trainer)
    files.expect(CLASSES[kind], OPTIONAL.get(kind, []))
    tensors = _tensors(files, kind)
    d_sae = len(tensors["b_enc"])
    threshold = files.number("threshold") if kind not in ("JumpReluAutoEncoder", "AutoEncoderTopK") else None
    if threshold is not None:
        tensors["threshold"] = files.tensor("threshold").float().expand(d_sae)
        if threshold < 0:
            notes.append(
                f"its threshold is {threshold:g}: its trainer had set none yet, and every positive latent is kept, far more "
                "than k. Set one: sae.set_threshold(value)"
            )
    if factor is not None:
        notes.append(f"its data was divided by {factor:g}, which is folded")
        sign_kept = threshold is not None and threshold < 0
        scaled = fold_data_scale({n: t for n, t in tensors.items() if not (sign_kept and n == "threshold")}, factor)
        tensors = tensors | scaled
    try:
        config = SAEConfig(
            d_in=len(tensors["b_dec"]),
            d_sae=d_sae,
            activation=_activation(files, kind, trainer),
            subtract_b_dec=kind not in NOT_SUBTRACTED,
        )
    except (ArgumentError, IndexError) as error:
        raise FormatError(f"{files.path}: {error}") from None
    _check(files, trainer, config)
    return Contents(config, tensors, _provenance(trainer, files.config("trainer") or {}, notes))


def _trainer(files: Files) -> dict[str, Any]:
    data = files.config("trainer")
    if data is None:
        return {}
    if not isinstance(data["trainer"], dict):
        raise FormatError(f"{files.config_path('trainer')}: trainer is {data['trainer']!r}; an object is expected.")
    return data["trainer"]


def _class(files: Files, trainer: dict[str, Any]) -> str:
    """The class that the configuration names and the tensors fit, else the one that the tensors alone tell."""
    possible = _classes(files.names)
    said = trainer.get("dict_class")
    if said is not None and said not in CLASSES:
        raise FormatError(
            f"{files.config_path('trainer')}: dict_class {said!r} is unknown; {', '.join(CLASSES)} are read."
        )
    if said is not None and said not in possible:
        files.expect(CLASSES[said])
    if said is not None:
        return said
    if len(possible) > 1:
        raise FormatError(
            f"{files.path} may be of {' or '.join(possible)}, which treat the same tensors differently; config.json, whose "
            "trainer.dict_class says which, is missing beside it and one folder up."
        )
    return possible[0]


def _tensors(files: Files, kind: str) -> dict[str, Tensor]:
    if CLASSES[kind] >= PLAIN:
        tensors = {name: files.tensor(name) for name in ("W_enc", "b_enc", "b_dec")}
        tensors["W_dec"] = files.decoder(files.tensor("W_dec"))
        if kind == "JumpReluAutoEncoder":
            tensors["threshold"] = files.tensor("threshold")
        return tensors
    tensors = {
        "W_enc": files.tensor("encoder.weight").T,
        "W_dec": files.decoder(files.tensor("decoder.weight").T),
        "b_dec": files.tensor(B_DEC.get(kind, "b_dec")),
    }
    if kind == "GatedAutoEncoder":
        return fold_gated(tensors, *(files.tensor(name) for name in ("gate_bias", "mag_bias", "r_mag")))
    return tensors | {"b_enc": files.tensor("encoder.bias")}


def _activation(files: Files, kind: str, trainer: dict[str, Any]) -> Activation:
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ReLU()
    if kind in ("GatedAutoEncoder", "JumpReluAutoEncoder"):
        return JumpReLU()
    k = files.known.get("k") if "k" not in files.names else files.number("k")
    k = trainer.get("k") if k is None else k
    if isinstance(k, bool) or not isinstance(k, (int, float)) or k != int(k):
        raise FormatError(f"{files.path}: k is {k!r}; a whole number is expected, there or in config.json. Give k=.")
    said = trainer.get("k", k)
    if said != k:
        raise FormatError(f"{files.config_path('trainer')} says k = {said}, and {files.path.name} holds k = {k}.")
    return TopK(k=int(k)) if kind == "AutoEncoderTopK" else BatchTopK(k=int(k))


def _check(files: Files, trainer: dict[str, Any], config: SAEConfig) -> None:
    for name, value in (("activation_dim", config.d_in), ("dict_size", config.d_sae)):
        if trainer.get(name, value) != value:
            raise FormatError(
                f"{files.config_path('trainer')} says {name} = {trainer[name]!r}, and the tensors have {value}: the two files "
                "do not belong together, or the matrix is transposed."
            )


def _provenance(trainer: dict[str, Any], data: dict[str, Any], notes: list[str]) -> Provenance:
    layer, site = trainer.get("layer"), trainer.get("submodule_name")
    if not isinstance(site, str) and isinstance(layer, int):
        site = f"resid_post_layer_{layer}"
        notes.append(f"only its layer, {layer}, is recorded; its site is taken to be the output of that layer")
    lm = trainer.get("lm_name")
    return Provenance(
        format="dictionary_learning",
        peer_site=site if isinstance(site, str) else None,
        lm=lm if isinstance(lm, str) else None,
        config=data or ({"trainer": trainer} if trainer else {}),
        unknown=tuple(sorted(set(data) - {"trainer", "buffer"})),
        notes=tuple(notes),
    )
