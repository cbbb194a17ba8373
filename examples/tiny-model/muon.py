"""Muon: momentum whose update is orthogonalised (arXiv 2502.16982), in fp32.

torch.optim.Muon does the same product in bfloat16, which CPUs without AVX512-BF16 run several
hundred times slower than fp32; hence this one.
"""

from collections.abc import Iterable

import torch

# Coefficients of the quintic iteration that drives all singular values towards 1 (Jordan, 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 4
RATE_SCALE = (
    0.2  # makes the update's root mean square that of AdamW's, so one rate suits all shapes
)


class Muon(torch.optim.Optimizer):
    """For 2-D weights only. lr: rate; momentum: Nesterov, 0..1; weight_decay: decoupled."""

    def __init__(
        self,
        weights: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict[str, float]) -> None:
        state = self.state[weight]
        if not state:
            state["velocity"] = torch.zeros_like(weight)
        velocity = state["velocity"]
        velocity.lerp_(weight.grad, 1 - group["momentum"])
        direction = orthogonalised(weight.grad.lerp(velocity, group["momentum"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"] * RATE_SCALE * max(weight.shape) ** 0.5)


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values moved near 1 (roughly 0.7..1.2). Same shape and dtype."""
    first, second, third = QUINTIC
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = first * wide + (second * gram + third * gram @ gram) @ wide
    return wide.mT if matrix.shape[0] > matrix.shape[1] else wide
