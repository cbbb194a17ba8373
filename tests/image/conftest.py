"""Makes the modules of hack/image importable, as running that folder does."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "hack" / "image"))
