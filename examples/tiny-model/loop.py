"""The training loop's parts: optimizers, learning rate, one step, validation, checkpoint, log line.

Knows no text and no tokenizer: batches come as tensors of token ids, [rows, row_tokens + 1].
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from muon import Muon
from torch.nn import functional

MATRIX_RATE, OTHER_RATE = 0.002, 0.0015
WARMUP_STEPS, DECAY_SHARE, FINAL_SHARE = 20, 0.5, 0.02
GRADIENT_NORM = 1.0


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon (arXiv 2502.16982) for the matrices inside the layers, AdamW for the other weights."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=MATRIX_RATE, weight_decay=0.1),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_share(step: int, steps: int) -> float:
    """Share of the full learning rates: warm up, stay, then fall linearly over DECAY_SHARE.

    Before the fall begins the value does not depend on `steps`, so a run may be shortened until
    then and equals one that was planned shorter.
    """
    falling = (steps - step) / max(1, int(steps * DECAY_SHARE))
    return min(1.0, (step + 1) / WARMUP_STEPS, max(FINAL_SHARE, falling))


def train_step(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batch: torch.Tensor,
    share: float,
) -> float:
    """One update with `share` of the full rates. Returns the batch's loss, nats a token."""
    for optimizer, full_rate in zip(optimizers, (MATRIX_RATE, OTHER_RATE), strict=True):
        optimizer.param_groups[0]["lr"] = full_rate * share
    loss = token_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def token_loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each row's tokens after the first, nats a token; scalar tensor."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def validate(model: torch.nn.Module, held_out: torch.Tensor) -> float:
    """Mean loss over the held-out rows, two at a time to bound memory."""
    device = next(model.parameters()).device
    losses = [float(token_loss(model, rows.to(device))) for rows in held_out.split(2)]
    return sum(losses) / len(losses)


def save(
    path: Path,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    seconds: float,
) -> None:
    """Write the checkpoint whole or not at all. seconds: training time so far."""
    path.parent.mkdir(exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": step,
        "seconds": seconds,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def restore(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Load the checkpoint if there is one. Returns (steps done, training seconds so far)."""
    if not path.exists():
        return 0, 0.0
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


def cut_log(path: Path, step: int) -> None:
    """Drop the log's lines after `step`: they belong to steps that will be done again."""
    path.parent.mkdir(exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
