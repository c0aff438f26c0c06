"""``python -m unlearners`` is the command ``unlearn``."""

import sys

from .cli import main

sys.exit(main())
