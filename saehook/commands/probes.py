"""`saehook probes`."""

from __future__ import annotations

import argparse
from pathlib import Path

from saehook.commands.shared import TEXT_HELP, documents_of_setting, whole_number

HELP = "probe tasks, two-class questions about text, as a JSON-lines file"


def add_options(sub: argparse.ArgumentParser) -> None:
    """Options of `probes`."""
    sub.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="where the tasks go, .jsonl")
    sub.add_argument("--text", nargs="+", metavar="TEXT", help=f"{TEXT_HELP} (default: held-out modules)")
    sub.add_argument(
        "--examples",
        type=whole_number,
        default=800,
        metavar="N",
        help="of each task, half of them yes and half no (default: 800)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")


def run(arguments: argparse.Namespace) -> None:
    """Make probe tasks whose answers are certain: of Python source what its parser knows (inside a string, next token closes
    a bracket, ...), of prose what its marks tell (inside dialogue, ...).

    saehook probes -o tasks.jsonl                                  from the held-out modules of the standard library
    saehook probes --text novels/ -o tasks.jsonl
    saehook eval --suite probe_loss absorption --probe-tasks tasks.jsonl

    A line is {"text": "def f(", "labels": {"in_call": true, "in_string": false}}: what is asked about is the place behind the
    last character. Tasks of your own are such files, too; 40 examples of each answer are the least.
    """
    from saehook import corpus
    from saehook.dataset_text import DatasetText
    from saehook.errors import ArgumentError
    from saehook.files import atomic_write
    from saehook.suite.probe_tasks import make_tasks, tasks_to_json_lines

    documents = documents_of_setting(vars(arguments), "text")
    if isinstance(documents, DatasetText) and documents.take is None:
        raise ArgumentError(
            "tasks are drawn from all of the text, and this dataset has no end. Say how many rows: take=1000."
        )
    if documents is None:
        documents = corpus.read_documents(corpus.held_out_files())
    tasks = make_tasks(documents, examples=arguments.examples, seed=arguments.seed)
    if not tasks:
        raise ArgumentError(
            f"the text has not enough places for a single task of {arguments.examples:,} examples. Give more text, or fewer "
            "--examples."
        )
    atomic_write(arguments.out, tasks_to_json_lines(tasks))
    for task in tasks:
        print(f"{task.name:24} {len(task.texts):,} examples")
