"""Makes hack/cluster's package importable; it is not part of the installed project."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "hack" / "cluster"))
