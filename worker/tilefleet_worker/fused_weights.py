"""From a checkpoint's tensors to the fused decoder's: maps joined, converted, on the device."""

import torch

from tilefleet_worker.fused_decoder import FusedLayer, FusedWeights
from tilefleet_worker.kernels.rotary_store import Rotation, rotary_table
from tilefleet_worker.model_config import ModelConfig
from tilefleet_worker.weights import Weights


def load(
    config: ModelConfig,
    weights: Weights,
    max_positions: int,
    dtype: torch.dtype,
    device: torch.device,
) -> FusedWeights:
    """Take all tensors. Raises ModelError when the files do not hold exactly what is needed."""
    source = _Source(config, weights, dtype, device)
    embedding = source.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    table = default_table(config, max_positions, device)
    layers = tuple(source.layer(f"model.layers.{i}", table) for i in range(config.num_layers))
    final_norm = source.take("model.norm.weight", config.hidden_size)
    head = embedding
    if config.tie_word_embeddings:
        weights.skip("lm_head.weight")
    else:
        head = source.take("lm_head.weight", config.vocab_size, config.hidden_size)
    weights.check_all_taken()
    return FusedWeights(embedding, layers, final_norm, head)


def default_table(config: ModelConfig, max_positions: int, device: torch.device) -> torch.Tensor:
    """Rotary table without scaling; see kernels.rotary_store."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device)
    return rotary_table(config.rope_theta ** (-exponents / config.head_dim), max_positions)


class _Source:
    """Tensors of one checkpoint, checked, converted and moved one by one."""

    def __init__(
        self, config: ModelConfig, weights: Weights, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._config = config
        self._weights = weights
        self._dtype = dtype
        self._device = device

    def take(self, name: str, *shape: int) -> torch.Tensor:
        return self._weights.take(name, *shape).to(self._dtype).to(self._device)

    def joined(self, names: list[str], rows: list[int], *features: int) -> torch.Tensor:
        """Several tensors one below the other."""
        parts = [self.take(n, r, *features) for n, r in zip(names, rows, strict=True)]
        return torch.cat(parts)

    def layer(self, prefix: str, table: torch.Tensor) -> FusedLayer:
        config, attn = self._config, f"{prefix}.self_attn"
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        maps = [f"{attn}.{name}_proj" for name in "qkv"]
        rows = [queries, keys, keys]
        bias = config.attention_bias
        return FusedLayer(
            input_norm=self.take(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self.joined([f"{name}.weight" for name in maps], rows, hidden),
            qkv_bias=self.joined([f"{name}.bias" for name in maps], rows) if bias else None,
            rotation=Rotation(
                table,
                config.rms_norm_eps,
                self.take(f"{attn}.q_norm.weight", config.head_dim),
                self.take(f"{attn}.k_norm.weight", config.head_dim),
            ),
            output=self.take(f"{attn}.o_proj.weight", hidden, queries),
            output_bias=self.take(f"{attn}.o_proj.bias", hidden) if bias else None,
            mlp_norm=self.take(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self.joined(
                [f"{prefix}.mlp.gate_proj.weight", f"{prefix}.mlp.up_proj.weight"],
                [inner, inner],
                hidden,
            ),
            down=self.take(f"{prefix}.mlp.down_proj.weight", hidden, inner),
        )
