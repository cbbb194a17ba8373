"""Entry point of `python3 hack/cluster`."""

import sys

from kit.cli import main

sys.exit(main())
