"""LiteLLM with its provider for vLLM: chat, stream, async, tools, schema, text completions."""

import asyncio
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
TARGET = {"model": f"hosted_vllm/{MODEL}", "api_base": URL + "/v1", "num_retries": 0}
MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"hot": {"type": "boolean"}},
            "required": ["hot"],
        },
    },
}


class City(BaseModel):
    capital: bool
    size: int


def main() -> None:
    fields = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = litellm.completion(**TARGET, **fields)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 24
    chunks = list(
        litellm.completion(**TARGET, **fields, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.usage.completion_tokens for c in chunks if getattr(c, "usage", None)] == [24]
    again = asyncio.run(litellm.acompletion(**TARGET, **fields))
    assert again.choices[0].message.content == text

    named = {"type": "function", "function": {"name": "weather"}}
    called = litellm.completion(
        **TARGET, messages=MESSAGES, tools=[TOOL], tool_choice=named, max_tokens=200
    )
    assert called.choices[0].message.tool_calls[0].function.name == "weather"

    shaped = litellm.completion(
        **TARGET, messages=MESSAGES, response_format=City, max_tokens=200, temperature=0
    )
    City.model_validate_json(shaped.choices[0].message.content)

    plain = litellm.text_completion(**TARGET, prompt="abc", max_tokens=8)
    assert plain.usage.completion_tokens == 8
    refusal = ""
    try:
        litellm.completion(**TARGET, messages=MESSAGES, top_p=7)
    except litellm.BadRequestError as error:
        refusal = str(error)
    assert "top_p" in refusal


main()
