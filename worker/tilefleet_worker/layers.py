"""Building blocks of decoder models: linear maps, norms, rotary positions."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from tilefleet_worker.rope_config import RopeConfig
from tilefleet_worker.rotary_frequencies import frequencies


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model lives and in which type it computes."""

    device: torch.device
    dtype: torch.dtype

    @property
    def exact(self) -> bool:
        """fp32 on a CPU: weights may be packed and norms folded, nothing is lost by it."""
        return self.device.type == "cpu" and self.dtype == torch.float32

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in the model's type, there."""
        return tensor.to(device=self.device, dtype=self.dtype)


CPU = Placement(torch.device("cpu"), torch.float32)


class Linear:
    """y = x Wᵀ + b, with W laid out once for oneDNN where it runs on a CPU.

    oneDNN adds up each output in an order that depends on W alone, so a row's result has the same
    bits whatever the number of rows (measured for 1 to 300 rows on AVX2; MKL's does not), and it
    is up to twice as fast from 4 rows on. A call costs 60 µs more than MKL's, so maps with the
    same input are worth joining. Where torch was built without oneDNN the plain product is used.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        place: Placement = CPU,
    ) -> None:
        """weight [out, in], bias [out], both fp32. The packed copy replaces the weight."""
        self._bias = None if bias is None else place.put(bias)
        self._packed: bool = place.exact and torch._C._has_mkldnn
        self._weight: torch.Tensor = place.put(weight).contiguous()
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in] → [rows, out]."""
        if not self._packed:
            return functional.linear(x, self._weight, self._bias)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return y


class RMSNorm:
    """w · x / √(mean(x²) + eps) over the last dimension (Zhang and Sennrich, 2019).

    Without a weight where the linear map that follows has taken it in, for free. Four kernels on a
    CPU; torch.nn.functional.rms_norm runs nine there (2.15.0), at decode a fifth of a step. Sums
    are fp32 in every type.
    """

    def __init__(self, eps: float, weight: torch.Tensor | None = None) -> None:
        self._number = eps
        self._eps = torch.tensor(eps)
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., features] → the same shape and type."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return functional.rms_norm(x, x.shape[-1:], self._weight, self._number)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, length, length, value=1.0 / x.shape[-1]).rsqrt_()
        normed = x * scale
        return normed if self._weight is None else normed.mul_(self._weight)


def normed_linear(
    eps: float,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    place: Placement,
) -> tuple[RMSNorm, Linear]:
    """A norm and the map of its output; where nothing is lost by it the map takes in the weight."""
    if place.exact:
        return RMSNorm(eps), Linear(weight * norm_weight, bias, place)
    return RMSNorm(eps, place.put(norm_weight)), Linear(weight, bias, place)


def interleave_halves(tensor: torch.Tensor) -> torch.Tensor:
    """Reorder the last dimension [a₀ … aₙ, b₀ … bₙ] to [a₀, b₀, a₁, b₁ …].

    Checkpoints rotate element i of the first half with element i of the second. Side by side the
    pair is one complex number and the rotation one product. Queries and keys are reordered alike,
    so their dot products are the same.
    """
    halves = tensor.reshape(*tensor.shape[:-1], 2, tensor.shape[-1] // 2)
    return halves.transpose(-1, -2).flatten(-2)


class Rotary:
    """Rotary position embedding (Su et al., 2021) over interleaved heads, from a table."""

    def __init__(
        self,
        head_dim: int,
        config: RopeConfig,
        max_positions: int,
        device: torch.device | None = None,
    ) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, frequencies(config, head_dim))
        table = torch.polar(torch.full_like(angles, config.amplitude), angles)
        self._table = table.to(device)  # complex64 [positions, head_dim / 2]

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotations of positions [tokens]: complex64 [tokens, 1, head_dim / 2]."""
        return self._table[positions].unsqueeze(1)

    @staticmethod
    def rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
        """Rotate interleaved heads x [tokens, heads, head_dim] in fp32; contiguous, of x's type."""
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)
