"""Fixtures for the API over a fake engine and a byte tokenizer, whose outputs are predictable."""

from collections.abc import AsyncIterator

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient
from transformers import PreTrainedTokenizerFast

from api.app import create_app
from api.server import ApiSettings, Server
from jaxserve.text.tokenizer import Tokenizer
from tests.support.fakes import FakeEngineClient
from tests.support.tiny import CHAT_TEMPLATE, VOCAB_SIZE, byte_tokenizer


def make_server(client: FakeEngineClient, **settings: object) -> Server:
    """Return the state of an API process that serves the model `tiny`."""
    server = Server(
        ApiSettings(model_path="/models/tiny", served_model_name="tiny", **settings),  # type: ignore[arg-type]
        client,
    )
    server.serve(
        Tokenizer(
            PreTrainedTokenizerFast(
                tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
            )
        )
    )
    return server


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(VOCAB_SIZE)


@pytest.fixture
def server(engine: FakeEngineClient) -> Server:
    return make_server(engine)


@pytest.fixture
async def http(server: Server) -> AsyncIterator[AsyncTestClient[Litestar]]:
    async with AsyncTestClient(create_app(server)) as client:
        yield client
