"""``python -m tilefleet_operator``: see cli.py."""

import sys

from tilefleet_operator.cli import main

if __name__ == "__main__":
    sys.exit(main())
