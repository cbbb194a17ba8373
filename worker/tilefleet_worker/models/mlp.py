"""What follows attention in a layer: a gated MLP, or a mixture of them."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from tilefleet_worker.layers import Linear

Activation = Callable[[torch.Tensor], torch.Tensor]


def activation(name: str) -> Activation:
    """Gate function as config.json names it."""
    if name == "silu":
        return functional.silu
    return lambda x: functional.gelu(x, approximate="tanh")


class FeedForward(Protocol):
    """x [tokens, hidden], normed → [tokens, hidden]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the stream."""
        ...


class GatedMLP:
    """down(act(gate x) · up x) (Shazeer, 2020), gate and up as one map."""

    def __init__(self, gate_up: Linear, down: Linear, act: Activation) -> None:
        self._gate_up = gate_up
        self._down = down
        self._act = act

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        gate, up = self._gate_up(x).chunk(2, 1)
        return self._down(self._act(gate) * up)


class Experts:
    """The best few of many MLPs for each token, weighted (Shazeer et al., 2017).

    Experts run one after the other in the order of their numbers, so a token's sum has the same
    order, and so the same bits, whatever its batch-mates chose.
    """

    def __init__(
        self, router: Linear, experts: tuple[FeedForward, ...], chosen: int, normalized: bool
    ) -> None:
        """normalized: a token's weights sum to 1, else they are its shares among all experts."""
        self._router = router
        self._experts = experts
        self._chosen = chosen
        self._normalized = normalized

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        weights, chosen = self.choose(self._router(x).float())
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        for number in torch.unique(chosen).tolist():
            tokens, rank = torch.where(chosen == number)
            made = self._experts[number](x[tokens]) * weights[tokens, rank, None]
            out.index_add_(0, tokens, made)
        return out

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and experts [tokens, chosen] from the router's logits [tokens, experts]."""
        weights, chosen = logits.softmax(dim=-1).topk(self._chosen, dim=-1)
        if self._normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen
