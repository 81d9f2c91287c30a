"""Whether an SAE fits a language model: its site is there, once, and as wide. From configurations alone; no weight is read."""

from __future__ import annotations

from typing import Any

import torch

from saehook.errors import FormatError, SiteError
from saehook.formats import Found
from saehook.lm_loading import check_holds_model, model_class
from saehook.sites import resolve


def skeleton(name: str) -> Any:
    """The Hugging Face model of a folder or hub id with its modules and without its weights.

    Raises:
        FormatError: a folder that holds no model.
    """
    from transformers import AutoConfig

    check_holds_model(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except ValueError as error:
        raise FormatError(f"{name} is no Hugging Face model: {str(error).splitlines()[0]}") from None
    kind = model_class(name, config)
    make = getattr(kind, "from_config", None) or kind._from_config
    with torch.device("meta"):
        return make(config)


def misfits(found: Found, lm: Any) -> list[str]:
    """Why an SAE cannot be attached to a model, a sentence each; empty where it can.

    Args:
        found: what `formats.identify` says of it.
        lm: the model, `skeleton(name)` will do.
    """
    problems = []
    config = found.config
    pairs = [(found.site, config.d_in, "reads")]
    if config.d_out is not None:
        pairs.append((found.site_out, config.d_out, "writes"))
    for site, width, what in pairs:
        if site is None:
            problems.append(f"which site it {what} is not known; name it in attach()")
            continue
        try:
            places = resolve(lm, site)
        except SiteError as error:
            problems.append(str(error))
            continue
        if len(places) != 1:
            problems.append(f"{site!r} names {len(places)} sites")
        elif places[0].width not in (None, width):
            problems.append(f"it {what} {width} values a token, and {places[0].name} has {places[0].width}")
    return problems
