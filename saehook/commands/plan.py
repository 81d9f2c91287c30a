"""`saehook plan`."""

from __future__ import annotations

import argparse
import json

from saehook.bundle import bundled
from saehook.commands.shared import add_json, whole_number, write_json
from saehook.config import count
from saehook.plan import DEVICES, Layout, Plan, Training, best_plan, devices_of, plans, width_of

HELP = "memory, operations, bytes on the wire and days of a training, before it starts"
CEILINGS = {
    "flops": "operations a second of a bf16 product",
    "memory": "bytes that may be filled",
    "memory-bandwidth": "bytes a second of its memory",
    "link": "bytes a second to others of its node",
    "network": "bytes a second of a whole node to others",
}


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `plan`."""
    sub.add_argument(
        "--d-in", type=whole_number, metavar="N", help="width of the site (default: of the model's stream)"
    )
    sub.add_argument("--d-sae", type=whole_number, metavar="N", help="latents, e.g. 16M or 2**24 (default: 32 d_in)")
    for name, default, text in (
        ("k", "32", "latents kept a token"),
        ("k-aux", "0", "dead latents that AuxK decodes a token"),
        ("tokens", "1B", "tokens of the training"),
        ("batch-tokens", "131072", "tokens of a step, all devices together"),
        ("data", "1", "replicas that share the batch; the other devices share the latents"),
    ):
        preset = count(default)
        sub.add_argument(
            f"--{name}", type=whole_number, default=preset, metavar="N", help=f"{text} (default: {default})"
        )
    known = ", ".join(DEVICES)
    sub.add_argument(
        "--devices", default="1xH200", metavar="NxNAME", help=f"e.g. 64xH200 (known: {known}; default: 1xH200)"
    )
    for name, text in CEILINGS.items():
        sub.add_argument(f"--{name}", type=float, metavar="X", help=f"what a device measures: {text}")
    sub.add_argument("--per-node", type=whole_number, metavar="N", help="devices of a node (default: 8)")
    add_json(sub)


def run(arguments: argparse.Namespace) -> None:
    """What training one TopK SAE costs: arithmetic only, nothing runs. What cannot fit is refused, with what would.

    saehook plan --d-in 12288 --d-sae 16M --k 32 --tokens 40B --devices 64xH200
    saehook plan --lm DIR --d-sae 65536 --tokens 1B --devices 8xH200 --flops 6.1e14
    """
    a = arguments
    d_in = width_of(a.lm or bundled("lm")) if a.d_in is None else a.d_in
    training = Training(
        d_in=d_in,
        d_sae=32 * d_in if a.d_sae is None else a.d_sae,
        k=a.k,
        tokens=a.tokens,
        batch_tokens=a.batch_tokens,
        k_aux=a.k_aux,
    )
    names = [*(name.replace("-", "_") for name in CEILINGS), "per_node"]
    ceilings, number = devices_of(a.devices, **{name: getattr(a, name) for name in names})
    layout = Layout(ceilings, number, a.data)
    best = best_plan(training, layout)
    print(text_of(best, plans(training, layout)))
    write_json(a.json, json.dumps(numbers_of(best), indent=1))


def text_of(plan: Plan, every: list[Plan]) -> str:
    """The plan in words."""
    t, layout = plan.training, plan.layout
    replicas = f", {layout.data} replicas" if layout.data > 1 else ""
    lines = [
        f"{t.d_in:,} -> {t.d_sae:,} latents, k = {t.k}, {t.tokens:,} tokens in {t.steps:,} steps of {t.batch_tokens:,}",
        f"{layout.devices} x {layout.ceilings.name}{replicas}: {plan.latents:,.0f} latents on each",
        "",
        f"operations        {t.flops:.2e} in all, {t.product_flops:.2e} a step in the encoder's product",
        "memory a device   with",
        *(
            f"  {p.memory / 1e9:10,.1f} GB {'fits' if p.fits else '-':4}  {p.storage.bytes} bytes a parameter: {p.storage.name}"
            f"{' <- taken' if p.storage == plan.storage else ''}"
            for p in every
        ),
        f"  of {layout.ceilings.memory / 1e9:,.0f} GB that may be filled, {plan.buffers / 1e9:,.1f} GB buffers included",
        f"never held        {plan.whole_pre_acts / 1e9:,.1f} GB pre-activations"
        + (f", {plan.dense_gradient / 1e9:,.1f} GB gradients" if plan.storage != every[0].storage else ""),
        f"wire a step       {plan.activation_bytes / 1e9:,.2f} GB activations, {plan.topk_bytes / 1e9:,.2f} GB top-k, "
        f"{plan.gradient_bytes / 1e9:,.2f} GB gradients",
        *([f"train with        {plan.storage.options}"] if plan.storage.options else []),
        "time a step       " + ", ".join(f"{name} {1e3 * seconds:,.1f} ms" for name, seconds in plan.parts.items()),
        f"binds             {plan.binds}",
        f"run               {duration(plan.days)} with all else hidden behind it, {duration(plan.days_in_turn)} in turn",
        f"cached            {t.cached_bytes / 1e12:,.2f} TB of activations in bf16, read at {plan.read_rate / 1e9:,.2f} GB/s",
    ]
    if layout.latent > 1 and plan.latents < plan.least_latents:
        lines.append(
            f"note: below {plan.least_latents:,.0f} latents a device sending takes longer than multiplying. Give each device an "
            "SAE of its own, or use fewer."
        )
    if layout.devices > 1 and max(plan.best_data, layout.data) >= 2 * max(1.0, min(plan.best_data, layout.data)):
        lines.append(f"note: least is sent with about {max(1, round(plan.best_data))} replicas (--data).")
    return "\n".join(lines)


def duration(days: float) -> str:
    """In the unit that reads best."""
    for size, unit in ((1.0, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= 1.5 * size:
            return f"{days / size:,.1f} {unit}"
    return f"{days * 86_400:,.1f} seconds"


def numbers_of(plan: Plan) -> dict[str, object]:
    """The plan as plain data: bytes, seconds a step, days."""
    facts = {
        name: getattr(part, name)
        for part in (plan.training, plan)
        for name, value in vars(type(part)).items()
        if isinstance(value, property) and name != "parts"
    }
    devices = {"devices": plan.layout.devices, "data": plan.layout.data, "device": vars(plan.layout.ceilings)}
    return vars(plan.training) | devices | facts | {"storage": plan.storage._asdict(), "seconds": plan.parts}
