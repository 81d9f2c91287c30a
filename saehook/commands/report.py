"""`saehook report`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "an evaluation as a page with plots that opens offline"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    sub.add_argument("evaluation", type=Path, metavar="EVAL.JSON", help="what `saehook eval --json` wrote")
    sub.add_argument("-o", "--out", type=Path, metavar="FILE", help="the page (default: beside it, with .html)")


def run(arguments: argparse.Namespace) -> None:
    """Write one HTML file with the table and plots of an evaluation.

    saehook eval --json eval.json && saehook report eval.json -o report.html
    """
    from saehook.eval_report import write_eval_report

    print(write_eval_report(arguments.evaluation, arguments.out or arguments.evaluation.with_suffix(".html")))
