"""Costs of models by name or folder."""

from tilefleet_worker.model_shapes import SHAPES, named_config
from tilefleet_worker.roofline.costs import Costs, DecoderCosts
from tilefleet_worker.roofline.deepseek_v4 import DeepSeekV4FlashCosts

DEEPSEEK_V4_FLASH = "deepseek-v4-flash"


def model_names() -> tuple[str, ...]:
    """All that `costs_of` knows without a folder."""
    return (*SHAPES, DEEPSEEK_V4_FLASH)


def costs_of(model: str) -> Costs:
    """Costs of a named shape, or of the config.json in a folder. Raises as `named_config` does."""
    if model == DEEPSEEK_V4_FLASH:
        return DeepSeekV4FlashCosts()
    return DecoderCosts(named_config(model))
