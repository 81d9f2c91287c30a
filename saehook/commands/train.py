"""`saehook train`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehook.commands.shared import add_text, documents_of_setting, held_out_text, load_lm, whole_number
from saehook.config import MAX_NORM_RATIO, MESH_TIMEOUT_SECONDS, METHODS, TrainConfig, activation_to_dict, count
from saehook.errors import ArgumentError
from saehook.loggers import LOGGERS, check_loggers

if TYPE_CHECKING:
    from saehook.devices import OneDevice
    from saehook.sae import SAE

HELP = "train SAEs on text"
RUN = "run.json"
"""In the folder of a training run: its settings, for `--resume`."""
TRAIN_TOKENS, EVAL_TOKENS = "600k", "50k"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `train`; those for the fields of TrainConfig are made from its definition. None: not given."""
    add_text(sub, "to train on (default: Python source installed on this machine)", TRAIN_TOKENS, preset=False)
    sub.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="settings from a file, names as here with _; lists are swept, one SAE per combination",
    )
    sub.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run in this folder, after it was stopped or killed"
    )
    sub.add_argument(
        "--mesh",
        metavar="MESH",
        help="share the work among the processes that torchrun or accelerate launch started: latent=8 shares the latents of\n"
        "each SAE, data=4,latent=8 also the tokens of each batch (default: data=all of them)",
    )
    sub.add_argument(
        "--mesh-timeout",
        type=float,
        default=MESH_TIMEOUT_SECONDS,
        metavar="N",
        help=f"seconds after which a process that does not answer is taken for dead (default: {MESH_TIMEOUT_SECONDS:g})",
    )
    sub.add_argument("--site", nargs="+", metavar="SITE", help="sites or patterns (default: resid_post at half depth)")
    sub.add_argument("--activation", choices=sorted(METHODS), help="training method (default: batchtopk)")
    sub.add_argument(
        "--k",
        type=int,
        help="latents per token, on average for batchtopk; for relu, jumprelu and gated the L0 to aim at (default: 32)",
    )
    sub.add_argument(
        "--d-sae", type=whole_number, metavar="N", help="number of latents (default: 16 x the site's width)"
    )
    sub.add_argument("--out", type=Path, metavar="DIR", help="one folder per SAE is written below (default: runs/sae)")
    sub.add_argument(
        "--eval-text",
        nargs="+",
        metavar="TEXT",
        help="held-out text, written like --text; a dataset is read as far as --eval-tokens asks for\n"
        "(default: held-out modules of the standard library)",
    )
    sub.add_argument(
        "--eval-tokens", type=whole_number, metavar="N", help=f"0 skips the evaluation (default: {EVAL_TOKENS})"
    )
    sub.add_argument(
        "--repeat", action="store_true", default=None, help="begin the text again when it ends before --tokens"
    )
    sub.add_argument(
        "--skip-first-tokens",
        type=whole_number,
        metavar="N",
        help="leave out so many tokens at the start of each window (default: 0)",
    )
    sub.add_argument(
        "--max-norm-ratio",
        type=float,
        metavar="N",
        help=f"leave out tokens with more than so many times the median norm; 0 is off (default: {MAX_NORM_RATIO:g})",
    )
    sub.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the stored weights (default: float32)")
    sub.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep the activations here, so that the next run needs no pass of the LM",
    )
    sub.add_argument("--checkpoint-seconds", type=float, metavar="N", help="time between checkpoints (default: 600)")
    sub.add_argument(
        "--log",
        nargs="+",
        choices=list(LOGGERS),
        help="show the curves there, too: tensorboard (tensorboard --logdir OUT/tensorboard), wandb (project and mode by\n"
        "its variables WANDB_PROJECT, WANDB_MODE). Each is an extra: pip install 'saehook[tensorboard]'",
    )
    documentation = _field_documentation(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        if field.name in {"site", "activation", "d_sae", "tokens"}:
            continue
        kind = typing.get_type_hints(TrainConfig)[field.name]
        kinds = set(typing.get_args(kind)) if isinstance(kind, types.UnionType) else {kind}
        text = documentation[field.name].replace("`", "").replace("%", "%%")
        name = f"--{field.name.replace('_', '-')}"
        if bool in kinds:
            sub.add_argument(name, action="store_true", default=None, help=text)
            continue
        if str in kinds:
            sub.add_argument(name, metavar=field.name.removesuffix("_out").upper(), help=text)
            continue
        default = "" if field.default is None else f" (default: {field.default:g})"
        sub.add_argument(name, type=whole_number if int in kinds else float, metavar="N", help=text + default)


def _field_documentation(config: type) -> dict[str, str]:
    """The string under each field of a config class."""
    import ast

    body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[ast.unparse(statement.target)] = " ".join(ast.literal_eval(following.value).split())
    return texts


def run(arguments: argparse.Namespace) -> None:
    """Train SAEs on the activations of a language model; several sites share one pass of the model.

    saehook train --site layers.2.resid_post --tokens 2M                 bundled model, installed Python source
    saehook train --lm DIR --site 'layers.{2,4}.resid_post' --activation topk --k 16 --d-sae 1024 --tokens 2M \\
                  --text FILE ... --out DIR
    saehook train --config sweep.yaml                                    sites x methods x k x seeds, one pass
    saehook train --init DIR --tokens 1M --lr 1e-5                       go on from the weights of a finished SAE
    saehook train --resume DIR                                           after Ctrl-C, kill -9, a full disk
    torchrun --nproc-per-node 8 -m saehook train ... --mesh latent=8     one SAE too large for one device
    """
    if arguments.mesh is None and int(os.environ.get("WORLD_SIZE") or 1) == 1:
        from saehook.devices import ONE_DEVICE

        return _train(arguments, ONE_DEVICE)
    from saehook.distributed.session import session

    with session(arguments.mesh, arguments.mesh_timeout) as devices:
        _train(arguments, devices)


def _train(arguments: argparse.Namespace, devices: OneDevice) -> None:
    import torch

    from saehook import corpus
    from saehook.checkpoint import load_sae
    from saehook.files import atomic_write
    from saehook.sweep import expand
    from saehook.training_run import check_unused, train_saes

    settings, out = _training_settings(arguments)
    resume = arguments.resume is not None or _restarted(out)
    if (dtype := settings.get("dtype", "float32")) not in ("float32", "bfloat16"):
        raise ArgumentError(f"dtype {dtype!r} is unknown; float32 or bfloat16 is expected.")
    model = load_lm(argparse.Namespace(lm=settings.get("lm")))
    half = max(0, model.lm.config.get_text_config().num_hidden_layers // 2 - 1)
    if arguments.resume is None and isinstance(settings.get("init"), str):
        settings = {
            **_settings_of(load_sae(settings["init"])),
            **settings,
        }  # kept, so that --resume needs no such folder
    configs = expand(
        {"site": f"layers.{half}.resid_post", "tokens": TRAIN_TOKENS, **settings},
        lambda pattern: [site.name for site in model.sites(pattern)],
        lambda site: model.width(model.sites(site)[0]),
    )
    documents = documents_of_setting(settings, "text")
    if documents is None:
        documents = list(corpus.read_documents(corpus.python_files()))
    eval_tokens = count(settings.get("eval_tokens", EVAL_TOKENS))
    held_out = held_out_text(documents_of_setting(settings, "eval_text"), eval_tokens, model) if eval_tokens else None
    check_loggers(_listed(settings.get("log", [])))
    if not resume:

        def begin() -> None:
            check_unused(out)
            atomic_write(out / RUN, json.dumps(settings, indent=1) + "\n")

        devices.main_does(begin)
    run = train_saes(
        model,
        configs,
        documents,
        out,
        held_out=held_out,
        repeat=bool(settings.get("repeat")),
        skip_first_tokens=count(settings.get("skip_first_tokens", 0)),
        max_norm_ratio=_number(settings, "max_norm_ratio", MAX_NORM_RATIO),
        dtype=getattr(torch, dtype),
        cache=None if settings.get("cache") is None else Path(settings["cache"]),
        resume=resume,
        devices=devices,
        log=_listed(settings.get("log", [])),
        **({"checkpoint_seconds": settings["checkpoint_seconds"]} if "checkpoint_seconds" in settings else {}),
    )
    if not devices.is_main:
        return
    if run.evaluation is not None:
        print(run.evaluation.table())
    for one in run.saes:
        print(f"wrote {one.folder}")
    print(f"report in {out / 'report.html'}")


def _restarted(out: Path) -> bool:
    """Whether torchrun started all processes again after one failed, and there is something to go on from."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0 and any((out / "checkpoints").glob("step-*"))


def _training_settings(arguments: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """What to train, from `--resume`, or from `--config` and the options that were given; and the run's folder.

    Paths are made absolute, so that a run can be resumed from elsewhere.
    """
    from saehook.sweep import RUN_SETTINGS, SAE_SETTINGS, read_settings

    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in SAE_SETTINGS | RUN_SETTINGS and value is not None
    }
    if arguments.resume is not None:
        if given or arguments.config:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in [*given, *["config"] * bool(arguments.config)])
            raise ArgumentError(f"a resumed run keeps its settings, so {names} cannot be given with --resume.")
        file = arguments.resume / RUN
        if not file.is_file():
            raise ArgumentError(
                f"{arguments.resume} holds no run to resume (no {RUN}). Name the --out of a training run."
            )
        return json.loads(file.read_text(encoding="utf-8")), arguments.resume
    settings = {**(read_settings(arguments.config) if arguments.config else {}), **given}
    out = Path(settings.pop("out", "runs/sae"))
    for name in ("lm", "text", "eval_text"):
        if (value := settings.get(name)) is not None:
            paths = [str(Path(p).resolve()) if Path(p).exists() else str(p) for p in _listed(value)]
            settings[name] = paths[0] if name == "lm" else paths
    for name in ("cache", "init"):
        if isinstance(settings.get(name), (str, Path)):
            settings[name] = str(Path(settings[name]).resolve())
    return settings, out


def _settings_of(sae: SAE) -> dict[str, Any]:
    """Settings that train an SAE like this one, as far as its file says."""
    facts = activation_to_dict(sae.config.activation)
    settings = {"activation": facts.pop("name"), **facts, "d_sae": sae.d_sae, "skip": sae.config.skip or None}
    settings |= {"site": sae.site, "site_out": sae.site_out}
    return {name: value for name, value in settings.items() if value is not None}


def _number(settings: dict[str, Any], name: str, default: float) -> float:
    """A setting as a number; YAML reads some, such as 1e3, as text."""
    try:
        return float(settings.get(name, default))
    except (TypeError, ValueError):
        raise ArgumentError(f"{name} = {settings[name]!r} is no number.") from None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
