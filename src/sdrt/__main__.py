"""`python -m sdrt` is `sdrt`."""

import sys

from .cli import main

sys.exit(main())
