"""Training rows: half running text, half conversations. A batch is a pure function of its step."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from conversations import SYSTEM_MESSAGES, WEIGHTS, Exchange, small_talk
from corpus import Document
from tokenizers import Tokenizer
from vocabulary import END_OF_TEXT, TURN_END, TURN_START

TOPIC_WEIGHT = 2  # running text: a topic's document comes twice for each docstring's once
SYSTEM_MESSAGE_SHARE = 0.2
SMALL_TALK_SHARE = 0.05


@dataclass(frozen=True)
class Batches:
    """Rows of `row_tokens` + 1 token ids from a list of documents and their exchanges.

    Text rows are crops of all documents in an order drawn from `seed`. Conversation rows begin with
    a turn and hold several exchanges, so that later ones look like later turns of one conversation.
    """

    tokenizer: Tokenizer
    stream: torch.Tensor  # [tokens]
    exchanges: Sequence[Exchange]
    row_tokens: int
    seed: int

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        documents: Sequence[Document],
        exchanges: Sequence[Exchange],
        row_tokens: int,
        seed: int,
    ) -> "Batches":
        """Encode the documents once; `exchanges` are drawn by their weight."""
        repeated = [d for d in documents for _ in range(TOPIC_WEIGHT if d.kind == "topic" else 1)]
        random.Random(f"order-{seed}").shuffle(repeated)
        texts = [f"# {document.name}\n{document.text}{END_OF_TEXT}" for document in repeated]
        encoded = tokenizer.encode_batch_fast(texts)
        stream = torch.tensor([token for encoding in encoded for token in encoding.ids])
        return cls(tokenizer, stream, exchanges, row_tokens, seed)

    def batch(self, step: int, rows: int) -> torch.Tensor:
        """[rows, row_tokens + 1] int64: the even rows text, the odd rows conversation."""
        rng = random.Random(f"{self.seed}-{step}")
        makers = (self._text_row, self._conversation_row)
        return torch.stack([makers[index % 2](rng) for index in range(rows)])

    def _text_row(self, rng: random.Random) -> torch.Tensor:
        start = rng.randrange(len(self.stream) - self.row_tokens)
        return self.stream[start : start + self.row_tokens + 1]

    def _conversation_row(self, rng: random.Random) -> torch.Tensor:
        parts = []
        if rng.random() < SYSTEM_MESSAGE_SHARE:
            parts.append(turn("system", rng.choice(SYSTEM_MESSAGES)))
        token_ids: list[int] = []
        weights = [WEIGHTS[exchange.pattern] for exchange in self.exchanges]
        while len(token_ids) <= self.row_tokens:
            drawn = rng.choices(self.exchanges, weights)[0]
            if rng.random() < SMALL_TALK_SHARE:
                drawn = rng.choice(small_talk())
            parts += [turn("user", drawn.question(rng)), turn("assistant", drawn.answer)]
            token_ids += self.tokenizer.encode("".join(parts)).ids
            parts = []
        return torch.tensor(token_ids[: self.row_tokens + 1])


def turn(role: str, content: str) -> str:
    """One turn in ChatML, with its closing line end."""
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"
