"""``python -m tilefleet_operator``: see cli/tilefleet.py."""

import sys

from tilefleet_operator.cli.tilefleet import main

if __name__ == "__main__":
    sys.exit(main())
