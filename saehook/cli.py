"""`saehook demo | eval | train | generate | replay | export | stats | sites`.

Every command works on the bundled files without further arguments. Heavy packages are imported by the command that needs
them, so `saehook --help` is instant.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehook import program_commands
from saehook.bundle import bundled
from saehook.config import MAX_NORM_RATIO, METHODS, TrainConfig, activation_to_dict, count
from saehook.errors import ArgumentError, SaehookError, TrainingInterrupted
from saehook.loggers import LOGGERS, check_loggers

if TYPE_CHECKING:
    from saehook.corpus import Document
    from saehook.dataset_text import DatasetText
    from saehook.hooked_model import HookedModel
    from saehook.hooked_saes import HookedSAEs
    from saehook.sae import SAE
    from saehook.tokenization import Windows

DEFAULT_PROMPT = "def load(path):\n"
RUN = "run.json"
"""In the folder of a training run: its settings, for `--resume`."""
TRAIN_TOKENS, EVAL_TOKENS = "600k", "50k"
TEXT_HELP = """text files, .jsonl (one {"text": ...} a line), folders of them, or one Hugging Face dataset, streamed:
hf:NAME[,config=..][,split=train][,column=text][,skip=N][,take=N][,revision=..], NAME on the hub or a folder
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all went well, 1 where a replay drifted, 2 for a mistake in what was asked for (said on stderr)."""
    arguments = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        return arguments.run(arguments) or 0
    except TrainingInterrupted as error:
        print(f"\nsaehook {arguments.command}: {error}", file=sys.stderr)
        return 130
    except (SaehookError, OSError) as error:
        print(f"saehook {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saehook",
        description="Sparse autoencoders on the activations of a language model: train them, evaluate them, edit the "
        "model through them. Every command works on the bundled model and SAEs when it is given no arguments.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=inspect.cleandoc(run.__doc__), formatter_class=argparse.RawTextHelpFormatter
        )
        sub.set_defaults(run=run)
        sub.add_argument("--lm", metavar="LM", help="language model: a folder or a hub id (default: the bundled one)")
        return sub

    def add_saes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--sae", nargs="+", metavar="DIR", help="SAE folders (default: the bundled ones)")

    def add_text(sub: argparse.ArgumentParser, what: str, tokens: str, *, preset: bool = True) -> None:
        sub.add_argument("--text", nargs="+", metavar="TEXT", help=f"{TEXT_HELP} {what}")
        default = count(tokens) if preset else None
        sub.add_argument(
            "--tokens", type=_count, default=default, metavar="N", help=f"tokens, e.g. 100k (default: {tokens})"
        )

    def add_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")

    sub = command("demo", demo, "evaluate the bundled SAEs, then serve the live page")
    add_saes(sub)
    add_text(sub, "to evaluate on (default: held-out modules of the standard library)", "8k")
    add_json(sub)
    sub.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    sub.add_argument("--port", type=int, default=7860, help="port to serve on (default: 7860)")
    sub.add_argument("--no-serve", action="store_true", help="stop after the table")

    sub = command("eval", evaluate, "what the model loses when reconstructions take the place of activations")
    add_saes(sub)
    add_text(sub, "(default: held-out modules of the standard library)", "100k")
    add_json(sub)

    sub = command("train", train, "train SAEs on text")
    add_text(sub, "to train on (default: Python source installed on this machine)", TRAIN_TOKENS, preset=False)
    _add_training(sub)

    sub = command("generate", generate, "continue a text, with or without edits")
    add_saes(sub)
    sub.add_argument("prompt", nargs="?", default=DEFAULT_PROMPT, help="text to continue")
    _add_generation(sub)
    add_json(sub)

    sub = command("replay", program_commands.replay, "say whether a program still does what it did where it was made")
    program_commands.add_program(sub)
    add_saes(sub)
    add_json(sub)

    sub = command("export", program_commands.export, "write a program into plain weights, or a vector for llama.cpp")
    program_commands.add_program(sub)
    add_saes(sub)
    program_commands.add_export(sub)

    sub = command("stats", stats, "measure each latent's maximum and density, for strengths in units of the maximum")
    sub.add_argument("sae", nargs="*", metavar="SAE", help="SAE folders (default: the bundled ones)")
    add_text(sub, "to measure on (default: Python source installed on this machine)", "100k")

    sub = command("sites", sites, "list the places of a model where SAEs attach, with their widths")
    sub.add_argument("pattern", nargs="?", help="only those, e.g. 'layers.*.resid_post'")
    add_json(sub)
    return parser


def _count(text: str) -> int:
    try:
        return count(text)
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_training(sub: argparse.ArgumentParser) -> None:
    """Options of `train`; those for the fields of TrainConfig are made from its definition. None: not given."""
    sub.add_argument(
        "--config",
        type=Path,
        metavar="YAML",
        help="settings from a file, names as here with _; lists are swept, one SAE per combination",
    )
    sub.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run in this folder, after it was stopped or killed"
    )
    sub.add_argument("--site", nargs="+", metavar="SITE", help="sites or patterns (default: resid_post at half depth)")
    sub.add_argument("--activation", choices=sorted(METHODS), help="training method (default: batchtopk)")
    sub.add_argument(
        "--k",
        type=int,
        help="latents per token, on average for batchtopk; for relu, jumprelu and gated the L0 to aim at (default: 32)",
    )
    sub.add_argument("--d-sae", type=_count, metavar="N", help="number of latents (default: 16 x the site's width)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="one folder per SAE is written below (default: runs/sae)")
    sub.add_argument(
        "--eval-text",
        nargs="+",
        metavar="TEXT",
        help="held-out text, written like --text; a dataset is read as far as --eval-tokens asks for\n"
        "(default: held-out modules of the standard library)",
    )
    sub.add_argument("--eval-tokens", type=_count, metavar="N", help=f"0 skips the evaluation (default: {EVAL_TOKENS})")
    sub.add_argument(
        "--repeat", action="store_true", default=None, help="begin the text again when it ends before --tokens"
    )
    sub.add_argument(
        "--skip-first-tokens",
        type=_count,
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
        sub.add_argument(name, type=_count if int in kinds else float, metavar="N", help=text + default)


def _field_documentation(config: type) -> dict[str, str]:
    """The string under each field of a config class."""
    import ast

    body = ast.parse(inspect.getsource(config)).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for statement, following in zip(body, body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            texts[ast.unparse(statement.target)] = " ".join(ast.literal_eval(following.value).split())
    return texts


def _add_generation(sub: argparse.ArgumentParser) -> None:
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
    sub.add_argument("--max-new-tokens", type=_count, default=64, metavar="N", help="default: 64")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sub.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    sub.add_argument(
        "--report",
        choices=["full"],
        help="also measure latents before and after, those that moved besides, the KL of the next tokens, and where the\n"
        "text leaves the unedited one",
    )


# --- what the commands share ------------------------------------------------------------------------------------------


def _load_lm(arguments: argparse.Namespace) -> HookedModel:
    from transformers.utils import logging

    from saehook.hooked_model import HookedModel

    logging.disable_progress_bar()
    return HookedModel.from_pretrained(str(arguments.lm or bundled("lm")))


def _sae_folders(arguments: argparse.Namespace) -> list[Path]:
    if arguments.sae:
        return [Path(folder) for folder in arguments.sae]
    if arguments.lm:
        raise ArgumentError("the bundled SAEs belong to the bundled model. Name the SAEs of this one with --sae DIR.")
    return [bundled("sae"), bundled("sae-mlp")]


def _attach(arguments: argparse.Namespace) -> tuple[HookedSAEs, dict[str, Path]]:
    """The model with the SAEs attached, and the folder of each by site."""
    from saehook.checkpoint import load_sae

    model = _load_lm(arguments)
    saes, folders = {}, {}
    for folder in _sae_folders(arguments):
        sae = load_sae(folder)
        if sae.site is None:
            raise ArgumentError(
                f"{folder} does not say which site it belongs to; attach it in Python with the site's name."
            )
        if sae.site in saes:
            raise ArgumentError(f"{folders[sae.site]} and {folder} are both for {sae.site}. Give one SAE per site.")
        saes[sae.site], folders[sae.site] = sae, folder
    return model.attach(saes), folders


def _held_out(documents: Iterable[Document] | None, tokens: int, model: HookedModel) -> Windows:
    """Windows of the text, or of the held-out modules."""
    from saehook import corpus
    from saehook.tokenization import window_size, windows

    if documents is None:
        documents = corpus.read_documents(corpus.held_out_files())
    found = windows(documents, model.tokenizer, window_size(model.context), max_tokens=tokens)
    if (dataset := found.dataset) is not None:
        print(
            f"note: of {dataset['name']} ({dataset['split']}) {found.documents:,} documents are used.", file=sys.stderr
        )
    return found


def _documents(settings: dict[str, Any], name: str) -> Sequence[Document] | DatasetText | None:
    """The documents of `text` or `eval_text`, None where it is not given. Of a dataset the settings then hold the commit or
    folder of today, for `--resume`."""
    from saehook.dataset_text import DatasetText, documents_of

    if settings.get(name) is None:
        return None
    documents = documents_of(settings[name])
    if isinstance(documents, DatasetText):
        settings[name] = [documents.spec]
    return documents


def _note_other_text(hooked: HookedSAEs, text: Windows) -> None:
    """Say when the default text is not the one that the files' numbers come from."""
    for site, sae in hooked.saes.items():
        recorded = sae.metadata.get("evaluation", {}).get("text_sha256")
        if recorded and recorded != text.text_sha256:
            print(
                f"note: the SAE at {site} was evaluated on other text (sha256 {recorded[:12]}, here {text.text_sha256[:12]}); "
                "the standard library differs between Python versions.",
                file=sys.stderr,
            )


def _write_json(path: Path | None, text: str) -> None:
    if path is not None:
        from saehook.files import atomic_write

        atomic_write(path, text + "\n")


# --- the commands -----------------------------------------------------------------------------------------------------


def demo(arguments: argparse.Namespace) -> None:
    """Evaluate the SAEs by splicing them into the model, print the table, then serve the live page.

    saehook demo                 the bundled model and SAEs, page on http://127.0.0.1:7860
    saehook demo --no-serve      the table only
    """
    hooked, folders = _evaluated(arguments)
    if arguments.no_serve:
        return
    from saehook.app import serve

    print(f"\nserving on http://{arguments.host}:{arguments.port} - stop with Ctrl-C", flush=True)
    serve(hooked, host=arguments.host, port=arguments.port, sae_paths=folders)


def evaluate(arguments: argparse.Namespace) -> None:
    """Splice-in evaluation: the language model's loss with each SAE's reconstruction in place of its activations.

    saehook eval                                        the bundled model and SAEs on held-out standard-library modules
    saehook eval --lm DIR --sae DIR ... --text FILE --tokens 100k --json out.json
    """
    _evaluated(arguments)


def _evaluated(arguments: argparse.Namespace) -> tuple[HookedSAEs, dict[str, Path]]:
    from saehook.evaluation import evaluate as run

    hooked, folders = _attach(arguments)
    text = _held_out(_documents(vars(arguments), "text"), arguments.tokens, hooked.model)
    if not arguments.text:
        _note_other_text(hooked, text)
    result = run(hooked, text, names={site: folder.name for site, folder in folders.items()})
    print(result.table())
    _write_json(arguments.json, result.to_json())
    return hooked, folders


def train(arguments: argparse.Namespace) -> None:
    """Train SAEs on the activations of a language model; several sites share one pass of the model.

    saehook train --site layers.2.resid_post --tokens 2M                 bundled model, installed Python source
    saehook train --lm DIR --site 'layers.{2,4}.resid_post' --activation topk --k 16 --d-sae 1024 --tokens 2M \\
                  --text FILE ... --out DIR
    saehook train --config sweep.yaml                                    sites x methods x k x seeds, one pass
    saehook train --init DIR --tokens 1M --lr 1e-5                       go on from the weights of a finished SAE
    saehook train --resume DIR                                           after Ctrl-C, kill -9, a full disk
    """
    import torch

    from saehook import corpus
    from saehook.checkpoint import load_sae
    from saehook.files import atomic_write
    from saehook.sweep import expand
    from saehook.training_run import check_unused, train_saes

    settings, out = _training_settings(arguments)
    if (dtype := settings.get("dtype", "float32")) not in ("float32", "bfloat16"):
        raise ArgumentError(f"dtype {dtype!r} is unknown; float32 or bfloat16 is expected.")
    model = _load_lm(argparse.Namespace(lm=settings.get("lm")))
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
    documents = _documents(settings, "text")
    if documents is None:
        documents = list(corpus.read_documents(corpus.python_files()))
    eval_tokens = count(settings.get("eval_tokens", EVAL_TOKENS))
    held_out = _held_out(_documents(settings, "eval_text"), eval_tokens, model) if eval_tokens else None
    check_loggers(_listed(settings.get("log", [])))
    if arguments.resume is None:
        check_unused(out)
        atomic_write(out / RUN, json.dumps(settings, indent=1) + "\n")
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
        resume=arguments.resume is not None,
        log=_listed(settings.get("log", [])),
        **({"checkpoint_seconds": settings["checkpoint_seconds"]} if "checkpoint_seconds" in settings else {}),
    )
    if run.evaluation is not None:
        print(run.evaluation.table())
    for one in run.saes:
        print(f"wrote {one.folder}")
    print(f"report in {out / 'report.html'}")


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


def generate(arguments: argparse.Namespace) -> None:
    """Continue a text, with edits of latents if any are given; the same edits as in Python and on the page.

    saehook generate "def load(path):" --steer 123=0.5max --max-new-tokens 40
    saehook generate --edits program.json --temperature 0.7 --seed 1
    saehook generate "def load(path):" --steer 123=0.5max --save-program program.json
    """
    import warnings

    from saehook.errors import NoEffectWarning
    from saehook.interventions import Program
    from saehook.program_file import load_edits
    from saehook.replay import compare_files, save_program

    program, file = Program(splice=arguments.splice, error=arguments.error), None
    if arguments.edits is not None:
        program, file = load_edits(arguments.edits)
        program = dataclasses.replace(
            program, splice=program.splice or arguments.splice, error=arguments.error or program.error
        )
    hooked, _ = _attach(arguments)
    if file is not None:
        for difference in compare_files(hooked, file)[0]:
            print(f"note: {difference}", file=sys.stderr)
    program = dataclasses.replace(program, edits=[*program.edits, *_edits(arguments)])
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {"do_sample": False}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # said below
        result = hooked.generate(
            arguments.prompt,
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
    _write_json(arguments.json, json.dumps(data, indent=1))


def _edits(arguments: argparse.Namespace) -> list[Any]:
    """The edits of --steer, --clamp, --scale, --ablate, --at-least, --at-most and --to-mean, in that order."""
    from saehook import interventions as i
    from saehook.where import generation, prompt

    where = {"everywhere": None, "prompt": prompt(), "generation": generation()}[arguments.where]
    makers = {"steer": i.steer, "clamp": i.clamp, "scale": i.scale, "ablate": i.ablate}
    makers |= {"at-least": i.at_least, "at-most": i.at_most, "to-mean": i.to_mean}
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


def stats(arguments: argparse.Namespace) -> None:
    """Measure each latent's maximum, density, mean and quantiles on text, and the mean error; store them beside the SAE.

    saehook stats SAE ... --text FILE --tokens 1M
    """
    from saehook import corpus
    from saehook.checkpoint import save_sae, stored_dtype
    from saehook.evaluation import measure_stats
    from saehook.tokenization import window_size, windows

    hooked, folders = _attach(arguments)
    documents = _documents(vars(arguments), "text")
    if documents is None:
        documents = corpus.read_documents(corpus.python_files())
    text = windows(documents, hooked.tokenizer, window_size(hooked.model.context), max_tokens=arguments.tokens)
    for site, measured in measure_stats(hooked, text).items():
        sae = hooked.saes[site]
        sae.stats = measured
        save_sae(sae, folders[site], dtype=stored_dtype(folders[site]))
        fired = int((measured.max_act > 0).sum())
        print(f"{folders[site]}: {fired:,} of {sae.d_sae:,} latents fired on {measured.tokens:,} tokens")


def sites(arguments: argparse.Namespace) -> None:
    """List the named places of a language model where SAEs attach.

    saehook sites
    saehook sites --lm DIR 'layers.*.resid_post'
    """
    found = _load_lm(arguments).sites(arguments.pattern)
    for site in found:
        print(f"{site.name:24} {site.width or '?':>6}  {site.path}:{site.side}")
    _write_json(arguments.json, json.dumps([dataclasses.asdict(site) for site in found], indent=1))


if __name__ == "__main__":
    sys.exit(main())
