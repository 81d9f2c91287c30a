"""What llama_cpp.safetensors is recorded from, and the test compares with: a model, SAEs, programs and a text."""

from __future__ import annotations

from typing import Any

from builders import build_lm, byte_tokenizer, random_ids, tiny_sae

from saehook.edits import steer
from saehook.hooked_model import HookedModel
from saehook.interventions import Program
from saehook.where import Where

SITES = ("layers.1.resid_post", "layers.2.mlp_out")
IDS = random_ids(20, bos=True)
ALL = Where(special=True)
PROGRAMS = {
    "clean": Program(),
    "one": Program(edits=[steer([3, 5], 2.0, unit="max", site=SITES[0], where=ALL)]),
    "last": Program(edits=[steer(7, -3.0, site=SITES[1], where=ALL)]),
    "both": Program(edits=[steer(3, 2.5, site=SITES[0], where=ALL), steer([8, 9], 1.5, site=SITES[1], where=ALL)]),
}


def hooked() -> Any:
    """The tiny Llama with both SAEs."""
    model = HookedModel(build_lm("llama"), byte_tokenizer())
    return model.attach({site: tiny_sae(site=site, seed=i) for i, site in enumerate(SITES)})
