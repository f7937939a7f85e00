"""`python -m errata.cli`, for launchers that start modules."""

import sys

from errata.cli import main

sys.exit(main())
