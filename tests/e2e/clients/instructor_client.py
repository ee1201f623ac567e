"""Check that instructor gets pydantic models from tools and from JSON. The argument is the server's address."""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none"), mode=mode)
    person = client.chat.completions.create(
        model="demo",
        response_model=Person,
        messages=[{"role": "user", "content": "Ada is 36 years old."}],
        max_tokens=80,
        temperature=0,
        max_retries=0,
    )
    assert isinstance(person, Person), person
print("ok")
