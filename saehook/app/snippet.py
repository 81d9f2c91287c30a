"""Python that repeats what the page did."""

from __future__ import annotations

from collections.abc import Mapping

from saehook.app.sampling import Sampling
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import Edit, Program
from saehook.where import EVERYWHERE, Where

CALLS = {"add": "steer", "set": "clamp", "scale": "scale", "ablate": "ablate"}


def snippet(hooked: HookedSAEs, prompt: str, program: Program, sampling: Sampling, sae_paths: Mapping[str, str]) -> str:
    """A script that loads the model and the SAEs and writes the edited lane once more."""
    edits = [edit for edit in program.edits if isinstance(edit, Edit)]  # the page's rows make no others
    calls = sorted({CALLS[edit.op] for edit in edits})
    lines = ["import saehook", *([f"from saehook import {', '.join(calls)}"] if calls else []), ""]
    lines.append(f"model = saehook.HookedModel.from_pretrained({hooked.model.model_id!r})")
    lines.append("hooked = model.attach({")
    for site in hooked.sites:
        lines.append(f"    {site!r}: saehook.load_sae({sae_paths.get(site, 'path/to/sae')!r}),")
    lines += ["})", "generation = hooked.generate(", f"    {prompt!r},"]
    if edits:
        lines += ["    edits=[", *(f"        {edit_code(edit)}," for edit in edits), "    ],"]
    if program.error is not None:
        lines.append(f"    error={program.error!r},")
    lines += [f"    {name}={value!r}," for name, value in sampling.arguments().items()]
    return "\n".join([*lines, ")", "print(generation.text)", "print(generation.report)", ""])


def edit_code(edit: Edit) -> str:
    """One edit as the call that makes it."""
    arguments = [repr(edit.latents[0] if len(edit.latents) == 1 else list(edit.latents))]
    if edit.value is not None:
        arguments.append(f"{edit.value:g}" if float(f"{edit.value:g}") == edit.value else repr(edit.value))
    if edit.unit != "raw":
        arguments.append(f"unit={edit.unit!r}")
    if edit.site is not None:
        arguments.append(f"site={edit.site!r}")
    if edit.where != EVERYWHERE:
        arguments.append(f"where={_where_code(edit.where)}")
    return f"{CALLS[edit.op]}({', '.join(arguments)})"


def _where_code(where: Where) -> str:
    if where.tokens is not None:
        return f"saehook.tokens({', '.join(map(str, where.tokens))})"
    return "saehook.prompt()" if where.prompt else "saehook.generation()"
