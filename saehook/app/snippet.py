"""Python, and a line for the shell, that repeat what the page did."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping

from saehook.app.sampling import Sampling
from saehook.hooked_saes import HookedSAEs
from saehook.interventions import AnyEdit, Edit, Program
from saehook.where import EVERYWHERE, Where, generation, prompt

CALLS = {
    "add": "steer",
    "set": "clamp",
    "scale": "scale",
    "ablate": "ablate",
    "min": "at_least",
    "max": "at_most",
    "mean": "to_mean",
    "resample": "resample",
    "swap": "swap",
    "keep_only": "keep_only",
}


def python_for(
    hooked: HookedSAEs,
    text: str,
    program: Program,
    sampling: Sampling,
    sae_paths: Mapping[str, str],
    chat: bool = False,
) -> str:
    """A script that loads the model and the SAEs and writes the edited lane once more; `chat`: the text is a message."""
    edits = [edit_code(edit) for edit in program.edits]
    plain = not program.parallel and program.norm is None and None not in edits
    calls = sorted({CALLS[edit.op] for edit in program.edits if isinstance(edit, Edit)}) if plain else []
    lines = ["import saehook", *([f"from saehook import {', '.join(calls)}"] if calls else []), ""]
    lines.append(f"model = saehook.HookedModel.from_pretrained({hooked.model.model_id!r})")
    lines.append("hooked = model.attach({")
    for site in hooked.sites:
        lines.append(f"    {site!r}: saehook.load_sae({sae_paths.get(site, 'path/to/sae')!r}),")
    lines.append("})")
    if not plain:
        lines.append(f'program = saehook.Program.from_json(r"""{program.to_json()}""")')
    lines += ["generation = hooked.generate(", f"    {[{'role': 'user', 'content': text}] if chat else text!r},"]
    if not plain:
        lines.append("    edits=program,")
    elif edits:
        lines += ["    edits=[", *(f"        {code}," for code in edits), "    ],"]
    if plain and program.splice:
        lines.append("    splice=True,")
    if plain and program.error is not None:
        lines.append(f"    error={program.error!r},")
    lines += [f"    {name}={value!r}," for name, value in sampling.arguments().items()]
    return "\n".join([*lines, ")", "print(generation.text)", "print(generation.report)", ""])


def shell_for(
    hooked: HookedSAEs,
    text: str,
    program: Program,
    sampling: Sampling,
    sae_paths: Mapping[str, str],
    chat: bool = False,
) -> str:
    """The same for a shell: the program as a file, and the command that runs it."""
    words = ["saehook", "generate", text, *(["--chat"] if chat else [])]
    if sae_paths:
        words += ["--lm", str(hooked.model.model_id)]
        words += ["--sae", *(sae_paths[site] for site in hooked.sites if site in sae_paths)]
    words += ["--edits", "program.json", "--max-new-tokens", str(sampling.new_tokens)]
    if sampling.sample:
        words += ["--temperature", f"{sampling.temperature:g}", "--seed", str(sampling.seed)]
        words += ["--top-p", f"{sampling.top_p:g}"] if sampling.top_p < 1 else []
    return f"cat > program.json <<'END'\n{program.to_json()}\nEND\n{shlex.join(words)}\n"


def edit_code(edit: AnyEdit) -> str | None:
    """One edit as the call that makes it; None where its JSON says it better."""
    if not isinstance(edit, Edit) or edit.when is not None or edit.unit == "kl":
        return None
    several = edit.op != "swap" and len(edit.latents) > 1
    arguments = [repr(list(edit.latents))] if several else [repr(latent) for latent in edit.latents]
    if edit.value is not None:
        arguments.append(f"{edit.value:g}" if float(f"{edit.value:g}") == edit.value else repr(edit.value))
    if edit.source is not None:
        arguments.append(repr(edit.source))
    if edit.unit != "raw":
        arguments.append(f"unit={edit.unit!r}")
    for name, default in (("site", None), ("active_only", False), ("mode", "decoder")):
        if getattr(edit, name) != default:
            arguments.append(f"{name}={getattr(edit, name)!r}")
    if edit.where != EVERYWHERE:
        arguments.append(f"where={_where_code(edit.where)}")
    if edit.schedule is not None:
        arguments.append(f"schedule=saehook.{edit.schedule!r}")
    return f"{CALLS[edit.op]}({', '.join(arguments)})"


def _where_code(where: Where) -> str:
    if where == Where(tokens=where.tokens) and where.tokens is not None:
        return f"saehook.tokens({', '.join(map(str, where.tokens))})"
    if where in (prompt(), generation()):
        return "saehook.prompt()" if where.prompt else "saehook.generation()"
    given = {f.name: getattr(where, f.name) for f in dataclasses.fields(where)}
    changed = [f"{name}={value!r}" for name, value in given.items() if value != getattr(EVERYWHERE, name)]
    return f"saehook.Where({', '.join(changed)})"
