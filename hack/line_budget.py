"""Line budget: each module of the shipped packages against its cap.

The hard cap is 400 lines, the soft one 250 (docs/design/layout.md). A module that needs more than
the soft cap stands in BUDGET with the reason, so growth is a decision made in a commit.
"""

import subprocess
import sys
from pathlib import Path

SOFT, HARD = 250, 400
ROOT = Path(__file__).resolve().parent.parent
# path under the repository → (cap, reason)
BUDGET: dict[str, tuple[int, str]] = {
    "operator/tilefleet_operator/api.py": (
        400,
        "one model a spec section; texts of kubectl explain",
    ),
    "operator/tilefleet_operator/autoscale.py": (310, "the formulas stand beside the code"),
    "operator/tilefleet_operator/cache.py": (270, "two promises over one set of indices"),
    "operator/tilefleet_operator/cluster.py": (315, "every list, and gather() over them"),
    "operator/tilefleet_operator/desired.py": (350, "the pod, which is one long object"),
    "worker/tilefleet_worker/attention/cpu.py": (290, "layouts, masks and tiles of one backend"),
    "worker/tilefleet_worker/block_pool.py": (370, "spans, prefix index and check of one state"),
    "worker/tilefleet_worker/config.py": (370, "each flag with its unit and reason"),
    "worker/tilefleet_worker/engine.py": (360, "the thread, its inbox and outbox, the counters"),
    "worker/tilefleet_worker/factory.py": (310, "each kind of device, alone and with other ranks"),
    "worker/tilefleet_worker/tokenizer.py": (
        270,
        "both ways of decoding in pieces stand beside encoding",
    ),
    "worker/tilefleet_worker/scheduler.py": (385, "admission and schedule share one state"),
}


def modules() -> list[str]:
    """Paths of the shipped modules, relative to the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "operator/**.py", "worker/**.py"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return sorted(listed.stdout.split())


def main() -> int:
    """Print the table; 1 if a module is over its cap or a budget entry names no module."""
    paths, total, wrong = modules(), 0, []
    for path in paths:
        lines = len((ROOT / path).read_text().splitlines())
        total += lines
        cap = BUDGET.get(path, (SOFT, ""))[0]
        if lines > min(cap, HARD):
            wrong.append(
                f"{path}: {lines} lines, cap {cap}: split it, or raise its budget with a reason"
            )
    wrong += [f"{path}: in the budget, not in the tree" for path in BUDGET if path not in paths]
    print(
        "\n".join(wrong)
        if wrong
        else f"line budget: {len(paths)} modules, {total} lines, none over its cap"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
