"""Damaged program files: each is read, and then runs or is refused by name; or is refused with the path of the field."""

from __future__ import annotations

import copy
import json
import random
import re
import time
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from builders import build_lm, byte_tokenizer, footprint, tiny_sae

from saehook.conditions import OVER, latent
from saehook.edits import (
    ablate,
    add_vector,
    at_least,
    at_most,
    cap_along,
    clamp,
    keep_only,
    project_out,
    resample,
    scale,
    steer,
    swap,
    to_mean,
)
from saehook.errors import FormatError, SaehookError
from saehook.hooked_model import HookedModel
from saehook.interventions import ERRORS, MODES, OPS, UNITS, VECTOR_OPS, Edit, Program, VectorEdit
from saehook.schedules import Schedule
from saehook.where import Where, generation, matching, prompt, span, tokens

A, B = "layers.0.resid_post", "layers.1.mlp_out"
ROWS = ["def mean(values):", "ab 12 ab"]
VECTOR = [0.5, -1.0, *[0.25] * 30]
SECONDS = 10.0
"""Of the processor, for the worst of them."""

BASES = [
    Program(
        edits=[
            steer((3, 4), 1.5, unit="max", site=A, where=tokens(0, -1)),
            ablate(5, site=B, where=generation()),
            scale(6, 0.5, site=A, schedule=Schedule.linear(1, 0, 4)),
            at_most(7, 0.5, site=A, active_only=True, where=Where(positions=(1, 4), token_ids=(5, 40), rows=(0,))),
        ],
        error="drop",
        norm={"cap": 0.5},
    ),
    Program(
        edits=[
            clamp(3, 0.25, unit="quantile", site=A, mode="readback", when=latent(7, A) > 0.5),
            at_least((8, 9), 0.1, unit="norm", site=A, where=matching(r"[a-z]+\(|\d")),
            resample(11, (1, -2), site=B, when=((latent(1, A, "so_far_max") > 0.1) & ~(latent(2, B) <= 0.2)).hold(3)),
            swap(12, 13, site=B, schedule=Schedule.steps(1.0, 0.5)),
            add_vector(VECTOR, 0.5, unit="norm", site=A, where=span(2)),
        ],
        parallel=True,
    ),
    Program(
        edits=[
            to_mean((14, 15), site=A, where=Where(special=True, bos=True, generation=False)),
            keep_only(range(20, 40), site=B, where=prompt(), when=latent(3, A, "decay", 0.5) >= 0.0),
            project_out(VECTOR, site=A, when=(latent(4, A, "prompt_max") < 9.0) | (latent(4, A, "last") > 0.0)),
            cap_along(VECTOR, 1.0, site=B, schedule=Schedule.exponential(0.9)),
        ],
        norm="preserve",
    ),
    Program(edits=[ablate((1, 2), site=A)], splice=True, error="mean"),
    Program(edits=[ablate(1, site=A, where=Where(roles=("user",))), steer(2, 0.5, unit="kl", site=B)]),
]

BOMBS = [
    *r"(?R) ((?R))* (a|(?1))(?1) (?<n>(?&n)) (?P<n>x|(?P>n)) (a+)+$ (?:a|aa)+b (.*)*(.*)*(.*)*x (?:a?){500}a{500}".split(),
    *r"(?:(?:a{1,60000}){1,60000}){1,60000}b a{99999999999} (?:abcdefgh){e} (?:.{e<=5}){e<=9} \L<words> (?#".split(),
    *r"\N{NOTHING} \p{Nothing} (?(1)a|b) \g<9> (?r)a* \b (?=.) \K x* \X* [[a-z]--[m]]".split(),
    *("(" * 900, "(?:" * 180 + "a" + ")*" * 180, "[" * 99, "(?i:" * 99 + ")" * 99, "a" * 1001, "", "\ud800"),
]
SITES = [
    *"# #0 layers.0.resid_post#0 layers.0.resid_post# layers.*.resid_post * ? [ [! :input layers.1 mlp_out".split(),
    *"layers.{0..1}.resid_post layers.{1..0}.mlp_out layers.{0..99999999}.mlp_out layers.-1.mlp_out".split(),
    *"layers.2.resid_post layers.0.resid_mid layers.9.resid_post no.such:output *:output model.norm:side".split(),
    *"model:output model:input lm_head:output lm_head:input model.embed_tokens:input model.layers.1:output".split(),
    *"model.layers.0.self_attn:output model.rotary_emb:output __class__ ../.. os:system".split(),
    *("layers.{0.." + "9" * 5000 + "}.mlp_out", "{a,b}" * 40, "{" * 500 + "}" * 500, "x" * 10_000, "*a" * 500),
    *("", "\ud800", "layers.0.resid_post\0"),
]
RAW = "@NaN @Infinity @-Infinity @1e999 @-1e999 @1E5 @-0 @0.1e-999".split()
"""As they are, without quotes."""
STRINGS = ["", "\ud800", "\U0001f600", "x" * 10_000, "__import__('os')", *"add max kl user here decay gt".split()]
NUMBERS = [0, 1, -1, 2, 47, 48, 10**6, 2**31, 2**53, 2**62, 2**63, 2**70, -(2**70), 10**400, 0.0, -0.0, 0.5, 1.5, -1.5]
LISTS: list[Any] = [[], [None], [True], [0], [0, 0], [1, 2], [-1], [2**63], ["x"], [[0]], [[[]]]]
OBJECTS: list[Any] = [
    *({}, {"tokens": [1]}, {"prompt": False}, {"op": "add"}, {"vector": [1.0]}, {"": 0}, {"gt": [{"latent": 1}, 0]}),
    *({"linear": [1, 0, 4]}, {"exponential": 2}, {"steps": [1]}, {"cap": 1}, {"cap": 0}),
]
TINY_AND_HUGE = [5e-324, 1e-40, 3.4e38, -3.4e38, 1e39, 1e300]
JUNK: list[Any] = [None, True, False, *NUMBERS, *TINY_AND_HUGE, *RAW, "@" + "9" * 5000, *STRINGS, *LISTS, *OBJECTS]
WORDS = [OPS, UNITS, OVER, VECTOR_OPS, MODES, ERRORS, (A, B), ("preserve", "cap")]


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def nested(value: Any, rng: random.Random) -> Any:
    """`value` deep inside something."""
    kind, depth = rng.randrange(5), rng.choice([1, 2, 31, 32, 33, 40, 200, 450, 480, 900, 950, 980, 990, 1000, 5000])
    text = json.dumps(value)
    start, end = [("[", "]"), ('{"a":', "}"), ('{"not":', "}"), ('{"and":[', "]}"), ('{"hold":[', ",2]}")][kind]
    return f"@{start * depth}{text}{end * depth}"


def mutated(data: Any, rng: random.Random) -> tuple[Any, tuple[Any, ...]]:
    """A copy with one place changed, and which."""
    data = copy.deepcopy(data)
    path = rng.choice(places(data))
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    kind = rng.randrange(15)
    if kind >= 10 and isinstance(old, str):
        parent[key] = rng.choice([word for words in WORDS for word in words if old in words] or [old])
    elif kind >= 10 and isinstance(old, (int, float)):
        parent[key] = rng.choice([0, 1, 2, 3, 10, -1, 0.25, old + 1, old / 2, rng.uniform(-2, 2), rng.randrange(60)])
    elif kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = nested(old, rng)
    elif kind == 2 and isinstance(parent, dict):
        parent[f"{key}@twice{rng.randrange(99)}"] = copy.deepcopy(rng.choice([old, rng.choice(JUNK)]))
    elif kind == 3:
        unknown = rng.choice(["extra", "", "\ud800", "Op", "op ", "__class__", "x" * 5000, "source", "mode", "decay"])
        if isinstance(parent, dict):
            parent[unknown] = copy.deepcopy(rng.choice(JUNK))
        else:
            parent.insert(key, copy.deepcopy(rng.choice(JUNK)))
    elif kind == 4 and isinstance(old, (int, float)):
        parent[key] = rng.choice([not old, old + 1, -old, old * 1e30, old + 10**9, int(old), 2**40, 10**8, str(old)])
    elif kind == 5 and isinstance(parent, dict):
        name = rng.choice(["site", "where", "where"])
        parent[name] = rng.choice(SITES) if name == "site" else {"pattern": rng.choice(BOMBS)}
    elif kind == 6:
        other = rng.choice(places(data))
        value = data
        for step in other:
            value = value[step]
        parent[key] = copy.deepcopy(value)
    else:
        parent[key] = copy.deepcopy(
            rng.choice([*JUNK, *(BOMBS if key == "pattern" else SITES if key == "site" else [])])
        )
    return data, path


def text_of(data: Any) -> str:
    """JSON, with strings that begin with @ as they are and keys that end in @twice.. again."""
    text = json.dumps(data)
    text = re.sub(r'@twice\d+": ', '": ', text)
    return re.sub(r'"@((?:[^"\\]|\\.)*)"', lambda match: json.loads(f'"{match[1]}"'), text)


@pytest.fixture(scope="module")
def hooked() -> Any:
    """A model with SAEs at two sites."""
    model = HookedModel(build_lm("llama"), byte_tokenizer())
    return model.attach({A: tiny_sae(activation="topk", seed=1), B: tiny_sae(seed=2)})


def survives(hooked: Any, n: int, seed: int) -> Counter[str]:
    """What became of `n` of them."""
    rng = random.Random(seed)
    bases = [json.loads(program.to_json()) for program in BASES]
    with torch.no_grad():
        clean, before = hooked(ROWS).logits, footprint(hooked.lm)
    counts: Counter[str] = Counter()
    for number in range(n):
        data, path = mutated(bases[number % len(bases)], rng)
        once = rng.random() < 0.8
        if not once:
            data, _ = mutated(data, rng) if places(data) else (data, ())
        text = text_of(data)
        shown = f"case {number}: {text[:3000]}"
        started = time.process_time()
        try:
            outcome = read_and_run(hooked, text, path if once else ())
        except Exception as error:
            error.add_note(shown)
            raise
        assert time.process_time() - started < SECONDS, shown
        counts[outcome] += 1
        if outcome == "refused by the run" and number % 5 == 0:
            with torch.no_grad():
                assert torch.equal(hooked(ROWS).logits, clean), shown
    assert footprint(hooked.lm) == before
    return counts


def read_and_run(hooked: Any, text: str, path: tuple[Any, ...]) -> str:
    """What becomes of a file in which `path` was changed; () where that is not to be named."""
    program, message = None, ""
    try:
        program = Program.from_json(text)
    except FormatError as error:
        message = str(error)
    if program is None:
        assert names(message, path), f"{path} is not named: {message}"
        return "refused"
    assert Program.from_json(program.to_json()) == program
    assert all(isinstance(edit, (Edit, VectorEdit)) for edit in program.edits)
    assert str(list(map(str, program.edits)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            logits = hooked(ROWS, program).logits
        except SaehookError:
            return "refused by the run"
    assert logits.shape[:2] == (2, max(map(len, ROWS)) + 1)
    return "run"


def names(message: str, path: tuple[Any, ...]) -> bool:
    """Whether an error says where: with one change below edits, in which edit, and in which of its parts."""
    if "is not JSON" in message or path[:1] != ("edits",) or len(path) < 2:
        return message.startswith(("the program", "program", "edits["))
    inner = next((key for key in path[2:] if key in ("where", "when", "schedule")), None)
    return message.removeprefix("program.").startswith(
        f"edits[{path[1]}]" + (f".{inner}" if inner and len(path) > 3 else "")
    )


def test_damaged_programs_are_read_or_refused(hooked):
    counts = survives(hooked, 500, seed=0)
    assert min(counts[outcome] for outcome in ("refused", "refused by the run", "run")) > 20, counts


@pytest.mark.slow
def test_ten_thousand_damaged_programs_are_read_or_refused(hooked):
    counts = survives(hooked, 10_000, seed=1)
    assert min(counts[outcome] for outcome in ("refused", "refused by the run", "run")) > 500, counts


@pytest.mark.parametrize("pattern", BOMBS)
def test_a_pattern_that_never_ends_is_given_up(hooked, pattern):
    text = json.dumps(
        {"schema": 1, "edits": [{"op": "ablate", "latents": [1], "site": A, "where": {"pattern": pattern}}]}
    )
    started = time.process_time()
    assert read_and_run(hooked, text, ("edits", 0, "where", "pattern")) in ("refused", "refused by the run", "run")
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("site", SITES)
def test_a_name_that_is_no_site_is_refused(hooked, site):
    for what in ({"op": "ablate", "latents": [1]}, {"op": "project_out", "vector": VECTOR}):
        text = json.dumps({"schema": 1, "edits": [{**what, "site": site}]})
        assert read_and_run(hooked, text, ("edits", 0, "site")) in ("refused by the run", "run")
