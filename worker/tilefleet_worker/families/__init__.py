"""The families of models that are served, each described by how it differs from Llama."""

from tilefleet_worker.families.family import Family
from tilefleet_worker.families.gemma import GEMMA3
from tilefleet_worker.families.llama import LLAMA
from tilefleet_worker.families.mistral import MISTRAL, MIXTRAL
from tilefleet_worker.families.qwen import QWEN2, QWEN3, QWEN3_MOE

__all__ = ["ARCHITECTURES", "FAMILIES", "Family"]

FAMILIES: tuple[Family, ...] = (LLAMA, QWEN2, QWEN3, QWEN3_MOE, MISTRAL, MIXTRAL, GEMMA3)

ARCHITECTURES: dict[str, Family] = {
    name: family for family in FAMILIES for name in family.architectures
}
