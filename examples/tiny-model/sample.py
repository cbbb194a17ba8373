"""Write samples.md: what the checked-in model answers, unedited. `python sample.py`."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
QUESTIONS = (
    "What is a generator?",
    'Explain the "with" statement.',
    "What does heapq.nlargest do?",
    "What is the json module for?",
    "Hello",
    "What is a metaclass?",
)
BEGINNINGS = (
    "Lambda expressions are used to",
    "If the file cannot be opened,",
    "# logging.Handler\n",
)
MAX_TOKENS, SEED = 160, 7


def main() -> None:
    """Greedy answers to all questions, sampled ones to the first two, then text completions."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = Qwen3ForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32)
    parts = [
        "# Samples\n\nWritten by `sample.py` from the checked-in model, unedited, at most "
        f"{MAX_TOKENS} tokens each. Sampling: temperature 0.7, top-p 0.9, seed {SEED}.\n"
    ]
    for question in QUESTIONS:
        prompt = chat_prompt(tokenizer, question)
        parts.append(_block("Chat, greedy", question, complete(model, tokenizer, prompt, False)))
    for question in QUESTIONS[:2]:
        prompt = chat_prompt(tokenizer, question)
        parts.append(_block("Chat, sampled", question, complete(model, tokenizer, prompt, True)))
    parts += [
        _block("Text, greedy", text, complete(model, tokenizer, text, False)) for text in BEGINNINGS
    ]
    (HERE / "samples.md").write_text("\n".join(parts), encoding="utf-8")


def chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question in the model's chat format, ready for the answer."""
    return str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    )


@torch.no_grad()
def complete(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, sampled: bool
) -> str:
    """The model's continuation of `prompt`; marks one that was cut at MAX_TOKENS."""
    torch.manual_seed(SEED)
    token_ids = torch.tensor([tokenizer.encode(prompt)])  # [1, prompt tokens]
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    output = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=MAX_TOKENS,
        **(settings if sampled else {"do_sample": False, "temperature": None, "top_p": None}),
    )[0, token_ids.shape[1] :]
    text = str(tokenizer.decode(output, skip_special_tokens=True))
    return text + (" [cut]" if len(output) == MAX_TOKENS else "")


def _block(kind: str, prompt: str, answer: str) -> str:
    return f"## {kind}: {prompt.strip()}\n\n````text\n{answer}\n````\n"


if __name__ == "__main__":
    main()
