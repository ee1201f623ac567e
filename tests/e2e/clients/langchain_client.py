"""Check langchain-openai: messages, streams, tools and structured output. The argument is the server's address."""

import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=12)
    days: int = Field(ge=1, le=9)


llm = ChatOpenAI(model="demo", base_url=f"{sys.argv[1]}/v1", api_key="none", temperature=0, max_tokens=80)
question = "What is the capital of France?"
assert llm.invoke(question).content == "The capital of France is Paris."
assert "".join(chunk.content for chunk in llm.stream(question)) == "The capital of France is Paris."

forced = llm.bind_tools([Weather], tool_choice="Weather")
[call] = forced.invoke("How is the weather in Paris?").tool_calls
assert call["name"] == "Weather"
assert Weather(**call["args"]).days in range(1, 10)
merged = None
for chunk in forced.stream("How is the weather in Paris?"):
    merged = chunk if merged is None else merged + chunk
assert merged.tool_calls[0]["args"] == call["args"]

for method in ("json_schema", "function_calling"):
    answer = llm.with_structured_output(Weather, method=method).invoke("How is the weather in Paris?")
    assert isinstance(answer, Weather), answer
print("ok")
