"""What the processes of a world do in the tests of `saehook.distributed`; the comparisons are made where the numbers are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saehook import kernels
from saehook.batches import InputFacts
from saehook.config import BatchTopK, Gated, JumpReLU, Matryoshka, MultiTopK, ReLU, TopK, TrainConfig
from saehook.devices import OneDevice
from saehook.distributed import selection
from saehook.distributed.mesh import Mesh
from saehook.distributed.sharded_sae import ShardedSAE
from saehook.distributed.shards import LATENT_AXES, Shards
from saehook.distributed.state import latent_axis
from saehook.errors import TrainingError
from saehook.initial_rows import indices
from saehook.kernels import running
from saehook.optim import DecoderConstrainedAdam
from saehook.sae_run import SAERun, resolved_settings

SITE = "layers.0.resid_post"
D_IN, D_SAE, BATCH = 12, 38, 54  # sizes that 3 and 4 do not divide
MeshOf = Callable[..., Mesh]


class FirstOfEquals(OneDevice):
    """One device that keeps the first of equal pre-activations: the definition, by a stable sort of everything."""

    def topk(
        self, pre_acts: Tensor, k: int, d_sae: int, widest: int | None = None, *, descending: bool = False
    ) -> kernels.Selection:
        n = len(pre_acts)
        latents = pre_acts.sort(dim=1, descending=True, stable=True).indices[:, :k]
        tokens = torch.arange(n)[:, None].expand(n, k)
        return kernels.Selection(tokens.reshape(-1), latents.reshape(-1), n, d_sae, order="token")

    def batch_topk(self, pre_acts: Tensor, k: int, ends: Sequence[int]) -> kernels.Selection:
        d_sae = ends[-1]
        flat = pre_acts.reshape(-1).sort(descending=True, stable=True).indices[: k * len(pre_acts)]
        return kernels.Selection(flat // d_sae, flat % d_sae, len(pre_acts), d_sae)


# --- selection -------------------------------------------------------------------------------------------------------


def kept(shape: tuple[int, ...], chosen: kernels.Selection, pre_acts: Tensor) -> Tensor:
    """1 for the pairs that are kept and fire."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[chosen.tokens, chosen.latents] = True
    return (mask & ~(pre_acts <= 0)).float()


def pre_activations(seed: int, dtype: torch.dtype) -> Tensor:
    """Some with many equal ones, some with few that are positive, some with numbers that are hardly any."""
    draw = torch.Generator().manual_seed(seed)
    match seed % 4:
        case 0:
            x = torch.randn(BATCH, D_SAE, generator=draw, dtype=torch.float64)
        case 1:
            x = torch.randint(-3, 4, (BATCH, D_SAE), generator=draw).double()
        case 2:
            x = torch.randint(-9, 2, (BATCH, D_SAE), generator=draw).double()
            x[:, D_SAE // 2 :] = -1  # nothing fires there
        case _:
            x = torch.rand(BATCH, D_SAE, generator=draw, dtype=torch.float64).round(decimals=1) * 1e-42
    return x.to(dtype)


def selects(mesh_of: MeshOf, data: int, latent: int) -> int:
    """Both rules against their definitions; the number of cases."""
    mesh = mesh_of(data, latent)
    shards, one = Shards(mesh), FirstOfEquals()
    rows, cases = indices(shards.latents((D_SAE,))), 0
    for dtype, seeds in ((torch.float32, range(5)), (torch.float64, (1,))):
        for seed in seeds:
            whole = pre_activations(seed, dtype)
            part = shards.tokens(whole)[:, rows].contiguous()
            laid_out = (part, part.T.contiguous().T)[seed % 2]  # both layouts that kernels make
            for k in (1, 17, D_SAE):
                expected = shards.tokens(kept(whole.shape, one.topk(whole, k, D_SAE), whole))[:, rows]
                ways = (False, True) if latent.bit_count() == 1 else (False,)
                for butterfly in ways:
                    found = selection.topk(laid_out, k, mesh, D_SAE, shards.widest(D_SAE), butterfly=butterfly)
                    assert torch.equal(kept(part.shape, found, part), expected), (dtype, seed, k, butterfly)
                expected = shards.tokens(kept(whole.shape, one.batch_topk(whole, k, (D_SAE,)), whole))[:, rows]
                found = shards.batch_topk(laid_out, k, (D_SAE,))
                assert torch.equal(kept(part.shape, found, part), expected), (dtype, seed, k)
                cases += 1
    return cases


# --- steps -----------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "topk": {"activation": TopK(k=5), "auxk_coefficient": 0.0},
    "topk, k above a shard": {"activation": TopK(k=21), "auxk_coefficient": 0.0},
    "batchtopk": {"activation": BatchTopK(k=5), "auxk_coefficient": 0.0},
    "topk, auxk": {"activation": TopK(k=4), "dead_after_tokens": BATCH, "k_aux": 6, "k_anneal_steps": 3},
    "batchtopk, auxk": {"activation": BatchTopK(k=3), "dead_after_tokens": 1, "k_aux": 30, "clip_norm": 0.05},
    "jumprelu": {"activation": JumpReLU(), "target_l0": 5.0},
    "jumprelu, coefficient": {"activation": JumpReLU(), "sparsity_coefficient": 0.01, "auxk_coefficient": 0.1, "k_aux": 4,
                              "dead_after_tokens": BATCH, "ema_decay": 0.9},
    "relu": {"activation": ReLU(), "target_l0": 5.0, "clip_norm": 0.3},
    "relu, decoder norm": {"activation": ReLU(), "sparsity_coefficient": 0.02, "decoder_norm_penalty": True},
    "gated": {"activation": Gated(), "target_l0": 4.0},
    "matryoshka": {"activation": Matryoshka(k=4, fractions=(0.25, 0.25, 0.5))},
    "multitopk": {"activation": MultiTopK(k=3, multiple=3), "auxk_coefficient": 0.0},
}  # fmt: skip
ASKED = ("topk", "topk, k above a shard", "batchtopk", "topk, auxk", "batchtopk, auxk", "jumprelu")


def config(name: str, **changes: Any) -> TrainConfig:
    settings = {
        "site": SITE,
        "d_sae": D_SAE,
        "tokens": 100 * BATCH,
        "batch_tokens": BATCH,
        "lr": 3e-3,
        "warmup_steps": 2,
    }
    return TrainConfig(**settings | CONFIGS[name] | changes)


def tokens(n: int, seed: int) -> Tensor:
    """Sums of few directions, float64."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weights = torch.rand(n, 40, generator=draw, dtype=torch.float64)
    return weights * (torch.rand(n, 40, generator=draw) < 0.1) @ directions + 0.05 * torch.randn(
        n, D_IN, generator=draw, dtype=torch.float64
    )


def double_run(settings: TrainConfig, devices: OneDevice, facts: InputFacts) -> SAERun:
    """A run in float64. Latents of the last fifth cannot fire: with four devices one of them has nothing that is active."""
    run = SAERun(settings, "run", facts, devices=devices)
    rows = run.latents
    with torch.no_grad():
        for parameter in run.method.parameters.values():
            parameter.data = parameter.data.double()
        run.sae.b_dec.copy_(facts.center)
        silent = torch.arange(settings.d_sae)[rows] >= settings.d_sae - settings.d_sae // 4
        run.sae.b_enc[silent] = -10.0
    run.method._no_center = run.method._no_center.double()
    run.averages = {name: average.double() for name, average in run.averages.items()}
    before = run.optimizer
    run.optimizer = DecoderConstrainedAdam(
        run.method.parameters,
        lr=before.peak_lr,
        steps=before.steps,
        warmup_steps=before.warmup_steps,
        decay_share=before.decay_share,
        beta1=settings.resolved_adam_beta1,
        eps=settings.adam_eps,
        clip_norm=before.clip_norm,
        unit_rows=run.method.unit_rows,
        devices=devices,
        latents=run.latents,
        eight_bit=settings.moments == "8-bit",
        seed=settings.seed,
    )
    return run


def assert_near(found: Tensor, expected: Tensor, what: Any, tolerance: float = 1e-12) -> None:
    assert found.shape == expected.shape, what
    largest = max(1e-3, float(expected.detach().abs().max())) if expected.numel() else 1.0
    error = float((found - expected).detach().abs().max()) / largest if expected.numel() else 0.0
    assert error <= tolerance, (what, error)


def compare(run: SAERun, whole: SAERun, shards: Shards, what: Any, tolerance: float = 1e-12) -> None:
    """Parameters, gradients (as Adam has them), counters and thresholds of one device against the rows of the whole run."""
    rows = run.latents
    found, _ = run.state()
    for name, expected in whole.state()[0].items():
        part, rest = name.split(".", 1)
        parameter = rest.split(".")[0]
        if part in ("sums", "method") or name == "run.bad" or name == "run.dead":
            continue
        axis = LATENT_AXES.get(parameter, 0 if parameter in ("r_mag", "b_mag", "tokens_since_fired") else None)
        if name == "run.threshold":
            axis = None
        if part == "optimizer":
            axis = None if rest.endswith(".step") or axis is None else 0
        if axis is not None:
            expected = expected.index_select(axis, rows)
        assert_near(found[name].double(), expected.double(), (*what, name), tolerance)


def by_rows(settings: TrainConfig) -> TrainConfig:
    """The same, trained without a gradient of a whole matrix, in which nothing is rounded."""
    object.__setattr__(settings, "moments", "whole")
    return settings


def steps(
    mesh_of: MeshOf, data: int, latent: int, names: tuple[str, ...], n_steps: int, *, rows: bool = False
) -> dict[str, list[float]]:
    """So many steps of each method beside the run of one device; the losses. With `rows` gradients are made row by row here."""
    shards = Shards(mesh_of(data, latent))
    facts = InputFacts.measure(tokens(500, 0), SITE)
    curves = {}
    for name in names:
        run = double_run(by_rows(config(name)) if rows else config(name), shards, facts)
        whole = double_run(config(name), OneDevice(), facts)
        curves[name] = []
        for step in range(n_steps):
            batch = {SITE: tokens(BATCH, 100 + step)}
            run.step(batch)
            whole.step(batch)
            found, expected = run.read_metrics(), whole.read_metrics()
            for key, value in expected.items():
                assert abs(found[key] - value) <= 1e-12 * max(1e-3, abs(value)), (name, step, key, found[key], value)
            curves[name].append(found["loss"])
            if step < 3:
                compare(run, whole, shards, (name, step), 1e-12 if step == 0 else 1e-10)
        if "auxk" in name:
            assert run.metrics["auxk"] > 0, "the auxiliary loss was never at work"
    return curves


def ties(mesh_of: MeshOf, data: int, latent: int) -> list[float]:
    """One step on whole numbers, whose products are exact on any device, so that most pre-activations have equals."""
    shards = Shards(mesh_of(data, latent))
    facts = InputFacts(1.0, torch.zeros(D_IN, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64))
    draw = torch.Generator().manual_seed(3)
    W_enc = torch.randint(-1, 2, (D_IN, D_SAE), generator=draw).double()
    batch = {SITE: torch.randint(-1, 2, (BATCH, D_IN), generator=draw).double()}
    batch[SITE][BATCH // 2 :] = batch[SITE][: BATCH - BATCH // 2]  # equal tokens, on other devices
    losses = []
    for name in ASKED:
        both = []
        for devices in (shards, FirstOfEquals()):
            run = double_run(config(name), devices, facts)
            run.sae.W_enc.data.copy_(W_enc[:, run.latents])
            run.sae.b_enc.data.zero_()
            run.tokens_since_fired[run.latents % 2 == 0] = 10_000  # dead until they fire
            run.step(batch)
            both.append(run)
        compare(both[0], both[1], shards, (name, "ties"))
        found, expected = (run.read_metrics()["loss"] for run in both)
        assert abs(found - expected) <= 1e-12 * abs(expected), name
        losses.append(found)
    return losses


def goes_wrong(mesh_of: MeshOf, data: int, latent: int) -> list[str]:
    """What all processes say of a NaN that one of them meets, and of a batch that one of them has otherwise."""
    shards = Shards(mesh_of(data, latent))
    said = []
    for wrong in ("nan", "other"):
        run = SAERun(config("topk, auxk"), "run", InputFacts.measure(tokens(500, 0).float(), SITE), devices=shards)
        before = {name: parameter.detach().clone() for name, parameter in run.method.parameters.items()}
        x = tokens(BATCH, 1).float()
        if wrong == "nan":
            x[-1, 0] = torch.nan  # the last token, on the last of the devices that share a batch
        elif shards.mesh.rank == data * latent - 1:
            x[0, 0] += 1
        try:
            run.step({SITE: x})
            run.read_metrics()
            said.append("nothing")
        except TrainingError as error:
            said.append(str(error))
        for name, parameter in run.method.parameters.items():
            assert torch.equal(parameter, before[name]), (wrong, name)
        shards = Shards(shards.mesh)
    return said


def some_latents_at_a_time(mesh_of: MeshOf, data: int, latent: int) -> None:
    """The same where the pre-activations of all latents are never there at once, by every method."""
    usual, running.DENSE_ENTRIES = running.DENSE_ENTRIES, 5 * BATCH
    try:
        steps(mesh_of, data, latent, tuple(CONFIGS), 2)
        ties(mesh_of, data, latent)
    finally:
        running.DENSE_ENTRIES = usual


ROWS = ("topk, auxk", "batchtopk, auxk", "jumprelu", "gated", "matryoshka", "multitopk")


def small_checkpoint(mesh_of: MeshOf, data: int, latent: int, folder: str) -> None:
    """Weights in bfloat16 and moments in 8 bits, groups striped over the shards: in a checkpoint all in the order of one device,
    and back."""
    shards, one = Shards(mesh_of(data, latent)), OneDevice()
    facts = InputFacts.measure(tokens(500, 0).float(), SITE)
    settings = config("matryoshka", weights="bfloat16", moments="8-bit", dead_after_tokens=1)
    run, whole = (SAERun(settings, "run", facts, devices=devices) for devices in (shards, one))
    for step in range(3):
        run.step({SITE: tokens(BATCH, 100 + step).float()})
    tensors, numbers = run.state()
    data_of_run = {"configs": [resolved_settings(settings, run.k_aux)], "runs": [numbers]}
    shards.save_state(Path(folder), 3, {f"runs.0.{name}": x for name, x in tensors.items()}, data_of_run)
    for devices, restored in ((one, whole), (shards, SAERun(settings, "run", facts, devices=shards))):
        found, _, _ = devices.load_state(Path(folder))
        restored.load_state({name.removeprefix("runs.0."): x for name, x in found.items()}, numbers)
    for name, expected in tensors.items():
        loaded, axis = whole.state()[0][name], latent_axis(f"runs.0.{name}")
        if name == "run.dead":
            assert torch.equal(loaded[torch.isin(loaded, run.latents)], run.latents[expected])
        elif axis is not None:
            assert torch.equal(loaded.index_select(axis, run.latents), expected), name
    assert found["runs.0.optimizer.W_enc.exp_avg"].dtype == torch.uint8
    assert found["runs.0.parameters.W_dec"].dtype == torch.bfloat16


def every_saving(mesh_of: MeshOf, data: int, latent: int, folder: str) -> None:
    """What saves memory."""
    small_checkpoint(mesh_of, data, latent, folder)
    some_latents_at_a_time(mesh_of, data, latent)
    steps(mesh_of, data, latent, ROWS, 2, rows=True)


def two_shards(mesh_of: MeshOf, folder: str) -> None:
    """In one world, since starting it costs most."""
    small_checkpoint(mesh_of, 1, 2, folder)
    steps(mesh_of, 1, 2, ROWS, 2, rows=True)
    some_latents_at_a_time(mesh_of, 1, 2)
    ties(mesh_of, 1, 2)
    steps(mesh_of, 1, 2, ASKED, 3)


# --- curves, checkpoints, bytes --------------------------------------------------------------------------------------

CURVES = ("topk, auxk", "batchtopk, auxk", "jumprelu")


def part_of_a_curve(
    mesh_of: MeshOf | None, data: int, latent: int, folder: str, first: int, end: int
) -> list[list[float]]:
    """The losses of some steps of `CURVES`, from the checkpoint in the folder if they are not the first; then another one.
    Without `mesh_of` on one device without torch.distributed."""
    devices = OneDevice() if mesh_of is None else Shards(mesh_of(data, latent))
    facts = InputFacts.measure(tokens(500, 0), SITE)
    runs = [double_run(config(name, lr=1e-3), devices, facts) for name in CURVES]
    if first:
        tensors, found, _ = devices.load_state(Path(folder))
        for i, run in enumerate(runs):
            prefix = f"runs.{i}."
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            run.load_state(own, found["runs"][i])
    losses: list[list[float]] = [[] for _ in runs]
    for step in range(first, end):
        for run, curve in zip(runs, losses, strict=True):
            run.step({SITE: tokens(BATCH, 1000 + step)})
            curve.append(run.read_metrics()["loss"])
    tensors, kept = {}, {"configs": [{"d_sae": D_SAE}] * len(runs), "runs": []}
    for i, run in enumerate(runs):
        own, numbers = run.state()
        tensors |= {f"runs.{i}.{name}": x for name, x in own.items()}
        kept["runs"].append(numbers)
    devices.save_state(Path(folder), end, tensors, kept)
    return losses


def bytes_sent(mesh_of: MeshOf, data: int, latent: int, settings: TrainConfig, d_in: int) -> dict[str, int]:
    """What one process sends in its second step, by what for; see `simulated_mesh`."""
    shards = Shards(mesh_of(data, latent))
    x = torch.randn(settings.resolved_batch_tokens, d_in, generator=torch.Generator().manual_seed(0))
    run = SAERun(settings, "run", InputFacts.measure(x, settings.site), devices=shards)
    run.step({settings.site: x})
    shards.mesh.sent.clear()
    run.step({settings.site: x})
    return dict(shards.mesh.sent)


def train(mesh_of: MeshOf, data: int, latent: int, folder: str, resume: bool, stop_after: int | None) -> list[Any]:
    """A whole run of the trainer on made-up activations, maybe stopped; of each SAE its tensors and what it says."""
    import warnings

    from planted import planted

    from saehook.errors import TrainingInterrupted
    from saehook.trainer import Trainer

    shards = Shards(mesh_of(data, latent))
    whole = planted(11_000)[0]

    def batches() -> Iterator[Tensor]:
        for i, part in enumerate(whole.split(100)):
            if stop_after is not None and 100 * i >= stop_after and shards.mesh.rank == data * latent - 1:
                trainer.stop()  # on one process only: all stop
            yield part

    settings: dict[str, Any] = {
        "site": "s",
        "tokens": 9600,
        "batch_tokens": 150,
        "calibration_tokens": 1000,
        "lr": 1e-3,
    }
    configs = [
        TrainConfig(activation=BatchTopK(k=3), d_sae=50, dead_after_tokens=600, **settings),
        TrainConfig(activation=TopK(k=3), d_sae=40, **settings),
        TrainConfig(activation=JumpReLU(), target_l0=3.0, d_sae=30, **settings),
    ]
    trainer = Trainer(
        configs, batches(), d_in=24, log_dir=folder, checkpoint_dir=f"{folder}/c", progress=False, devices=shards
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saes = trainer.fit(resume=resume)
    except TrainingInterrupted as error:
        return [str(error)]
    found = [sae.whole() if isinstance(sae, ShardedSAE) else sae for sae in saes]
    return [
        (dict(sae.named_parameters()), sae.metadata, vars(sae.stats), sae.config)
        for sae in found
        if sae is not None and sae.stats is not None
    ]
