"""Mistral and Mixtral: one sliding window in every layer; Mixtral routes to two of eight experts.

Sources: Mistral 7B (arXiv 2310.06825), Mixtral of Experts (arXiv 2401.04088).
"""

from tilefleet_worker.config_reader import ConfigReader
from tilefleet_worker.families.family import ExpertNames, Family, window_everywhere


def _all_sparse(reader: ConfigReader, num_layers: int) -> tuple[bool, ...]:
    return (True,) * num_layers


MISTRAL = Family(
    "Mistral", ("MistralForCausalLM",), qkv_bias=False, output_bias=False, windows=window_everywhere
)

MIXTRAL = Family(
    "Mixtral",
    ("MixtralForCausalLM",),
    qkv_bias=False,
    output_bias=False,
    windows=window_everywhere,
    sparse_layers=_all_sparse,
    experts=ExpertNames(
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        gate="w1",
        up="w3",
        down="w2",
        count_keys=("num_local_experts",),
        inner_key="intermediate_size",
        normalize_key=None,
    ),
)
