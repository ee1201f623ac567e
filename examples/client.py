"""The OpenAI client that the examples share."""

import os

from openai import OpenAI

URL = os.environ.get("JAXSERVE_URL", "http://127.0.0.1:30000")


def make_client() -> OpenAI:
    """Return a client of the server; any API key works unless the server was started with one."""
    return OpenAI(base_url=f"{URL}/v1", api_key=os.environ.get("JAXSERVE_API_KEY", "none"))


def model(client: OpenAI) -> str:
    """Return the name of the served model."""
    return client.models.list().data[0].id
