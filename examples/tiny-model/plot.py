"""Draw training/loss.png from training/log.jsonl: `python plot.py`."""

import json
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

HERE = Path(__file__).resolve().parent
SMOOTH_STEPS = 25


def main() -> None:
    """Training loss as points and running mean; held-out loss beside it."""
    log = (HERE / "training" / "log.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    smooth = [fmean(losses[max(0, end - SMOOTH_STEPS) : end]) for end in range(1, len(rows) + 1)]
    held_out = [row for row in rows if "validation_loss" in row]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, ".", markersize=1.5, color="#b9c4d6", label="training, each step")
    axes.plot(steps, smooth, color="#1f4e9c", label=f"training, mean of {SMOOTH_STEPS} steps")
    axes.plot(
        [row["step"] for row in held_out],
        [row["validation_loss"] for row in held_out],
        "o-",
        markersize=3,
        color="#c4501b",
        label="held-out documents",
    )
    axes.set(xlabel="step", ylabel="cross entropy, nats a token", title="Tiny model: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "training" / "loss.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
