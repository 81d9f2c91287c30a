"""One file per command of `saehook`: HELP, `add_options(parser)` and `run(arguments)`."""
