"""The model: Qwen3's architecture at 4.9 million parameters, and its Hugging Face folder."""

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from vocabulary import VOCABULARY_SIZE

MAX_POSITIONS = 2048
END_OF_TEXT_ID, TURN_END_ID = 0, 2  # order of vocabulary.SPECIAL_TOKENS


def configuration() -> Qwen3Config:
    """Six layers, four query heads over two key/value heads of 64, tied embeddings."""
    return Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TURN_END_ID,
        pad_token_id=END_OF_TEXT_ID,
        attn_implementation="sdpa",
    )


def build(seed: int) -> Qwen3ForCausalLM:
    """A model with fresh fp32 weights drawn from `seed`."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(configuration()).float()


def write_model(model: Qwen3ForCausalLM, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors in bfloat16 (half of fp32's bytes).

    Works on a copy; fp32 readers get the rounded weights back exactly.
    """
    rounded = Qwen3ForCausalLM(configuration()).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        bos_token_id=None,
        eos_token_id=[TURN_END_ID, END_OF_TEXT_ID],
        pad_token_id=END_OF_TEXT_ID,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    rounded.save_pretrained(folder)
