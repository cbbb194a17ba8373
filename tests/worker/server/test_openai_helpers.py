"""openai-python's async client and its helpers: parsed answers, raw replies."""

import asyncio
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

MODEL = "qwen3-tiny"
MESSAGES = [{"role": "user", "content": "A city?"}]


class City(BaseModel):
    kind: Literal["village", "town", "city"]
    capital: bool


@pytest.fixture
async def client(real):
    async with openai.AsyncOpenAI(base_url=real.api + "/v1", api_key="k", max_retries=0) as client:
        yield client


def fields(**more):
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0} | more


async def test_many_streams_at_once_say_what_one_says(client):
    whole = await client.chat.completions.create(**fields())

    async def streamed():
        stream = await client.chat.completions.create(**fields(stream=True))
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    texts = await asyncio.gather(*(streamed() for _ in range(8)))
    assert set(texts) == {whole.choices[0].message.content}


async def test_answers_are_parsed_into_models(client):
    chat = await client.chat.completions.parse(**fields(max_tokens=200), response_format=City)
    assert isinstance(chat.choices[0].message.parsed, City)
    response = await client.responses.parse(
        model=MODEL, input="A city?", text_format=City, max_output_tokens=200, temperature=0
    )
    assert isinstance(response.output_parsed, City)


async def test_a_stream_that_is_closed_early_ends_its_request(client, real):
    before = real.wait_idle()["counters"]["aborts"]
    stream = await client.chat.completions.create(**fields(max_tokens=1500, stream=True))
    await anext(stream)
    await stream.close()
    real.wait(lambda: real.stats()["counters"]["aborts"] > before, 60)
    real.wait_idle()


async def test_errors_have_their_class_and_the_reply_its_id(client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(**fields(top_p=7))
    assert (caught.value.param, caught.value.code) == ("top_p", "invalid_value")
    assert caught.value.request_id.startswith("req-")
    raw = await client.chat.completions.with_raw_response.create(**fields(max_tokens=1))
    assert raw.headers["x-request-id"].startswith("req-")
    assert raw.parse().usage.completion_tokens == 1
