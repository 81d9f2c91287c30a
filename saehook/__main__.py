"""`python -m saehook`, the same as `saehook`."""

import sys

from saehook.cli import main

sys.exit(main())
