"""Which part of a model each rank of a tensor-parallel group computes. Pure.

Every rank holds an equal share of the query heads, with the keys and values they read, of the inner
features of each MLP and of each expert, and of the rows of the vocabulary's head. So a layer needs
two sums over the ranks: behind the attention's output and behind the MLP. Embedding, norms and
router are whole on every rank.
Source: Megatron-LM (arXiv 1909.08053).
"""

from dataclasses import dataclass, replace

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of one rank. The default is the whole model."""

    rank: int = 0
    size: int = 1

    def part(self, count: int) -> slice:
        """This rank's of `count` features, which the group's size divides."""
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def keys(self, config: ModelConfig) -> slice:
        """Rows of the maps to keys and values: heads of its own, or the one that its queries read.

        Where there are more ranks than heads, some ranks hold the same one.
        """
        heads = config.num_kv_heads
        first = self.rank * heads // self.size
        return slice(
            first * config.head_dim, (first + max(1, heads // self.size)) * config.head_dim
        )

    def vocabulary(self, vocab_size: int) -> slice:
        """Its rows of the head: equal shares but for the last ranks, which may have fewer."""
        share = self.vocabulary_share(vocab_size)
        return slice(min(self.rank * share, vocab_size), min((self.rank + 1) * share, vocab_size))

    def vocabulary_share(self, vocab_size: int) -> int:
        """Rows of the largest share of the head."""
        return -(-vocab_size // self.size)

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The model that this rank computes: fewer heads and inner features, all else the same.

        Raises ConfigError when the group's size does not divide what is shared out.
        """
        if self.size == 1:
            return whole
        reasons = why_not(whole, self.size)
        if reasons:
            raise ConfigError(
                f"--tensor-parallel-size is {self.size}, but this {whole.architecture} model "
                f"cannot be divided so: {'; '.join(reasons)}. Use {_remedy(whole, self.size)}."
            )
        experts = whole.experts
        if experts is not None:
            inner = experts.intermediate_size // self.size
            experts = replace(experts, intermediate_size=inner)
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=max(1, whole.num_kv_heads // self.size),
            intermediate_size=whole.intermediate_size // self.size,
            experts=experts,
        )


def why_not(config: ModelConfig, size: int) -> list[str]:
    """Reasons why a model cannot be shared out to so many ranks; empty when it can."""
    reasons = []
    if config.num_heads % size:
        reasons.append(f"num_attention_heads is {config.num_heads}, no multiple of {size}")
    keys = config.num_kv_heads
    if keys % size and size % keys:
        reasons.append(
            f"num_key_value_heads is {keys}, which must be a multiple or a divisor of {size}"
        )
    dense = config.experts is None or not all(config.sparse_layers)
    if dense and config.intermediate_size % size:
        reasons.append(f"intermediate_size is {config.intermediate_size}, no multiple of {size}")
    if config.experts is not None and config.experts.intermediate_size % size:
        inner = config.experts.intermediate_size
        reasons.append(f"the experts' intermediate size is {inner}, no multiple of {size}")
    return reasons


def _remedy(config: ModelConfig, size: int) -> str:
    fitting = [str(count) for count in range(1, size) if not why_not(config, count)]
    return f"a size that divides them: {', '.join(fitting)}"
