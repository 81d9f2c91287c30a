"""What is needed to measure the same numbers again, as plain data: versions, language model, SAEs, text."""

from __future__ import annotations

import contextlib
import hashlib
import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saehook.activation_cache import weights_fingerprint
from saehook.checkpoint import file_hashes
from saehook.config import activation_to_dict
from saehook.errors import ArgumentError
from saehook.tokenization import Windows, tokenizer_sha256

if TYPE_CHECKING:
    from saehook.hooked_saes import HookedSAEs

PACKAGES = ("saehook", "torch", "transformers", "nnsight")


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def lm_facts(hooked: HookedSAEs) -> dict[str, Any]:
    """Which language model it is: by its commit on the hub, else by the sha256 of its weights; None where neither is known."""
    revision = getattr(hooked.lm.config, "_commit_hash", None)
    weights = None
    if revision is None:
        with contextlib.suppress(ArgumentError):  # weights that are not in memory
            weights = weights_fingerprint(hooked.lm)
    return {
        "id": hooked.model.name,
        "revision": revision,
        "weights_sha256": weights,
        "dtype": str(hooked.lm.dtype).removeprefix("torch."),
        "device": hooked.model.device.type,
        "tokenizer_sha256": tokenizer_sha256(hooked.tokenizer),
    }


def sae_facts(hooked: HookedSAEs, *, checked: bool) -> dict[str, dict[str, Any]]:
    """Which SAEs these are, by name; `files` are hashes of what they were read from, empty for one made in Python. `checked`:
    their fingerprints were compared."""
    fits = "fits" if checked else "not checked"
    return {
        name: {
            "site": hooked.attached[name].reads,
            "site_out": hooked.attached[name].writes,
            "d_sae": sae.d_sae,
            "activation": activation_to_dict(sae.config.activation),
            "dtype": str(sae.dtype).removeprefix("torch."),
            "mask_rule": str(sae.mask_rule),
            "fingerprint": fits if sae.metadata.get("fingerprint") else "none in the file",
            "files": file_hashes(sae),
        }
        for name, sae in hooked.saes.items()
    }


def text_facts(tokens: Windows | Tensor) -> dict[str, Any]:
    """Which text it is: the ids themselves, and where they come from if that is known."""
    ids = tokens.ids if isinstance(tokens, Windows) else tokens
    digest = hashlib.sha256(ids.long().cpu().contiguous().numpy().tobytes()).hexdigest()
    facts: dict[str, Any] = {"ids": ids.numel(), "ids_sha256": digest, "windows": len(ids), "window": ids.shape[1]}
    if not isinstance(tokens, Windows):
        return facts
    facts |= {"sha256": tokens.text_sha256, "documents": tokens.documents, "dropped_tail": tokens.dropped_tail}
    facts |= tokens.rule
    return facts | ({"dataset": tokens.dataset} if tokens.dataset else {})
