"""Programs of every kind against the reference of `reference_program.py`, on every architecture, however the model runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from builders import VOCAB, WIDTH, build_lm, byte_tokenizer, random_ids, tiny_sae
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from reference_program import run
from transformers import LogitsProcessor

from saehook.conditions import COMPARISONS, Comparison, Condition, latent
from saehook.config import MaskRule
from saehook.edits import ablate, add_vector, at_least, clamp, keep_only, project_out, resample, scale, steer, swap
from saehook.errors import ArgumentError
from saehook.interventions import NO_ACTIVE_ONLY, NO_UNIT, NO_VALUE, OPS, VECTOR_OPS, Edit, Program, VectorEdit
from saehook.schedules import Schedule
from saehook.where import Where, generation, matching

pytestmark = pytest.mark.filterwarnings("ignore::saehook.errors.NoEffectWarning")

ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2", "mistral", "gpt_neo"]
"""The layers of the last return tuples."""
NEW = 5
ROWS = [[0, 5, 9, 40, 5, 9, 1, 70, 5, 9], [0, *(3 + i % 90 for i in random_ids(13, seed=2))]]
"""A short one that repeats itself and holds an EOS, and one that grows beyond the window of 16 tokens that some have."""
LATENTS = 48
MARGIN = 1e-3

# --- programs --------------------------------------------------------------------------------------------------------


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


def lists_of(values: st.SearchStrategy[int], least: int = 1, most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(values, min_size=least, max_size=most, unique=True).map(tuple)


@st.composite
def wheres(draw: st.DrawFn) -> Where:
    more: dict[str, Any] = {}
    rare = st.integers(0, 3).map(lambda n: n == 0)
    if draw(rare):
        more["positions"] = draw(st.sampled_from([(0, 4), (3, None), (2, 12), (9, 11), (12, None)]))
    if draw(rare):
        more["token_ids"] = tuple(range(draw(st.integers(0, 2)), VOCAB, 2))
    if draw(rare):
        more["pattern"] = draw(st.sampled_from([r"[A-Za-z]", r"[0-9]+|&", r"(?<=.)[!-Z]{2}", r"[&*]*", r"\b"]))
    if draw(rare):
        more["rows"] = draw(st.sampled_from([(0,), (1,), (0, 1)]))
    if draw(rare):
        more["tokens"] = draw(lists_of(st.integers(-8, 8)))
    else:
        more |= draw(st.sampled_from([{}, {}, {"prompt": False}, {"generation": False}]))
    return Where(**more, special=draw(rare), bos=draw(rare))


def conditions(names: list[str]) -> st.SearchStrategy[Condition]:
    values = st.builds(
        lambda i, site, over, decay: latent(i, site, over, decay if over == "decay" else None),
        st.integers(0, LATENTS - 1),
        st.sampled_from(names),
        st.sampled_from(["here", "last", "so_far_max", "prompt_max", "decay"]),
        number(0.25, 0.9375),
    )
    leaves = st.builds(
        lambda value, op, right: Comparison(op, value, right), values, st.sampled_from(list(COMPARISONS)), number(0, 1)
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
            st.builds(lambda a, n: a.hold(n), inner, st.integers(1, 6)),
        ),
        max_leaves=3,
    )


SCHEDULES = st.one_of(
    st.none(),
    st.none(),
    st.builds(Schedule.linear, number(-1, 1), number(0, 2), st.integers(1, 6)),
    st.builds(Schedule.exponential, number(0, 1.5)),
    st.lists(number(-1, 2), min_size=1, max_size=4).map(lambda factors: Schedule.steps(*factors)),
)


@st.composite
def place(draw: st.DrawFn, names: list[str], name: str) -> dict[str, Any]:
    """where, when and schedule of an edit at the site `name`; conditions ask what runs before it or there."""
    here = name.partition("#")[0]
    before = [other for other in names if other.partition("#")[0] <= here]
    return {
        "site": name,
        "where": draw(wheres()),
        "when": draw(st.one_of(st.none(), conditions(before))),
        "schedule": draw(SCHEDULES),
    }


@st.composite
def latent_edits(draw: st.DrawFn, names: list[str], linear: list[str]) -> Edit:
    op, name = draw(st.sampled_from(OPS)), draw(st.sampled_from(names))
    unit = "raw" if op in NO_UNIT else draw(st.sampled_from(["raw", "max", "norm", "quantile"]))
    ranges = {"raw": (-1, 3), "max": (-0.5, 1.5), "norm": (-0.25, 0.5), "quantile": (0, 1)}
    more: dict[str, Any] = draw(place(names, name)) | ({"schedule": None} if op == "keep_only" else {})
    return Edit(
        op=op,
        latents=draw(lists_of(st.integers(0, LATENTS - 1), 1 + (op == "swap"), 2 if op == "swap" else 3)),
        value=None if op in NO_VALUE else draw(number(*ranges[unit])),
        unit=unit,
        active_only=op not in NO_ACTIVE_ONLY and draw(st.booleans()),
        mode=draw(st.sampled_from(["decoder", "readback"])) if name in linear and op != "keep_only" else "decoder",
        source=(draw(st.integers(0, 1)), draw(st.integers(-8, 8))) if op == "resample" else None,
        **more,
    )


@st.composite
def vector_edits(draw: st.DrawFn, names: list[str]) -> VectorEdit:
    op = draw(st.sampled_from(VECTOR_OPS))
    seed = draw(st.integers(0, 99))
    return VectorEdit(
        op=op,
        vector=tuple(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)).tolist()),
        value=None if op == "project_out" else draw(number(-0.5, 0.75)),
        unit="raw" if op == "project_out" else draw(st.sampled_from(["raw", "norm"])),
        **draw(place(names, draw(st.sampled_from(names)).partition("#")[0])),
    )


LINEAR = ["layers.0.resid_post", "layers.1.resid_post#0", "layers.1.resid_post#1"]
WHOLE = ["layers.0.resid_post", "layers.1.mlp_out"]
"""Names of the SAEs where two stand at one site, and where each has its own, so that its error can be dropped."""


@st.composite
def programs(draw: st.DrawFn) -> tuple[bool, Program]:
    """Whether two SAEs share a site, and a program for that."""
    shared = draw(st.booleans())
    options: dict[str, Any] = (
        {}
        if shared
        else draw(
            st.sampled_from(
                [{}, {"splice": True}, {"error": "drop"}, {"error": "mean"}, {"splice": True, "error": "mean"}]
            )
        )
    )
    names = LINEAR if shared else WHOLE
    linear = [] if options else [name for name in names if name != "layers.1.mlp_out"]
    edits = st.one_of(latent_edits(names, linear), latent_edits(names, linear), vector_edits(names))
    return shared, Program(
        edits=draw(st.lists(edits, min_size=1, max_size=4)),
        norm=draw(st.sampled_from([None, None, "preserve", {"cap": 0.5}])),
        parallel=not options and draw(st.booleans()),
        **options,
    )


def narrowed(program: Program) -> Program:
    """The program for the first row alone."""
    edits = []
    for edit in program.edits:
        edit = dataclasses.replace(edit, where=dataclasses.replace(edit.where, rows=None))
        if isinstance(edit, Edit) and edit.source is not None:
            edit = dataclasses.replace(edit, source=(0, edit.source[1]))
        edits.append(edit)
    return dataclasses.replace(program, edits=edits)


def for_beams(program: Program) -> Program:
    """The program without what beams cannot have."""
    edits = []
    for edit in program.edits:
        if edit.when is not None and edit.when.looks_back:
            edit = dataclasses.replace(edit, when=None)
        if edit.where.pattern is not None and edit.where.tokens is None and edit.where.generation:
            edit = dataclasses.replace(edit, where=dataclasses.replace(edit.where, pattern=None))
        edits.append(edit)
    return dataclasses.replace(program, edits=edits)


# --- the library and the reference, side by side ---------------------------------------------------------------------


@functools.cache
def world(name: str, shared: bool) -> tuple[Any, Any, Any]:
    """A model with SAEs, a plain copy, and one that drafts for it."""
    from saehook.hooked_model import HookedModel

    lm, draft = build_lm(name), build_lm(name)
    draft.generation_config.num_assistant_tokens = 3
    model = HookedModel(build_lm(name), byte_tokenizer())
    first = tiny_sae(activation="topk", seed=1)
    first.mask_rule = MaskRule(skip_first_tokens=2)
    second = tiny_sae(activation="relu", normalize="layer_norm", subtract_b_dec=False, seed=2)
    if not shared:
        return model.attach(dict(zip(WHOLE, [first, second], strict=True))), lm, draft
    jump, batch = tiny_sae(activation="jumprelu", seed=3), tiny_sae(activation="batchtopk", seed=4)
    norms = model.activations(ROWS, "layers.1.resid_post")["layers.1.resid_post"].norm(dim=-1)
    jump.mask_rule = MaskRule(max_norm_ratio=1.0, median_norm=float(norms.flatten().quantile(0.8)))
    return model.attach({"layers.0.resid_post": first, "layers.1.resid_post": [jump, batch]}), lm, draft


class Recorder(LogitsProcessor):
    """Log-probabilities by row of the input and ids so far, as `generate` sees them."""

    def __init__(self, prompts: list[list[int]], expansion: int = 1) -> None:
        self.prompts, self.expansion = prompts, expansion
        self.seen: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for i, (ids, values) in enumerate(zip(input_ids.tolist(), scores, strict=True)):
            row = i // self.expansion
            pads = max(map(len, self.prompts)) - len(self.prompts[row])
            self.seen[row, tuple(ids[pads:])] = values.detach().float().log_softmax(-1).clone()
        return scores


@dataclasses.dataclass
class Steps:
    """Steps of decoding, and those that rounding may decide."""

    all: int = 0
    close: int = 0


class Check:
    """One program on one model."""

    def __init__(self, name: str, shared: bool, program: Program, steps: Steps) -> None:
        self.hooked, self.lm, self.draft = world(name, shared)
        self.program, self.steps, self.tokenizer = program, steps, byte_tokenizer()
        self.known: dict[Any, torch.Tensor] = {}

    def reference(self, program: Program, prompts: list[list[int]], rows: list[list[int]]) -> Any:
        """Logits by row, and the tokens touched."""
        with torch.no_grad():
            return run(self.lm, self.hooked.saes, program, rows, list(map(len, prompts)), self.tokenizer)

    def expected(self, program: Program, prompts: list[list[int]], row: int, ids: tuple[int, ...]) -> torch.Tensor:
        """Log-probabilities of what follows `ids` in that row."""
        if (program, len(prompts), row, ids) not in self.known:
            rows = [*prompts[:row], list(ids), *prompts[row + 1 :]]
            values = self.reference(program, prompts, rows)[0][row].log_softmax(-1)
            for n in range(len(prompts[row]), len(ids) + 1):
                self.known[program, len(prompts), row, ids[:n]] = values[n - 1]
        return self.known[program, len(prompts), row, ids]

    def message(self, mode: str, program: Program) -> Any:
        return lambda text: f"{mode}: {text}\n{program.to_json()}"

    def forward(self) -> None:
        """Alone and in a batch; untouched tokens keep their bits."""
        for program, prompts in ((narrowed(self.program), ROWS[:1]), (self.program, ROWS)):
            expected, touched = self.reference(program, prompts, prompts)
            with torch.no_grad():
                ours = self.hooked(prompts if len(prompts) > 1 else prompts[0], program).logits
            for row, ids in enumerate(prompts):
                torch.testing.assert_close(
                    ours[row, -len(ids) :],
                    expected[row, : len(ids)],
                    rtol=0,
                    atol=1e-4,
                    msg=self.message(f"forward {row}", program),
                )
            self.bits(program, prompts, touched)

    def bits(self, program: Program, prompts: list[list[int]], touched: set[Any]) -> None:
        sites = ["layers.0.resid_post", "layers.1.resid_post"]
        if any(edit.site == "layers.1.mlp_out" for edit in program.edits) or program.splice:
            sites.pop()
        clean, seen = ({site: [] for site in sites} for _ in range(2))
        for lm, store, edits in ((self.hooked.lm, clean, Program()), (self.hooked.lm, seen, program)):
            layers = self.layers(lm)
            handles = [
                layers[int(site[7]) + 1].register_forward_pre_hook(
                    lambda m, args, kwargs, out=store[site]: out.append(
                        (args[0] if args else kwargs["hidden_states"]).clone()
                    ),
                    with_kwargs=True,
                )
                for site in sites
            ]
            with torch.no_grad():
                self.hooked(prompts, edits)
            for handle in handles:
                handle.remove()
        for site in sites:
            before, after = clean[site][0], seen[site][0]
            for row, ids in enumerate(prompts):
                for i in range(len(ids)):
                    if (site, row, i) not in touched:
                        column = before.shape[1] - len(ids) + i
                        assert torch.equal(before[row, column], after[row, column]), (site, row, i, program.to_json())
            if any(where == site for where, _, _ in touched):
                break  # what comes after it is another x

    @staticmethod
    def layers(lm: Any) -> Any:
        inner = getattr(lm, "model", None) or getattr(lm, "transformer", None) or lm.gpt_neox
        return inner.h if hasattr(inner, "h") else inner.layers

    def greedy(self, mode: str, *, batch: bool = False, **how: Any) -> None:
        program, prompts = (self.program, ROWS) if batch else (narrowed(self.program), ROWS[:1])
        recorder = Recorder(prompts)
        result = self.hooked.generate(
            prompts if batch else prompts[0], program, max_new_tokens=NEW, logits_processor=[recorder], **how
        )
        for row, one in enumerate(result if batch else [result]):
            ids, start = tuple(one.ids.tolist()), len(prompts[row])
            self.expected(program, prompts, row, ids[:-1])
            for n in range(start, len(ids)):
                expected = self.expected(program, prompts, row, ids[:n])
                ours = recorder.seen[row, ids[:n]]
                torch.testing.assert_close(
                    ours, expected, rtol=0, atol=1e-4, msg=self.message(f"{mode} {row} {n}", program)
                )
                best = expected.topk(2)
                self.steps.all += 1
                if best.values[0] - best.values[1] <= MARGIN:
                    self.steps.close += 1
                else:
                    assert ids[n] == int(best.indices[0]), (mode, row, n, program.to_json())

    def beams(self, **how: Any) -> None:
        program = for_beams(self.program)
        arguments: dict[str, Any] = {"max_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2} | how
        if program != self.program:
            with pytest.raises(ArgumentError, match="beams change places"):
                self.hooked.generate(ROWS, self.program, **arguments)
        recorder = Recorder(ROWS, 3)
        result = self.hooked.generate(ROWS, program, logits_processor=[recorder], **arguments)
        for row, prompt in enumerate(ROWS):
            prefixes = sorted((ids for at, ids in recorder.seen if at == row), key=len, reverse=True)
            for ids in prefixes:
                expected = self.expected(program, ROWS, row, ids)
                torch.testing.assert_close(
                    recorder.seen[row, ids], expected, rtol=0, atol=1e-4, msg=self.message(f"beams {row}", program)
                )
            ours = [tuple(one.ids.tolist()) for one in result[2 * row : 2 * row + 2]]
            self.search(program, row, tuple(prompt), ours)

    def search(self, program: Program, row: int, prompt: tuple[int, ...], ours: list[tuple[int, ...]]) -> None:
        """Beam search on the reference's probabilities, as far as rounding does not decide it."""
        running = [(0.0, prompt)]
        for _ in range(3):
            longer = [
                (score + value, (*ids, token))
                for score, ids in running
                for token, value in enumerate(self.expected(program, ROWS, row, ids).tolist())
            ]
            longer.sort(reverse=True)
            self.steps.all += 1
            if longer[2][0] - longer[3][0] <= MARGIN:
                self.steps.close += 1
                return
            running = longer[:3]
        if running[0][0] - running[1][0] > MARGIN and running[1][0] - running[2][0] > MARGIN:
            assert ours == [ids for _, ids in running[:2]], (row, program.to_json())
        else:
            assert set(ours) <= {ids for _, ids in running}

    def sampled(self) -> None:
        """One seed and one prompt give the same tokens cached or not, and several sequences are those of the reference."""
        alone = narrowed(self.program)
        how: dict[str, Any] = {"do_sample": True, "seed": 7, "max_new_tokens": NEW}
        ways = [self.hooked.generate(ROWS[0], alone, use_cache=cache, **how).ids.tolist() for cache in (True, False)]
        assert ways[0] == ways[1], alone.to_json()
        recorder = Recorder(ROWS, 2)
        self.hooked.generate(ROWS, self.program, num_return_sequences=2, logits_processor=[recorder], **how)
        for (row, ids), values in sorted(recorder.seen.items(), key=lambda item: len(item[0][1]), reverse=True):
            expected = self.expected(self.program, ROWS, row, ids)
            torch.testing.assert_close(
                values, expected, rtol=0, atol=1e-4, msg=self.message(f"sampled {row}", self.program)
            )


WAYS: dict[str, Callable[[Check], None]] = {
    "cached": lambda check: check.greedy("cached"),
    "uncached": lambda check: check.greedy("uncached", use_cache=False),
    "static cache": lambda check: check.greedy("static cache", cache_implementation="static"),
    "prompt lookup": lambda check: check.greedy("prompt lookup", prompt_lookup_num_tokens=3),
    "assisted": lambda check: check.greedy("assisted", assistant_model=check.draft),
    "padded": lambda check: check.greedy("padded", batch=True),
    "padded, uncached": lambda check: check.greedy("padded, uncached", batch=True, use_cache=False),
    "beams": Check.beams,
    "sampled": Check.sampled,
}


def in_ways(name: str, examples: int, ways: list[str]) -> None:
    steps = Steps()

    @seed(ARCHITECTURES.index(name))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(programs())
    def each_means_what_the_reference_says(drawn: tuple[bool, Program]) -> None:
        check = Check(name, *drawn, steps)
        check.forward()
        for way in ways:
            WAYS[way](check)

    each_means_what_the_reference_says()
    assert steps.all > examples
    assert steps.close <= 0.02 * steps.all


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_program_means_the_same_however_the_model_runs(name):
    first = 3 * ARCHITECTURES.index(name)
    in_ways(name, 3, [way for n, way in enumerate(list(WAYS) * 3) if first <= n < first + 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_many_programs_mean_the_same_however_the_model_runs(name):
    in_ways(name, 14, list(WAYS))


# --- what random programs rarely meet --------------------------------------------------------------------------------


def moved(edit: Any, ids: list[int]) -> list[bool]:
    """Which tokens of the first site an edit changes."""
    hooked = world("llama", False)[0]
    seen: list[torch.Tensor] = []
    layer = hooked.lm.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        hooked(ids)
        hooked(ids, edit)
    handle.remove()
    return (seen[0] != seen[1]).any(-1)[0].tolist()


def test_a_condition_may_be_held_for_ever():
    ids, first = random_ids(9, bos=True), WHOLE[0]
    for tokens in (50, 10**12):
        fired = moved(steer(3, 2.0, site=first, when=(latent(4, first) >= 0.0).hold(tokens)), ids)
        assert fired == [False, False, *[True] * 8]


def test_the_factors_of_schedules():
    for schedule, factors in (
        (Schedule.linear(1, 0, 4), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (Schedule.exponential(0.5), [1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125]),
        (Schedule.steps(1, 2, 0.5), [1.0, 2.0, 0.5, 0.5, 0.5, 0.5]),
    ):
        assert [schedule.at(t) for t in range(6)] == factors
        assert schedule.at(-3) == factors[0], "as the first generated token"


def test_an_empty_match_selects_nothing():
    ids, first = [0, 5, 40, 5], WHOLE[0]
    hooked = world("llama", False)[0]
    assert byte_tokenizer().decode(ids) == "<bos>#F#"
    rule, hooked.saes[first].mask_rule = hooked.saes[first].mask_rule, MaskRule()
    try:
        assert moved(steer(3, 2.0, site=first, where=Where(pattern="(?=b)|F*", special=True)), ids) == [
            *(False, False, True, False)
        ]
    finally:
        hooked.saes[first].mask_rule = rule


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 1e38])
def test_a_direction_has_no_length(size):
    hooked, ids = world("llama", False)[0], random_ids(9, bos=True)
    vector = [1.0 + i % 3 for i in range(WIDTH)]
    with torch.no_grad():
        edits = [project_out([x * factor for x in vector], site=WHOLE[0]) for factor in (1.0, size)]
        small, one = (hooked(ids, edit).logits for edit in edits)
    torch.testing.assert_close(small, one, rtol=0, atol=1e-4)


# --- threads ---------------------------------------------------------------------------------------------------------


def together(threads: int, times: int) -> None:
    """Generations with a program each, at the same time, are those of each alone."""
    first, second = WHOLE
    edits: list[list[Any]] = [
        [steer(3, 4.0, site=first)],
        [ablate(range(40), site=first), clamp(5, 2.0, site=second, where=generation())],
        [scale((1, 2, 3), 3.0, site=second, when=latent(4, first, "so_far_max") > 0.1)],
        [keep_only(range(10), site=first, where=matching("[a-m]"))],
        [add_vector([1.0] * WIDTH, 0.5, unit="norm", site=first, schedule=Schedule.exponential(0.5))],
        [resample(range(20), (0, 1), site=second), swap(7, 8, site=first)],
        [at_least(9, 1.0, unit="max", site=first, mode="readback")],
        [],
    ]
    ways: list[dict[str, Any]] = [{}, {"do_sample": True, "seed": 5}, {"use_cache": False}, {"num_beams": 2}]
    hooked = world("llama", False)[0]

    def call(n: int) -> list[int]:
        program = Program(edits=edits[n % 8], norm="preserve" if n % 3 == 2 else None)
        how = ways[n % 4 if n % 8 not in (2, 3) else 0]
        return hooked.generate("def mean(x):", program, max_new_tokens=4, **how).ids.tolist()

    alone = [call(n) for n in range(threads)]
    assert len({tuple(ids) for ids in alone}) > threads // 2
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(lambda n: [call(n) for _ in range(times)], range(threads)))
    for n, several in enumerate(results):
        assert all(ids == alone[n] for ids in several), edits[n % 8]


def test_programs_in_threads_are_those_of_one_thread():
    together(4, 2)


@pytest.mark.slow
def test_many_programs_in_threads_are_those_of_one_thread():
    together(8, 50)
