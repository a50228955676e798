"""`python -m vsd.cli`."""

import sys

from vsd.cli import main

sys.exit(main())
