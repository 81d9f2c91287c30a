"""`saehook generate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehook.commands.shared import add_json, add_mesh, add_saes, attach, on_mesh, whole_number, write_json
from saehook.errors import ArgumentError, SaehookError

if TYPE_CHECKING:
    from saehook.devices import OneDevice

HELP = "continue a text, with or without edits"
DEFAULT_PROMPT = "def load(path):\n"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `generate`."""
    add_saes(sub)
    add_mesh(sub)
    sub.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT, help="text to continue")
    sub.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message, put into the model's chat template"
    )
    sub.add_argument(
        "--edits", metavar="FILE", help="a program file, hf:owner/name[,revision=..], or bare edits (Program.to_json)"
    )
    sub.add_argument(
        "--save-program", type=Path, metavar="FILE", help="also write the edits as a program file, to be replayed"
    )
    for name, text in (
        ("steer", "add AMOUNT to a latent: --steer 123=0.5max, --steer 'layers.2.resid_post/123=4'"),
        ("clamp", "set a latent: --clamp 123=2"),
        ("scale", "multiply a latent: --scale 123=0"),
        ("ablate", "set a latent to 0: --ablate 123"),
        ("at-least", "raise a latent where it is below: --at-least 123=0.5max"),
        ("at-most", "lower a latent where it is above: --at-most 123=0.5max"),
        ("to-mean", "set a latent to its recorded mean: --to-mean 123"),
    ):
        sub.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="[SITE/]LATENT=AMOUNT" if name not in {"ablate", "to-mean"} else "[SITE/]LATENT",
            help=text,
        )
    sub.add_argument(
        "--where",
        choices=["everywhere", "prompt", "generation"],
        default="everywhere",
        help="tokens that the edits above act on",
    )
    sub.add_argument("--splice", action="store_true", help="put every SAE's reconstruction in")
    sub.add_argument(
        "--error", choices=["keep", "drop", "mean"], help="reconstruction error on edited tokens (default: keep)"
    )
    sub.add_argument("--max-new-tokens", type=whole_number, default=64, metavar="N", help="default: 64")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sub.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens of this probability (default: all)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    sub.add_argument(
        "--report",
        choices=["full"],
        help="also measure latents before and after, those that moved besides, the KL of the next tokens, and where the\n"
        "text leaves the unedited one",
    )
    add_json(sub)


def run(arguments: argparse.Namespace) -> None:
    """Continue a text, with edits of latents if any are given; the same edits as in Python and on the page.

    saehook generate "def load(path):" --steer 123=0.5max --max-new-tokens 40
    saehook generate --edits program.json --temperature 0.7 --seed 1
    saehook generate "def load(path):" --steer 123=0.5max --save-program program.json
    torchrun --nproc-per-node 8 -m saehook generate ... --sae DIR --mesh latent=8      an SAE too large for one device
    """
    with on_mesh(arguments) as devices:
        if arguments.save_program is not None and getattr(devices, "mesh", None) is not None:
            raise ArgumentError("--save-program writes a file from one process. Run it without --mesh.")
        _run(arguments, devices)


def _run(arguments: argparse.Namespace, devices: OneDevice) -> None:
    import warnings

    from saehook.errors import NoEffectWarning
    from saehook.interventions import Program
    from saehook.program_file import load_edits
    from saehook.replay import compare_files, save_program

    if arguments.chat and arguments.save_program is not None:
        raise ArgumentError(
            "--save-program keeps a prompt that is plain text. Leave out --chat, or keep no program file."
        )
    program, file = Program(splice=arguments.splice, error=arguments.error), None
    if arguments.edits is not None:
        program, file = load_edits(arguments.edits)
        program = dataclasses.replace(
            program, splice=program.splice or arguments.splice, error=arguments.error or program.error
        )
    hooked, _ = attach(arguments, devices)
    if file is not None:
        for difference in compare_files(hooked, file)[0]:
            print(f"note: {difference}", file=sys.stderr)
    program = dataclasses.replace(program, edits=[*program.edits, *_edits(arguments)])
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
        if arguments.temperature > 0
        else {"do_sample": False}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # said below
        result = hooked.generate(
            [{"role": "user", "content": arguments.prompt}] if arguments.chat else arguments.prompt,
            edits=program,
            seed=arguments.seed,
            report=arguments.report,
            max_new_tokens=arguments.max_new_tokens,
            **sampling,
        )
        if arguments.save_program is not None:
            save_program(hooked, program, arguments.save_program, prompt=arguments.prompt)
    print(arguments.prompt + result.text)
    print(f"\n{result.report}", file=sys.stderr)
    for note in result.report.notes():
        print(f"note: {note}", file=sys.stderr)
    data = {
        "prompt": arguments.prompt,
        "text": result.text,
        "ids": result.ids.tolist(),
        "new_ids": result.new_ids.tolist(),
        **result.report.to_data(),
    }
    write_json(arguments.json, json.dumps(data, indent=1))


def _edits(arguments: argparse.Namespace) -> list[Any]:
    """The edits of --steer, --clamp, --scale, --ablate, --at-least, --at-most and --to-mean, in that order."""
    from saehook import edits as named
    from saehook.where import generation, prompt

    where = {"everywhere": None, "prompt": prompt(), "generation": generation()}[arguments.where]
    makers = {"steer": named.steer, "clamp": named.clamp, "scale": named.scale, "ablate": named.ablate}
    makers |= {"at-least": named.at_least, "at-most": named.at_most, "to-mean": named.to_mean}
    edits = []
    for name, make in makers.items():
        for text in getattr(arguments, name.replace("-", "_")):
            site, _, rest = text.rpartition("/")
            latent, equals, amount = rest.partition("=")
            unit = next((u for u in ("max", "norm", "quantile", "raw") if amount.endswith(u)), "")
            try:
                values = [] if name in {"ablate", "to-mean"} and not equals else [float(amount.removesuffix(unit))]
                options = {"unit": unit} if unit else {}
                edits.append(make(int(latent), *values, site=site or None, where=where, **options))
            except (TypeError, ValueError) as error:
                if isinstance(error, SaehookError):
                    raise
                raise ArgumentError(
                    f"--{name} {text} is not understood; expected for example --{name} 123=0.5."
                ) from None
    return edits
