"""instructor: models of answers by tools and by JSON schema, whole, in parts and async."""

import asyncio
import sys
from typing import Literal

import instructor
import openai
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "A city?"}], "max_tokens": 800}
ASKED |= {"seed": 1, "max_retries": 1}


class City(BaseModel):
    """A city."""

    kind: Literal["village", "town", "city"]
    capital: bool


async def async_city() -> City:
    async with openai.AsyncOpenAI(base_url=URL + "/v1", api_key="k", max_retries=0) as plain:
        client = instructor.from_openai(plain, mode=instructor.Mode.JSON_SCHEMA)
        return await client.create(response_model=City, **ASKED)


def main() -> None:
    with openai.OpenAI(base_url=URL + "/v1", api_key="k", max_retries=0) as plain:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
            client = instructor.from_openai(plain, mode=mode)
            city = client.create(response_model=City, **ASKED)
            assert isinstance(city, City), mode
            *_, last = client.create_partial(response_model=City, **ASKED)
            City.model_validate(last.model_dump())
    assert isinstance(asyncio.run(async_city()), City)


main()
