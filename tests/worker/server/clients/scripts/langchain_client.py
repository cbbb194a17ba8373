"""langchain-openai: chat, stream, async, tools, structured output, text completions."""

import asyncio
import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:]


class City(BaseModel):
    """A city."""

    capital: bool
    size: int


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"fine in {city}"


def main() -> None:
    common = {"model": MODEL, "base_url": URL + "/v1", "api_key": "k", "max_retries": 0}
    chat = ChatOpenAI(**common, max_tokens=24, temperature=0, stream_usage=True)
    whole = chat.invoke([SystemMessage("Be brief."), HumanMessage("Hello")])
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 24

    chunks = list(chat.stream([SystemMessage("Be brief."), HumanMessage("Hello")]))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert [c.usage_metadata["output_tokens"] for c in chunks if c.usage_metadata] == [24]

    answers = asyncio.run(chat.abatch(["one", "two", "three"]))
    assert all(answer.content for answer in answers)

    bound = ChatOpenAI(**common, max_tokens=200).bind_tools([weather], tool_choice="any")
    called = bound.invoke("What is the weather in Rome?")
    assert called.response_metadata["finish_reason"] in ("tool_calls", "length")
    assert all(call["name"] == "weather" for call in called.tool_calls)
    asked = [{"name": "weather", "args": {"city": "Rome"}, "id": "call-1"}]
    turns = [
        HumanMessage("?"),
        AIMessage("", tool_calls=asked),
        ToolMessage("fine", tool_call_id="call-1"),
    ]
    assert chat.invoke(turns).content

    structured = ChatOpenAI(**common, max_tokens=200, temperature=0)
    found = structured.with_structured_output(City, method="json_schema").invoke("Rome?")
    assert isinstance(found, City)
    found = structured.with_structured_output(City, method="function_calling").invoke("Rome?")
    assert isinstance(found, City)

    text = OpenAI(**common, max_tokens=8, temperature=0)
    assert "".join(text.stream("abc")) == text.invoke("abc")
    assert len(text.batch(["abc", "def"])) == 2


main()
