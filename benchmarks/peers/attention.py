"""Peers of the paged attention kernels, each as a call ready for a CUDA graph.

torch's flash and cuDNN attention take contiguous keys and values, and so are spared the block
table. vLLM's FlashAttention-3 and its unified Triton kernel (the default on ROCm) take the same
pool, block table and lengths as ours; both come from a vLLM installation that the caller names.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], torch.Tensor]
# What vLLM passes on CUDA (v1/attention/backends/triton_attn.py): segments of a long context, and
# the programs below which it cuts a context into them.
SEGMENTS, FEW_PROGRAMS = 16, 128


@dataclass(frozen=True)
class PagedCase:
    """Inputs of one call: q [tokens, heads, dim], caches [blocks, block, KV heads, dim].

    Every sequence has `context` tokens, of which q holds the last `new`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    lens: torch.Tensor
    new: int
    context: int

    @property
    def starts(self) -> torch.Tensor:
        """First token of each sequence in q, and the number of tokens behind them; int32."""
        stop = self.q.shape[0] + 1
        return torch.arange(0, stop, self.new, dtype=torch.int32, device=self.q.device)


def torch_calls(case: PagedCase) -> dict[str, Call]:
    """Flash and cuDNN attention of torch over contiguous copies; none for the chunk of a prompt."""
    if case.new not in (1, case.context):
        return {}
    seqs, (_, heads, dim) = len(case.lens), case.q.shape
    q = case.q.reshape(seqs, case.new, heads, dim).transpose(1, 2).contiguous()
    k, v = (contiguous(cache, case.table, case.context) for cache in (case.k, case.v))
    kinds = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}

    def call(kind: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.new > 1, enable_gqa=True)

    return {f"torch sdpa {name}": lambda kind=kind: call(kind) for name, kind in kinds.items()}  # type: ignore[misc]


def contiguous(cache: torch.Tensor, table: torch.Tensor, context: int) -> torch.Tensor:
    """[seqs, KV heads, context, dim] of one cache."""
    return cache[table.long()].flatten(1, 2)[:, :context].transpose(1, 2).contiguous()


def find_vllm(folder: str | None) -> str | None:
    """Make vLLM of this folder importable. Returns why it cannot serve as a peer, or None.

    The folder goes first on the path: vLLM's own versions of its dependencies lie in it.
    """
    if folder:
        sys.path.insert(0, folder)
    try:
        import vllm.v1.attention.ops.triton_unified_attention
        import vllm.vllm_flash_attn  # noqa: F401
    except Exception as error:  # an installation for another torch fails in many ways
        return f"{type(error).__name__}: {str(error)[:150]}"
    return None


def vllm_calls(case: PagedCase) -> dict[str, Call]:
    """FlashAttention-3 and the unified Triton kernel of the vLLM that find_vllm() found."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    (_, heads, dim), starts, device = case.q.shape, case.starts, case.q.device
    few = FEW_PROGRAMS // case.k.shape[2]
    partial = torch.empty(few, heads, SEGMENTS, dim, dtype=torch.float32, device=device)
    largest, total = (
        torch.empty(partial.shape[:3], dtype=torch.float32, device=device) for _ in "ml"
    )
    one = torch.ones(len(case.lens), case.k.shape[2], dtype=torch.float32, device=device)
    out = torch.empty_like(case.q)
    shared = {
        "max_seqlen_q": case.new, "cu_seqlens_q": starts, "max_seqlen_k": case.context,
        "seqused_k": case.lens, "softmax_scale": dim**-0.5, "causal": True,
        "block_table": case.table,
    }  # fmt: skip

    def unified() -> torch.Tensor:
        unified_attention(
            q=case.q, k=case.k, v=case.v, out=out, **shared, window_size=(-1, -1), softcap=0,
            q_descale=None, k_descale=one, v_descale=one, seq_threshold_3D=few,
            num_par_softmax_segments=SEGMENTS, softmax_segm_output=partial,
            softmax_segm_max=largest, softmax_segm_expsum=total,
        )  # fmt: skip
        return out

    def flash() -> torch.Tensor:
        return flash_attn_varlen_func(case.q, case.k, case.v, **shared, fa_version=3)

    return {"vLLM FlashAttention-3": flash, "vLLM unified, Triton": unified}
