"""What the papers claim, measured on planted data and small language models; the page is demos/REPRODUCTION.md.

    python demos/reproduce.py --list
    python demos/reproduce.py batchtopk-vs-topk [NAME ...] [--only planted] [--novels FOLDER]
    python demos/reproduce.py --all --stories-lm FOLDER --stories-text FILE --stories-held-out FILE
    python demos/reproduce.py --page

Each claim runs in minutes on a CPU; --full is the form for an accelerator, and says what it takes where there is none. Every claim
declares its SAEs: those of all claims that are asked for are trained first, on one pass of each model. Finished SAEs are kept in
--folder by a hash of all that decides them, and shared by the claims; stopped by Ctrl-C or a signal, the same command goes on.
--novels adds novels to the bundled model's training text; stories260K, a second model, and earlier states of the bundled one
(--lm-checkpoints) are used where they are given. Numbers go to
demos/reproduction/results and replace those that were measured on the same data; plots (`pip install -e '.[plots]'`) beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reproduction import page
from reproduction.data import Places
from reproduction.laboratory import Lab
from reproduction.outcome import NOT_RUN, Outcome, joined
from reproduction.plots import draw
from reproduction.registry import Claim, claims
from reproduction.runner import work

from saehook.config import count
from saehook.errors import TrainingInterrupted
from saehook.files import atomic_write


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="NAME", help="claims to run")
    options.add_argument("--list", action="store_true", help="the claims, one a line, each with its verdict so far")
    options.add_argument("--all", action="store_true", help="run every claim")
    options.add_argument("--page", action="store_true", help="write the page and the plots from the stored numbers")
    options.add_argument("--full", action="store_true", help="the form for an accelerator")
    options.add_argument("--device", help="to train on (default: cpu; with --full, the accelerator)")
    options.add_argument(
        "--tokens", type=count, help="at most so many for each SAE, to try a form out: needs --results of its own"
    )
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument(
        "--only", nargs="+", default=[], metavar="DATA", help="planted, bundled, stories, or one site, bundled/SITE"
    )
    options.add_argument("--methods-run", type=Path, help="SAEs of demos/compare_methods.py, in place of new ones")
    options.add_argument("--folder", type=Path, default=Path("runs/reproduction"), help="SAEs and activations")
    options.add_argument("--results", type=Path, default=page.RESULTS, help="where the numbers go")
    options.add_argument("--novels", type=Path, help="folder of .txt files")
    options.add_argument("--stories-lm", type=Path, help="folder of stories260K")
    options.add_argument("--stories-text", type=Path, help="stories to train on")
    options.add_argument("--stories-held-out", type=Path, help="stories to measure on")
    options.add_argument(
        "--lm-checkpoints",
        nargs="+",
        default=[],
        metavar="TOKENS=FOLDER",
        help="earlier states of the bundled model, the last one itself",
    )
    options.add_argument("--quiet", action="store_true", help="no progress bars")
    return options


def run(claim: Claim, lab: Lab) -> Outcome:
    """Measure one claim, and say with what."""
    started = time.monotonic()
    lab.begin(claim.trains(lab))
    outcome = claim.measure(lab)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": _machine(lab.runner.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seeds": lab.seeds,
        "trained": lab.facts(),
        "seconds": round(time.monotonic() - started),
    }
    return dataclasses.replace(outcome, runs=[facts])


def _machine(device: str) -> str:
    name = f"{os.cpu_count()} CPU cores" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"


def lacks_accelerator(arguments: argparse.Namespace) -> bool:
    """Whether a full form was asked for and nothing was said that could run it."""
    return arguments.full and arguments.device is None and not torch.cuda.is_available()


def checkpoints_of(given: Sequence[str]) -> tuple[tuple[float, Path], ...]:
    """Tokens and folder of each."""
    pairs = [each.partition("=") for each in given]
    return tuple((float(count(tokens)), Path(folder)) for tokens, _, folder in pairs)


NO_ACCELERATOR = (
    "That takes an accelerator, and torch sees none here. Leave --full out, or name a --device; --tokens gives all SAEs less, to "
    "try the form out."
)


def write(name: str, outcome: Outcome, folder: Path) -> Outcome:
    """The numbers of one claim, beside those on other data; what is known of it now."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = joined(before, outcome) if (before := page.stored(folder).get(name)) else outcome
    data: dict[str, Any] = whole.to_dict()
    atomic_write(folder / f"{name}.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return Outcome.from_dict(data)  # the verdict is that of the stored, rounded numbers


def main(given: Sequence[str] | None = None) -> int:
    """Run what was asked for."""
    options = parser()
    arguments = options.parse_args(given)
    known = claims()
    if unknown := [name for name in arguments.names if name not in known]:
        options.error(f"there is no claim {', '.join(unknown)}; --list shows those that there are.")
    stories = [arguments.stories_lm, arguments.stories_text, arguments.stories_held_out]
    if any(stories) and not all(stories):
        options.error("--stories-lm, --stories-text and --stories-held-out belong together.")
    if arguments.tokens and arguments.results == page.RESULTS:
        options.error("--tokens makes SAEs smaller than the page says: give --results another folder.")
    results = arguments.results / "full" if arguments.full else arguments.results
    if arguments.list:
        outcomes = page.stored(results)
        for name, claim in known.items():
            verdict = outcomes[name].verdict if name in outcomes else NOT_RUN
            print(f"{name:24}{verdict:36}{claim.says}")
        return 0
    names = list(known) if arguments.all else arguments.names
    if not names and not arguments.page:
        options.error("name a claim, or give --list, --all or --page.")
    lab = Lab(
        arguments.folder,
        Places(arguments.novels, *stories, checkpoints=checkpoints_of(arguments.lm_checkpoints)),
        full=arguments.full,
        seeds=arguments.seeds,
        progress=not arguments.quiet,
        only=arguments.only,
        methods=arguments.methods_run,
        tokens=arguments.tokens,
        device=arguments.device or ("cuda" if arguments.full else "cpu"),
        planning=lacks_accelerator(arguments),
    )
    runs = [run for name in names for run in known[name].trains(lab)]
    if lab.planning:
        options.error(f"the full form of {', '.join(names)} trains {work(runs)}. {NO_ACCELERATOR}")
    try:
        lab.runner.saes(runs)
        for name in names:
            outcome = write(name, run(known[name], lab), results)
            print(f"{name}: {outcome.verdict} ({outcome.runs[-1]['seconds']} s)", flush=True)
    except TrainingInterrupted as stopped:
        print(f"{stopped} The same command goes on.", file=sys.stderr)
        return 1
    if arguments.page or (names and arguments.results == page.RESULTS):
        outcomes = page.stored(page.RESULTS)
        atomic_write(page.PAGE, page.page(known, outcomes, page.stored(page.RESULTS / "full")))
        if importlib.util.find_spec("matplotlib") is None:
            print("no plots: pip install -e '.[plots]'", file=sys.stderr)
            return 0
        for name, outcome in outcomes.items():
            if outcome.plots and (name in names or arguments.page):
                draw(outcome, page.PLOTS / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
