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
    from saehook.config import BatchTopK as BatchTopK
    from saehook.config import JumpReLU as JumpReLU
    from saehook.config import ReLU as ReLU
    from saehook.config import SAEConfig as SAEConfig
    from saehook.config import TopK as TopK
    from saehook.config import TrainConfig as TrainConfig
    from saehook.errors import SaehookError as SaehookError
    from saehook.evaluation import evaluate as evaluate
    from saehook.hooked_model import HookedModel as HookedModel
    from saehook.interventions import Edit as Edit
    from saehook.interventions import Program as Program
    from saehook.interventions import ablate as ablate
    from saehook.interventions import clamp as clamp
    from saehook.interventions import generation as generation
    from saehook.interventions import prompt as prompt
    from saehook.interventions import scale as scale
    from saehook.interventions import set_ as set_
    from saehook.interventions import steer as steer
    from saehook.interventions import tokens as tokens
    from saehook.sae import SAE as SAE
    from saehook.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOME = {
    "BatchTopK": "config",
    "Edit": "interventions",
    "HookedModel": "hooked_model",
    "JumpReLU": "config",
    "Program": "interventions",
    "ReLU": "config",
    "SAE": "sae",
    "SAEConfig": "config",
    "SaehookError": "errors",
    "TopK": "config",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "ablate": "interventions",
    "bundled": "bundle",
    "clamp": "interventions",
    "evaluate": "evaluation",
    "generation": "interventions",
    "load_sae": "checkpoint",
    "prompt": "interventions",
    "save_sae": "checkpoint",
    "scale": "interventions",
    "set_": "interventions",
    "steer": "interventions",
    "tokens": "interventions",
}

__all__ = [
    "SAE",
    "BatchTopK",
    "Edit",
    "HookedModel",
    "JumpReLU",
    "Program",
    "ReLU",
    "SAEConfig",
    "SaehookError",
    "TopK",
    "TrainConfig",
    "Trainer",
    "ablate",
    "bundled",
    "clamp",
    "evaluate",
    "generation",
    "load_sae",
    "prompt",
    "save_sae",
    "scale",
    "set_",
    "steer",
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
