"""How much is computed and allocated, counted in operations: a fast path that is lost shows on any machine.

Products are counted by torch's own counter, sums of rows and fresh memory by a dispatch mode of ours. Sizes are chosen so that
they tell what a tensor is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import LAYERS, VOCAB, WIDTH, random_ids, tiny_sae
from torch.utils.flop_counter import FlopCounterMode
from work_counter import Work

from saehook import Program, ablate, add_vector, clamp, keep_only, latent, scale, steer
from saehook.batches import InputFacts
from saehook.config import BatchTopK, JumpReLU, Matryoshka, Method, MultiTopK, ReLU, TopK, TrainConfig
from saehook.interventions import AnyEdit
from saehook.kernels import Scratch
from saehook.sae import SAE
from saehook.sae_run import SAERun

SITE = "layers.0.resid_post"
TOKENS, D_IN, D_SAE, K = 96, 40, 4096, 4
PRODUCT = 2 * TOKENS * D_IN * D_SAE
"""Operations of the encoder's product."""
PRE_ACTS, MATRIX = TOKENS * D_SAE, D_IN * D_SAE
METHODS: dict[str, tuple[Method, float]] = {  # and pairs a token that are decoded
    "topk": (TopK(k=K), K),
    "batchtopk": (BatchTopK(k=K), K),
    "multitopk": (MultiTopK(k=K), 5 * K),
    "matryoshka": (Matryoshka(k=K), K),
    "relu": (ReLU(), K),
    "jumprelu": (JumpReLU(), K),
}


MOST_STARTED = {"topk": 170, "batchtopk": 190, "multitopk": 210, "matryoshka": 210, "relu": 180, "jumprelu": 190}
"""Operations of a step on an accelerator, by method; a little more than there are."""


def counted(run: Callable[[], object]) -> tuple[int, Work]:
    """Operations of products in one call, and the work of another."""
    in_place = {
        torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]
    }  # torch's counter does not know it
    with FlopCounterMode(display=False, custom_mapping=in_place) as flops:
        run()
    with Work() as work:
        run()
    return flops.get_total_flops(), work


# --- a training step -------------------------------------------------------------------------------------------------


def stepper(name: str, firing: float = K, dead: int = 0, clip_norm: float = 1e3) -> Callable[[], None]:
    """One step of a run that has taken some, so that everything it keeps is there; penalised methods fire so often, and so
    many latents stay dead. Gradients are far from being clipped, as in nearly all steps of a run."""
    method = METHODS[name][0]
    x = torch.randn(TOKENS, D_IN)
    target = None if hasattr(method, "k") else float(K)
    config = TrainConfig(
        site=SITE,
        activation=method,
        d_sae=D_SAE,
        tokens=10**9,
        batch_tokens=TOKENS,
        target_l0=target,
        lr=1e-6,
        clip_norm=clip_norm,
    )
    facts = InputFacts.measure(x, SITE)
    run, scratch = SAERun(config, name, facts), Scratch()
    if target is not None:
        with torch.no_grad():
            pre_acts = (x * facts.scale - run.sae.b_dec) @ run.sae.W_enc
            cut = float(pre_acts.flatten().topk(int(TOKENS * firing)).values.min())
            if isinstance(method, JumpReLU):
                run.method.parameters["threshold"].fill_(cut)
            else:
                run.sae.b_enc.sub_(cut)
    with torch.no_grad():
        run.sae.W_enc[:, :dead] *= 1e-3  # among the largest they are never
    run.tokens_since_fired[:dead] = 10**9

    def step() -> None:
        run.step({SITE: x}, scratch)

    step()
    step()
    assert len(run.dead) == dead
    return step


@pytest.fixture
def small_blocks(monkeypatch):
    """As in large SAEs, rows of gradients are made where they are used, here a few hundred at a time."""
    monkeypatch.setattr("saehook.kernels.ROWS_FROM", 0)
    monkeypatch.setattr("saehook.kernels.row_sums.WEIGHTS_AT_ONCE", MATRIX // 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", METHODS)
def test_the_only_dense_product_of_a_step_is_the_encoders(monkeypatch, name):
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    products, work = counted(stepper(name))
    assert products == PRODUCT
    # Forward once, and backward once for the gradient of each matrix.
    rows = 2 * TOKENS * METHODS[name][1] * D_IN
    assert 2.5 * rows <= work.row_sums <= 4 * rows  # of a JumpReLU also those near the threshold
    assert max(work.allocated) < PRE_ACTS, "pre-activations go into memory that steps share"
    assert work.allocated[MATRIX] == 0, "gradients are never whole"


@pytest.mark.usefixtures("small_blocks")
def test_rows_of_gradients_are_made_twice_only_where_they_may_have_to_be_clipped(monkeypatch):
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    row_sums = [counted(stepper("topk", clip_norm=clip))[1].row_sums for clip in (1e3, 0.0, 1e-3)]
    rows = 2 * TOKENS * K * D_IN
    assert row_sums == [3 * rows, 3 * rows, 5 * rows]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_auxk_has_four_products_of_the_dead_and_no_more(monkeypatch, name):
    """Their pre-activations are known from the step; decoding, and the gradients of activations and both matrices."""
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    dead = 150
    products, work = counted(stepper(name, dead=dead))
    to_b_dec = 2 * D_IN * dead
    assert products == PRODUCT + 4 * (2 * TOKENS * D_IN * dead) + to_b_dec
    assert work.row_sums <= 4 * 2 * TOKENS * K * D_IN, "no sums over their pairs"
    assert max(work.allocated) < PRE_ACTS
    assert work.allocated[MATRIX] == 0


@pytest.mark.parametrize("name", METHODS)
def test_operations_that_a_step_starts(monkeypatch, name):
    """A kernel each on an accelerator: their number does not grow with the SAE, so small steps cost what they start."""
    monkeypatch.setattr("saehook.kernels.device.ALWAYS_QUEUED", True)
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    _, work = counted(stepper(name))
    assert 50 < work.started <= MOST_STARTED[name]


@pytest.mark.parametrize("name", ["relu", "jumprelu"])
def test_where_many_fire_a_step_has_five_products_and_no_more(monkeypatch, name):
    monkeypatch.delenv("SAEHOOK_KERNELS", raising=False)
    products, work = counted(stepper(name, firing=D_SAE / 2))
    assert products == 5 * PRODUCT
    assert work.row_sums == 0


def test_a_lost_fast_path_would_be_seen(monkeypatch):
    monkeypatch.setenv("SAEHOOK_KERNELS", "reference")
    products, work = counted(stepper("topk"))
    assert products >= 5 * PRODUCT
    assert work.row_sums == 0
    assert work.allocated[PRE_ACTS] > 0


# --- a model with an SAE ---------------------------------------------------------------------------------------------

IDS = random_ids(11, bos=True)
WHERE = "layers.1.resid_post"
D_WIDE = 4096
ENCODER = 2 * len(IDS) * WIDTH * D_WIDE
ACTS = len(IDS) * D_WIDE


@pytest.fixture(scope="module")
def hooked(models_by_name) -> Any:
    return models_by_name("llama")[0].attach(tiny_sae(d_sae=D_WIDE, activation=TopK(k=K), site=WHERE))


def of_the_sae(hooked: Any, program: Program) -> tuple[float, Work]:
    """Products of a forward pass beyond the clean model's, in encoders' products, and its work."""
    with torch.no_grad():
        hooked.loss(IDS, program)
        clean = counted(lambda: hooked.model.loss(IDS))[0]
        products, work = counted(lambda: hooked.loss(IDS, program))
    assert clean > 2 * len(IDS) * WIDTH * (VOCAB + LAYERS * WIDTH), "the model itself is counted, too"
    return (products - clean) / ENCODER, work


def test_idle_it_does_nothing(hooked):
    with torch.no_grad():
        _, work = counted(lambda: hooked.loss(IDS))
        _, clean = counted(lambda: hooked.model.loss(IDS))
    assert work.operations == clean.operations
    assert work.allocated == clean.allocated


@pytest.mark.parametrize(
    "edit", [steer(3, 2.0), steer([3, 8], 0.1, unit="norm"), add_vector([1.0] * WIDTH, 2.0, site=WHERE)]
)
def test_an_unconditional_addition_encodes_nothing(hooked, monkeypatch, edit):
    monkeypatch.setattr(SAE, "encode", None)  # a call would fail
    products, work = of_the_sae(hooked, Program(edits=[edit]))
    assert products < 0.01  # its rows times its amounts
    assert max(work.allocated) < ACTS / 4


EDITS: dict[str, Callable[[int], AnyEdit]] = {  # of a latent that fires, so that each does something
    "clamp": lambda i: clamp(i, 1.0),
    "ablate": lambda i: ablate([i, (i + 1) % D_WIDE]),
    "scale": lambda i: scale(i, 2.0),
    "active only": lambda i: steer(i, 1.0, active_only=True),
    "condition": lambda i: steer(i, 1.0, when=latent(i) > 0),
}


@pytest.fixture(scope="module")
def firing(hooked) -> int:
    return hooked.latents(IDS).top(1)[0].latent


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_with_the_error_kept_encodes_once_and_decodes_nothing(hooked, firing, name):
    program = Program(edits=[EDITS[name](firing), clamp((firing + 2) % D_WIDE, 1.0)])
    products, work = of_the_sae(hooked, program)
    assert 1 <= products < 1.01
    assert work.operations["topk"] == 1
    assert work.allocated[WIDTH * D_WIDE] == 0, "no copy of a matrix"


@pytest.mark.parametrize("name", ["splice", "drop", "keep_only"])
def test_a_splice_encodes_once_and_decodes_once(hooked, firing, name):
    programs = {
        "splice": Program(splice=True),
        "drop": Program(edits=[ablate(firing)], error="drop"),
        "keep_only": Program(edits=[keep_only([firing])]),
    }
    products, work = of_the_sae(hooked, programs[name])
    assert 2 <= products < 2.01
    assert work.allocated[WIDTH * D_WIDE] == 0


def test_a_wide_sae_has_the_same_product_and_no_dense_decoding(hooked, monkeypatch):
    monkeypatch.setattr("saehook.kernels.WIDE_FROM", D_WIDE)
    monkeypatch.setattr("saehook.kernels.blockwise.LATENTS_AT_ONCE", 512)
    for program, decoded in ((Program(edits=[clamp(3, 1.0)]), 0), (Program(splice=True), 1)):
        products, work = of_the_sae(hooked, program)
        assert 1 <= products < 1.01
        assert work.operations["topk"] == 2 * D_WIDE / 512
        assert max(work.allocated) < ACTS / 4
        assert (work.row_sums > 0) == bool(decoded)
        assert work.row_sums <= 2 * K * len(IDS) * WIDTH
