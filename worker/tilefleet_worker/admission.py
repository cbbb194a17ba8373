"""What can never be served, said at the door with the limit and the remedy."""

from dataclasses import dataclass

from tilefleet_worker.errors import ConfigError
from tilefleet_worker.layer_kinds import Demand
from tilefleet_worker.request import Refusal, Request


@dataclass(frozen=True, slots=True)
class Limits:
    """Fixed limits of an engine. Reads nothing that changes, so any thread may ask."""

    max_model_len: int
    vocab_size: int
    max_total_tokens: int
    """Longest prompt and answer together that can be served."""

    @classmethod
    def of(cls, demand: Demand, num_blocks: int, max_model_len: int, vocab_size: int) -> "Limits":
        """Limits of a pool of so many blocks. Raises ConfigError when not even one token fits."""
        longest = demand.longest(num_blocks, max_model_len)
        if longest < 1:
            raise ConfigError(
                f"The KV cache has {num_blocks} blocks, but a single token takes "
                f"{demand.span_blocks} of them: give it more memory."
            )
        return cls(max_model_len, vocab_size, longest)

    def refusal(self, request: Request) -> Refusal | None:
        """Why this request can never be served, or None."""
        prompt = request.prompt_token_ids
        if not prompt:
            message = "The prompt has no tokens: send at least one."
            return Refusal(400, "empty_prompt", message, "prompt")
        lowest, highest = min(prompt), max(prompt)
        if lowest < 0 or highest >= self.vocab_size:
            bad = lowest if lowest < 0 else highest
            return self._unknown_token(bad, "prompt")
        for token_id in request.params.token_ids:
            if not 0 <= token_id < self.vocab_size:
                return self._unknown_token(token_id, None)
        if request.max_total_tokens <= self.max_total_tokens:
            return None
        return Refusal(400, "context_length_exceeded", self._too_long(request), "max_tokens")

    def _unknown_token(self, token_id: int, param: str | None) -> Refusal:
        message = f"Token id {token_id} is not in the vocabulary of {self.vocab_size} tokens."
        return Refusal(400, "invalid_token_id", message, param)

    def _too_long(self, request: Request) -> str:
        cause = (
            f"the model length of {self.max_model_len} tokens"
            if self.max_total_tokens == self.max_model_len
            else f"the KV cache of {self.max_total_tokens} tokens"
        )
        return (
            f"The prompt has {len(request.prompt_token_ids)} tokens and max_tokens is "
            f"{request.params.max_tokens}: together {request.max_total_tokens}, above the limit of "
            f"{self.max_total_tokens} set by {cause}. Shorten the prompt or lower max_tokens."
        )
