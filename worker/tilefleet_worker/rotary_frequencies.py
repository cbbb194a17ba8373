"""Angles by which one position turns each pair of a head, for every kind of rotary embedding."""

import math

import torch

from tilefleet_worker.rope_config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a position, fp32 [head_dim / 2], highest first.

    dynamic changes them beyond the trained positions only, where it is not served.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / config.theta**exponents
    if config.kind == "linear":
        return plain / config.factor
    if config.kind == "llama3":
        return _llama3(config, plain)
    if config.kind == "yarn":
        return _yarn(config, plain, head_dim)
    return plain


def _llama3(config: RopeConfig, plain: torch.Tensor) -> torch.Tensor:
    """Long waves are stretched by the factor, short ones stay, between them a blend.

    Source: Llama 3.1's published reference code (apply_scaling), described in arXiv 2407.21783.
    """
    turns = config.original_positions * plain / (2 * math.pi)  # within the trained positions
    low, high = config.low_frequency_factor, config.high_frequency_factor
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - keep) * plain / config.factor + keep * plain


def _yarn(config: RopeConfig, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """As llama3, with a ramp over the index of a pair (Peng et al., 2023, arXiv 2309.00071)."""

    def pair_with(turns: float) -> float:
        """Index of the pair that turns so often within the trained positions."""
        positions = config.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(positions) / (2 * math.log(config.theta))

    first, last = pair_with(config.beta_fast), pair_with(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (torch.arange(len(plain)) - first) / max(last - first, 1e-3)
    stretched = ramp.clamp(0.0, 1.0)
    return stretched * plain / config.factor + (1.0 - stretched) * plain
