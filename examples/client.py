"""The client that the examples share."""

import os

from openai import OpenAI

URL = os.environ.get("JAXSERVE_URL", "http://127.0.0.1:30000")


def make_client() -> OpenAI:
    """A client of the server; its key does not matter unless the server has one."""
    return OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("JAXSERVE_API_KEY", "none"))


def model(client: OpenAI) -> str:
    """The name of the served model."""
    return client.models.list().data[0].id
