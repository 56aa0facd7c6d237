"""`python -m gptedge` is the command `gptedge`."""

import sys

from gptedge.cli import main

sys.exit(main())
