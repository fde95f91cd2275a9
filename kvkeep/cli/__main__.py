"""`python -m kvkeep.cli`."""

import sys

from kvkeep.cli.main import main

sys.exit(main())
