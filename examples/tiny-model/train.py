"""Train the tiny model on this interpreter's documentation text. Resumes; Ctrl-C costs few steps.

`python train.py` trains to the end; writes model/, manifest.json, training/log.jsonl and run.json.
`python train.py --export-only` writes model/ from the last checkpoint.
"""

import argparse
import copy
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from architecture import MAX_POSITIONS, build, write_model
from batches import Batches
from conversations import exchanges
from corpus import documents, manifest, standard_library
from loop import cut_log, make_optimizers, rate_share, restore, save, train_step, validate
from transformers import Qwen3ForCausalLM
from vocabulary import train_tokenizer, write_tokenizer

HERE = Path(__file__).resolve().parent
MODEL, MANIFEST, LOG = HERE / "model", HERE / "manifest.json", HERE / "training" / "log.jsonl"
RUN = LOG.with_name("run.json")
CHECKPOINT = HERE / ".run" / "checkpoint.pt"
SEED = 20261124
ROW_TOKENS, ROWS, STEPS = 512, 4, 2200
CHECKPOINT_STEPS, VALIDATION_STEPS, VALIDATION_ROWS = 50, 100, 32


@dataclass(frozen=True)
class Data:
    """Training rows and the fixed held-out batch, [VALIDATION_ROWS, ROW_TOKENS + 1]."""

    train: Batches
    held_out: torch.Tensor


def main() -> None:
    """Prepare, train, export."""
    options = _options()
    torch.set_num_threads(options.threads)
    if options.fresh:
        CHECKPOINT.unlink(missing_ok=True)
    data = prepare(options.library)
    model = build(SEED).to(options.device)
    if not options.export_only:
        run(model, data, options.steps)
    export(model, data)


def prepare(library: Path) -> Data:
    """Read the text, write manifest.json and the tokenizer's files, encode everything."""
    found = documents(library)
    listing = {"licence": "PSF-2.0", "files": manifest(library, found)}
    MANIFEST.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    kept = [document for document in found if not document.held_out]
    held_out = [document for document in found if document.held_out]
    tokenizer = train_tokenizer(document.text for document in kept)
    MODEL.mkdir(exist_ok=True)
    write_tokenizer(tokenizer, MODEL, MAX_POSITIONS)
    train = Batches.of(tokenizer, kept, exchanges(kept), ROW_TOKENS, SEED)
    other = Batches.of(tokenizer, held_out, exchanges(held_out), ROW_TOKENS, SEED)
    print(f"{len(kept)} documents, {len(train.stream)} tokens, {len(train.exchanges)} exchanges")
    return Data(train, other.batch(0, VALIDATION_ROWS))


def run(model: Qwen3ForCausalLM, data: Data, steps: int) -> None:
    """Train from the last checkpoint up to `steps`, with a log line a step."""
    optimizers = make_optimizers(model)
    done, seconds = restore(CHECKPOINT, model, optimizers)
    cut_log(LOG, done)
    while done < steps:
        began = time.perf_counter()
        share = rate_share(done, steps)
        batch = data.train.batch(done, ROWS)
        loss = train_step(model, optimizers, batch.to(model.device), share)
        seconds += (spent := time.perf_counter() - began)
        done += 1
        row = {"step": done, "loss": loss, "rate_share": share, "seconds": round(seconds, 2)}
        if done % VALIDATION_STEPS == 0 or done == steps:
            row["validation_loss"] = validate(model, data.held_out)
        report(row, steps, spent)
        if done % CHECKPOINT_STEPS == 0 or done == steps:
            save(CHECKPOINT, model, optimizers, done, seconds)


def export(model: Qwen3ForCausalLM, data: Data) -> None:
    """Write model/ and run.json from the last checkpoint."""
    done, seconds = restore(CHECKPOINT, model, make_optimizers(model))
    write_model(model, MODEL)
    rounded = copy.deepcopy(model).to(torch.bfloat16).float()
    summary = {
        "device": _device_name(model.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
        "steps": done,
        "tokens": done * ROWS * ROW_TOKENS,
        "training_seconds": round(seconds, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "validation_loss_bfloat16": validate(rounded, data.held_out),
    }
    RUN.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {MODEL.name}/: {summary}")


def report(row: dict[str, float], steps: int, spent: float) -> None:
    """Append the log line; every tenth step show progress, speed and time to the end."""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")
    if row["step"] % 10 == 0 or "validation_loss" in row:
        left = (steps - row["step"]) * row["seconds"] / row["step"]
        held_out = f"  held-out {row['validation_loss']:.3f}" if "validation_loss" in row else ""
        print(
            f"step {row['step']}/{steps}  loss {row['loss']:.3f}{held_out}  "
            f"{ROWS * ROW_TOKENS / spent:.0f} tokens/s  {left / 60:.1f} min left",
            flush=True,
        )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="in all (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--device", default="cpu", help="torch device: cpu (default) or cuda")
    parser.add_argument(
        "--library",
        type=Path,
        default=standard_library(),
        help="standard library folder whose text is read (default %(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="start over, drop the checkpoint")
    parser.add_argument("--export-only", action="store_true", help="write model/ and stop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
