"""Language models and their tokenizers from a hub id or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from saehook.errors import FormatError
from saehook.model_input import takes_text

_WHERE = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
"""Arguments of `from_pretrained` that config and tokenizer take like the model."""


def check_holds_model(name: str) -> None:
    """Raises FormatError where `name` is a folder without a Hugging Face model; anything else may be a hub id."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FormatError(
            f"the folder {name} holds no Hugging Face model (no config.json). Name the folder that has it, or a hub id."
        )


def model_class(name: str, config: Any = None, **where: Any) -> Any:
    """What loads the model: `AutoModelForCausalLM`, or the class that the config names where that one generates no text.

    An encoder, a classifier or a model without head would get a random language-model head otherwise.
    """
    import transformers

    config = config or transformers.AutoConfig.from_pretrained(name, **where)
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if named is not None and not named.can_generate():
        return named
    return transformers.AutoModelForCausalLM


def load_lm(
    name: str, tokenizer: Any, device: str | torch.device | None, dtype: Any, hf_arguments: dict[str, Any]
) -> tuple[Any, Any]:
    """The model and its tokenizer; `tokenizer` itself where one is given. Arguments as of `HookedModel.from_pretrained`."""
    from transformers import AutoTokenizer

    check_holds_model(name)
    if device is None and "device_map" not in hf_arguments:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float32 if device is not None and torch.device(device).type == "cpu" else "auto"
    where = {key: value for key, value in hf_arguments.items() if key in _WHERE}
    loaded: Any = model_class(name, hf_arguments.get("config"), **where).from_pretrained(
        name, dtype=dtype, **hf_arguments
    )
    if device is not None:
        loaded = loaded.to(device)
    if tokenizer is None and takes_text(loaded):
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    return loaded, tokenizer
