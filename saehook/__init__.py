"""saehook: train sparse autoencoders, attach them to named sites of a language model, edit what it does.

Names load on first use: `import saehook` imports nothing heavy, not even torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saehook.bundle import bundled as bundled
    from saehook.checkpoint import load_sae as load_sae
    from saehook.checkpoint import save_sae as save_sae
    from saehook.conditions import latent as latent
    from saehook.config import AbsTopK as AbsTopK
    from saehook.config import BatchTopK as BatchTopK
    from saehook.config import GroupMax as GroupMax
    from saehook.config import JumpReLU as JumpReLU
    from saehook.config import ReLU as ReLU
    from saehook.config import SAEConfig as SAEConfig
    from saehook.config import TopK as TopK
    from saehook.config import TrainConfig as TrainConfig
    from saehook.edits import ablate as ablate
    from saehook.edits import add_vector as add_vector
    from saehook.edits import at_least as at_least
    from saehook.edits import at_most as at_most
    from saehook.edits import cap_along as cap_along
    from saehook.edits import clamp as clamp
    from saehook.edits import keep_only as keep_only
    from saehook.edits import project_out as project_out
    from saehook.edits import resample as resample
    from saehook.edits import scale as scale
    from saehook.edits import set_ as set_
    from saehook.edits import steer as steer
    from saehook.edits import swap as swap
    from saehook.edits import to_mean as to_mean
    from saehook.errors import SaehookError as SaehookError
    from saehook.evaluation import evaluate as evaluate
    from saehook.formats import identify as identify
    from saehook.hooked_model import HookedModel as HookedModel
    from saehook.interventions import Edit as Edit
    from saehook.interventions import Program as Program
    from saehook.interventions import VectorEdit as VectorEdit
    from saehook.sae import SAE as SAE
    from saehook.schedules import Schedule as Schedule
    from saehook.trainer import Trainer as Trainer
    from saehook.where import Where as Where
    from saehook.where import generation as generation
    from saehook.where import matching as matching
    from saehook.where import prompt as prompt
    from saehook.where import roles as roles
    from saehook.where import span as span
    from saehook.where import token_ids as token_ids
    from saehook.where import tokens as tokens

__version__ = "0.1.0"

_HOME = {
    "AbsTopK": "config",
    "BatchTopK": "config",
    "Edit": "interventions",
    "GroupMax": "config",
    "HookedModel": "hooked_model",
    "JumpReLU": "config",
    "Program": "interventions",
    "ReLU": "config",
    "SAE": "sae",
    "SAEConfig": "config",
    "SaehookError": "errors",
    "Schedule": "schedules",
    "TopK": "config",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "VectorEdit": "interventions",
    "Where": "where",
    "ablate": "edits",
    "add_vector": "edits",
    "at_least": "edits",
    "at_most": "edits",
    "bundled": "bundle",
    "cap_along": "edits",
    "clamp": "edits",
    "evaluate": "evaluation",
    "generation": "where",
    "identify": "formats",
    "keep_only": "edits",
    "latent": "conditions",
    "load_sae": "checkpoint",
    "matching": "where",
    "project_out": "edits",
    "prompt": "where",
    "resample": "edits",
    "roles": "where",
    "save_sae": "checkpoint",
    "scale": "edits",
    "set_": "edits",
    "span": "where",
    "steer": "edits",
    "swap": "edits",
    "to_mean": "edits",
    "token_ids": "where",
    "tokens": "where",
}

__all__ = [
    "SAE",
    "AbsTopK",
    "BatchTopK",
    "Edit",
    "GroupMax",
    "HookedModel",
    "JumpReLU",
    "Program",
    "ReLU",
    "SAEConfig",
    "SaehookError",
    "Schedule",
    "TopK",
    "TrainConfig",
    "Trainer",
    "VectorEdit",
    "Where",
    "ablate",
    "add_vector",
    "at_least",
    "at_most",
    "bundled",
    "cap_along",
    "clamp",
    "evaluate",
    "generation",
    "identify",
    "keep_only",
    "latent",
    "load_sae",
    "matching",
    "project_out",
    "prompt",
    "resample",
    "roles",
    "save_sae",
    "scale",
    "set_",
    "span",
    "steer",
    "swap",
    "to_mean",
    "token_ids",
    "tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saehook' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"saehook.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
