"""Runs a program file again and says whether it still does the same; makes such files.

The replay vector is greedy: at each of a few new tokens the five likeliest with their log-probabilities. A replay feeds the
recorded tokens, so the numbers are comparable also where another token has become the likeliest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saehook import hub
from saehook.checkpoint import WEIGHTS, file_hashes
from saehook.errors import ArgumentError, FileError
from saehook.files import sha256
from saehook.interventions import AnyEdit, Program
from saehook.program_file import ModelRef, ProgramFile, ReplayVector, SAERef, write_program

if TYPE_CHECKING:
    from saehook.hooked_model import HookedModel
    from saehook.hooked_saes import HookedSAEs

NEW_TOKENS, TOP = 4, 5
TOLERANCE = {"float32": 1e-3, "float64": 1e-3}
HALF_TOLERANCE = 0.05
"""In nats; of float16 and bfloat16, where another order of the same sums shows."""


@dataclass(frozen=True)
class ReplayResult:
    """What `replay` found."""

    program_id: str
    differences: tuple[str, ...]
    """One sentence for each thing that is not as the file says: files, model, dtype, tokens, numbers. None: it is the same."""
    unchecked: tuple[str, ...]
    """What the file or the attached parts do not say, so that only the numbers speak for it."""
    max_delta: float
    """Largest |Δ log-probability| over the replay vector, nats."""
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def __str__(self) -> str:
        verdict = "same" if self.same else "drifted"
        lines = [
            f"{verdict}: program {self.program_id[:12]}, largest |Δ log-probability| {self.max_delta:.3g} "
            f"(at most {self.tolerance:g} is the same)"
        ]
        lines += [f"- {text}" for text in self.differences]
        lines += [f"- not checked: {text}" for text in self.unchecked]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Verdict, numbers and reasons."""
        return json.dumps({"same": self.same, **dataclasses.asdict(self)}, indent=1, allow_nan=False)


def program_file(
    hooked: HookedSAEs, program: Program | AnyEdit | Sequence[AnyEdit], *, prompt: str, tolerance: float | None = None
) -> ProgramFile:
    """A program with what it needs to be run again elsewhere; a site that edits leave out is written down.

    Args:
        prompt: what the replay vector continues; an edit that touches none of its tokens is warned of.
        tolerance: of the log-probabilities, in nats. Default: 1e-3 in float32, 0.05 in half precision.

    Raises:
        ArgumentError: no text as prompt, an SAE that comes from no file, a result that is not finite.
        FileError: an SAE whose file is gone. Those of `hooked.generate`.
    """
    if not isinstance(prompt, str) or not prompt:
        raise ArgumentError(f"prompt={prompt!r}; a text is expected, from which the replay vector is made.")
    program = _with_sites(hooked, Program.of(program))
    dtype = _dtype(hooked)
    limit = TOLERANCE.get(dtype, HALF_TOLERANCE) if tolerance is None else tolerance
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < float("inf"):
        raise ArgumentError(f"tolerance={tolerance!r}; a number above 0 is expected, in nats.")
    saes = tuple(_sae_ref(hooked, site) for site in _sites(hooked, program))
    recorder, result = _run(hooked, program, prompt, None)
    n_new = len(result.new_ids)
    top5 = []
    for log_probs in recorder.log_probs:
        values, ids = log_probs.topk(min(TOP, len(log_probs)))
        top5.append(tuple(zip(ids.tolist(), values.tolist(), strict=True)))
    if not all(torch.tensor(value).isfinite() for top in top5 for _, value in top):
        raise ArgumentError("the edited model gives NaN or infinity after this prompt, so there is nothing to replay.")
    vector = ReplayVector(
        prompt=prompt,
        ids=tuple(result.ids[:-n_new].tolist()),
        new_ids=tuple(result.new_ids.tolist()),
        top5=tuple(top5),
        dtype=dtype,
        tolerance=float(limit),
    )
    return ProgramFile(
        program=program, model=_model_ref(hooked.model), saes=saes, replay=vector, saehook=version("saehook")
    )


def save_program(
    hooked: HookedSAEs,
    program: Program | AnyEdit | Sequence[AnyEdit],
    path: str | Path,
    *,
    prompt: str,
    tolerance: float | None = None,
) -> ProgramFile:
    """Write `program_file(...)`, the thing to send to a colleague, to `path`.

    Raises:
        FileError: it cannot be written. Those of `program_file`.
    """
    file = program_file(hooked, program, prompt=prompt, tolerance=tolerance)
    write_program(file, path)
    return file


def replay(hooked: HookedSAEs, file: ProgramFile) -> ReplayResult:
    """Run the file's replay vector and compare it, and the files of model and SAEs, with what the file says.

    Raises:
        SiteError: no SAE is attached at a site of the program. Those of `hooked.generate`.
    """
    differences, unchecked = compare_files(hooked, file)
    vector = file.replay
    vocabulary = hooked.lm.get_input_embeddings().num_embeddings
    if (largest_id := max(*vector.ids, *vector.new_ids)) >= vocabulary:
        raise ArgumentError(
            f"the file's replay vector holds token {largest_id}, and the model has {vocabulary}: it was made for another "
            f"model, {file.model.id}. Attach to that one."
        )
    recorder, _ = _run(hooked, file.program, list(vector.ids), list(vector.new_ids))
    if (dtype := _dtype(hooked)) != vector.dtype:
        differences.append(f"the model runs in {dtype}, the file was made in {vector.dtype}.")
    ids = hooked.tokenizer(vector.prompt)["input_ids"]
    if list(ids) != list(vector.ids):
        differences.append(
            f"the tokenizer makes {_shortened(ids)} of the prompt, in the file {_shortened(vector.ids)}."
        )
    deltas = [
        (abs(float(now[token]) - value), i, token)
        for i, (now, top) in enumerate(zip(recorder.log_probs, vector.top5, strict=False))
        for token, value in top
        if token < len(now)
    ]
    finite = all(delta == delta and delta != float("inf") for delta, _, _ in deltas)
    if not finite or len(recorder.log_probs) < len(vector.top5):
        differences.append("the edited model does not give finite numbers for every token of the replay vector.")
    largest, step, token = max((d for d in deltas if d[0] < float("inf")), default=(0.0, 0, 0))
    if largest > vector.tolerance:
        differences.append(
            f"log-probabilities differ by up to {largest:.3g}, at token {token} after {step} new tokens; at most "
            f"{vector.tolerance:g} is the same."
        )
    first = next(
        (i for i, pair in enumerate(zip(recorder.best, vector.new_ids, strict=False)) if pair[0] != pair[1]), None
    )
    if first is not None and largest > vector.tolerance:
        differences.append(
            f"the likeliest new token {first} is {recorder.best[first]}, in the file {vector.new_ids[first]}."
        )
    return ReplayResult(file.id, tuple(differences), tuple(unchecked), largest, vector.tolerance)


def compare_files(hooked: HookedSAEs, file: ProgramFile) -> tuple[list[str], list[str]]:
    """(differences, what cannot be checked) of language model and SAEs, from their files; runs nothing.

    Raises:
        SiteError: no SAE is attached at a site of the program.
    """
    differences, unchecked = [], []
    here, there = _model_ref(hooked.model), file.model
    what = f"the language model {here.id}"
    for name in ("kind", "layers", "width"):
        if getattr(here, name) != getattr(there, name):
            differences.append(f"{what} has {name} {getattr(here, name)}, in the file {getattr(there, name)}.")
    if here.sha256 and there.sha256:
        differences += _hash_differences(here.sha256, there.sha256, what)
    elif here.revision and there.revision:
        if here.id != there.id or here.revision != there.revision:
            differences.append(f"{what} has revision {here.revision}, the file names {there.id}, {there.revision}.")
    else:
        unchecked.append(f"whether {what} has the weights of {there.id}: no hash or revision is known on both sides.")
    for ref in file.saes:
        site = hooked.resolve_site(ref.site)
        sae = hooked.saes[site]
        if sae.source is None:
            unchecked.append(f"the SAE at {site}, which was loaded from no file.")
            continue
        differences += _hash_differences(file_hashes(sae), ref.sha256, f"the SAE {sae.source.name} at {site}")
    return differences, unchecked


def _hash_differences(here: Mapping[str, str], there: Mapping[str, str], what: str) -> Iterator[str]:
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            seen = f"sha256 {here[name][:12]}" if name in here else "is missing"
            wanted = f"sha256 {there[name][:12]}" if name in there else "none"
            yield f"{name} of {what} differs: {seen} here, {wanted} in the file."


def _with_sites(hooked: HookedSAEs, program: Program) -> Program:
    """The program with each site written down: where it is sent to, more SAEs may be attached."""
    data = json.loads(program.to_json())
    for part in _parts(data):
        if part.get("site") is None:
            part["site"] = hooked.resolve_site(None)
    return Program.from_json(json.dumps(data))


def _parts(data: Any) -> Iterator[dict[str, Any]]:
    """The parts of a program's JSON that have a site: edits, and latents in conditions."""
    if isinstance(data, dict):
        if "op" in data or "latent" in data:
            yield data
        data = list(data.values())
    if isinstance(data, list):
        for item in data:
            yield from _parts(item)


def _sites(hooked: HookedSAEs, program: Program) -> list[str]:
    """Names of the attached SAEs that the program uses, in the order in which they are attached."""
    if program.splice:
        return hooked.sites
    used = {hooked.resolve_site(part["site"]) for part in _parts(json.loads(program.to_json())) if "vector" not in part}
    return [name for name in hooked.sites if name in used]


def _sae_ref(hooked: HookedSAEs, site: str) -> SAERef:
    sae = hooked.saes[site]
    if sae.source is None:
        raise ArgumentError(
            f"the SAE at {site} was made in Python, so no file says which it is. Write it with save_sae, and attach what "
            "load_sae reads."
        )
    _, reads, writes = hooked.attached[site]
    hashes = file_hashes(sae)
    if not {WEIGHTS, sae.source.name} & set(hashes):
        raise FileError(
            f"{sae.source}, from which the SAE at {site} was read, is or holds no {WEIGHTS} any more. Load it again."
        )
    place = hub.place_of(sae.source)
    return SAERef(
        site=site,
        sha256=hashes,
        site_out=writes if writes != reads else None,
        repo=place and place.repo,
        path=place.path if place else sae.source.name,
        revision=place and place.revision,
    )


def _model_ref(model: HookedModel) -> ModelRef:
    config = model.lm.config.get_text_config()
    folder = Path(model.model_id)
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    return ModelRef(
        id=model.name,
        kind=config.model_type,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        revision=getattr(model.lm.config, "_commit_hash", None),
        sha256={path.name: sha256(path) for path in weights},
    )


def _dtype(hooked: HookedSAEs) -> str:
    return str(hooked.lm.dtype).removeprefix("torch.")


def _shortened(ids: Sequence[int]) -> str:
    return f"{len(ids)} tokens {list(ids[:8])}{'...' if len(ids) > 8 else ''}"


class _Recorder:
    """Keeps the log-probabilities of each step of a generation, and decides its tokens: the likeliest, or those given."""

    def __init__(self, forced: Sequence[int] | None) -> None:
        self.forced = forced
        self.log_probs: list[Tensor] = []
        self.best: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = torch.log_softmax(scores[0].float(), -1).cpu()
        step = len(self.log_probs)
        self.log_probs.append(log_probs)
        self.best.append(int(log_probs.argmax()))
        if self.forced is None:
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self.forced[step]] = 0.0
        return only


def _run(hooked: HookedSAEs, program: Program, prompt: Any, forced: list[int] | None) -> tuple[_Recorder, Any]:
    from transformers import LogitsProcessorList

    recorder = _Recorder(forced)
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS if forced is None else len(forced),
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "logits_processor": LogitsProcessorList([recorder]),  # type: ignore[list-item]
    }
    if forced is None:
        return recorder, hooked.generate(prompt, edits=program, **options)
    return recorder, hooked.generate_quietly(prompt, program, None, **options)
