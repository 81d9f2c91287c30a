"""`saehook demo | eval | probes | report | train | generate | replay | export | stats | sites | plan | info | convert | push`:
one file of `commands/` each.

Every command works on the bundled files without further arguments. Heavy packages are imported by the command that needs
them, so `saehook --help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence

from saehook.errors import SaehookError, TrainingInterrupted

COMMANDS = "demo eval probes report train generate replay export stats sites plan info convert push".split()


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
    for name in COMMANDS:
        command = importlib.import_module(f"saehook.commands.{name}")
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=inspect.cleandoc(command.run.__doc__),
            formatter_class=argparse.RawTextHelpFormatter,
        )
        sub.set_defaults(run=command.run)
        sub.add_argument("--lm", metavar="LM", help="language model: a folder or a hub id (default: the bundled one)")
        command.add_options(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
