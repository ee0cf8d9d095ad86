"""`python -m hwmpq.cli` is `hwmpq`."""

import sys

from hwmpq.cli import main

sys.exit(main())
