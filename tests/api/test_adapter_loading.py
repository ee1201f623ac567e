"""Loading and unloading adapters over HTTP while the server runs: results, refusals, pinning and slots."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from api.adapters.registry import AdapterRegistry
from api.app import create_app
from jaxserve.config import LoraConfig
from jaxserve.errors import AdapterError, LaunchError
from jaxserve.request import AdapterSource
from jaxserve.runner_protocol import LoadedAdapter
from tests.api.conftest import make_server
from tests.support.fakes import FakeEngineClient, shift_adapter
from tests.support.tiny import VOCAB_SIZE

Http = AsyncTestClient[Litestar]


def read(folder: str) -> LoadedAdapter:
    """Read an adapter folder, which contains only the shift of a `FakeRunner` adapter."""
    try:
        return shift_adapter(int((Path(folder) / "shift").read_text()))
    except ValueError as error:
        raise AdapterError(f"{folder}: {error}") from None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root folder with good and bad adapters and symbolic links, and one adapter outside of it."""
    root = tmp_path / "root"
    for folder, text in (
        (root / "poet", "2"),
        (root / "deep" / "pirate", "4"),
        (root / "bad", "x"),
        (tmp_path / "b", "1"),
    ):
        folder.mkdir(parents=True)
        (folder / "shift").write_text(text)
    (root / "out").symlink_to(tmp_path / "b")
    (root / "circle").symlink_to(root / "circle")
    (root / "within").symlink_to(root / "poet")
    (root / "hop").mkdir()
    (root / "hop" / "shift").symlink_to(root / "poet" / "shift")
    (root / "hop" / "folder").symlink_to(root / "mixed")
    (root / "ring").mkdir()
    (root / "ring" / "again").symlink_to(root / "ring")
    (root / "mixed").mkdir()
    (root / "mixed" / "shift").symlink_to(tmp_path / "b" / "shift")
    return root


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient(
        VOCAB_SIZE, adapters=("first",), read=lambda folder: shift_adapter(1) if folder == "first" else read(folder)
    )


def config(**options: Any) -> LoraConfig:
    return LoraConfig(paths={"first": "/adapters/first"}, **options)


@pytest.fixture
async def http(engine: FakeEngineClient, root: Path) -> AsyncIterator[Http]:
    server = make_server(engine, lora=config(max_loras_per_batch=3), lora_root=str(root))
    async with AsyncTestClient(create_app(server)) as client:
        yield client


async def load(http: Http, name: str, path: str, status: int = 200, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": path} | fields)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["success"] == (status == 200)
    return body


async def complete(http: Http, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": [65], "max_tokens": 3} | fields
    answer = await http.post("/v1/completions", json=body)
    return answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.status_code


async def test_load_use_unload_and_load_another_under_the_name(http: Http, engine: FakeEngineClient) -> None:
    assert await complete(http, "x") == 404
    body = await load(http, "x", "poet")
    assert body == {
        "success": True,
        "error_message": None,
        "loaded_adapters": {"first": "/adapters/first", "x": "poet"},
    }
    assert await complete(http, "tiny:x") == await complete(http, "x") == "DGJ"
    assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["tiny", "first", "x"]
    again = await load(http, "x", "poet", 400)
    assert again["error_message"] == "the adapter 'x' is already loaded; unload it first"
    answer = await http.post("/unload_lora_adapter", json={"lora_name": "x"})
    assert answer.json() == {"success": True, "error_message": None, "loaded_adapters": {"first": "/adapters/first"}}
    assert await complete(http, "x") == 404
    await load(http, "x", "deep/pirate")
    # The pages cached with the earlier adapter of that name are not used.
    assert await complete(http, "x") == "FKP"
    assert len({request.adapter_key for request in engine.submitted}) == 2


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("x", "nowhere", "'nowhere' is not a folder below --lora-root"),
        ("x", "../b", "'../b' is not a folder below"),
        ("x", "poet/../../b", "is not a folder below"),
        ("x", "/etc", "'/etc' is not a folder below"),
        ("x", "out", "'out' is not a folder below"),
        ("x", "mixed", "'mixed' is not a folder below"),
        ("x", "hop", "'hop' is not a folder below"),
        ("x", "ring", "No such file"),
        ("x", "circle", "'circle' is not a folder below"),
        ("x", "poet/shift", "is not a folder below"),
        ("x", "", "'' is not a folder below"),
        ("x", ".", "'.' is not a folder below"),
        ("x", "po\0et", "is not a folder below"),
        ("x", "https://example.org/poet", "is not a folder below"),
        ("x", "org/poet", "is not a folder below"),
        ("x", "a" * 5000, "is not a folder below"),
        ("x", "bad", "invalid literal"),
        ("", "poet", "an adapter's name must be 1 to 256 printable characters"),
        ("a:b", "poet", "an adapter's name must be"),
        (" x", "poet", "an adapter's name must be"),
        ("x\n", "poet", "an adapter's name must be"),
        ("x" * 257, "poet", "an adapter's name must be"),
        ("first", "poet", "the adapter 'first' is already loaded"),
        ("tiny", "poet", "'tiny' is a name of the model itself"),
        ("/models/tiny", "poet", "is a name of the model itself"),
        ("default", "poet", "is a name of the model itself"),
    ],
)
async def test_what_is_refused(http: Http, name: str, path: str, message: str) -> None:
    """A refusal states its reason and changes nothing else."""
    body = await load(http, name, path, 400)
    assert message in body["error_message"]
    assert body["loaded_adapters"] == {"first": "/adapters/first"}
    assert await complete(http, "first") == "CEG"
    await load(http, "x", "poet")


async def test_paths_may_be_absolute_or_linked_within_the_root(http: Http, root: Path) -> None:
    await load(http, "a", str(root / "poet"))
    await load(http, "b", "within")
    assert await complete(http, "a") == await complete(http, "b") == "DGJ"


@pytest.mark.parametrize(("body", "param"), [({}, "lora_name"), ({"lora_name": "x", "lora_path": 3}, "lora_path")])
async def test_a_body_that_is_not_one(http: Http, body: Any, param: str) -> None:
    answer = await http.post("/load_lora_adapter", json=body)
    assert answer.status_code == 400
    assert param in answer.json()["error"]["message"]


async def test_what_is_not_loaded_cannot_be_unloaded(http: Http) -> None:
    answer = await http.post("/unload_lora_adapter", json={"lora_name": "x"})
    assert answer.status_code == 400
    assert answer.json()["error_message"] == "the adapter 'x' is not loaded"


async def test_unloading_hides_at_once_and_waits_for_what_runs(http: Http, engine: FakeEngineClient) -> None:
    await load(http, "x", "poet")
    running = asyncio.create_task(complete(http, "x", max_tokens=60))
    while not engine.submitted:
        await asyncio.sleep(0)
    unloading = asyncio.create_task(http.post("/unload_lora_adapter", json={"lora_name": "x"}))
    while await complete(http, "x", max_tokens=1) != 404:
        await asyncio.sleep(0)
    await load(http, "x", "deep/pirate")  # the name is free
    assert len(await running) == 60
    assert (await unloading).json()["success"]
    assert await complete(http, "x") == "FKP"


async def test_pinned_adapters_leave_a_slot_to_the_others(http: Http) -> None:
    """One of the two slots besides the base's may be pinned, and the other, too, once no other adapter needs it."""
    await load(http, "p", "poet", pinned=True)
    body = await load(http, "q", "poet", 400, pinned=True)
    assert "which leaves no free slot of --max-loras-per-batch 3 to the others" in body["error_message"]
    await http.post("/unload_lora_adapter", json={"lora_name": "first"})
    await load(http, "q", "poet", pinned=True)
    await load(http, "x", "poet", 400)


class SlowClient:
    """An engine client whose `unload_adapter` waits until the test sets `ended`."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def load_adapter(self, source: AdapterSource) -> None:
        pass

    async def unload_adapter(self, key: str) -> None:
        await self.ended.wait()


async def test_what_is_being_unloaded_needs_its_slot_still(root: Path) -> None:
    client = SlowClient()
    registry = AdapterRegistry(client, config(max_loras_per_batch=2), root, ())  # type: ignore[arg-type]
    unloading = asyncio.create_task(registry.unload("first"))
    await asyncio.sleep(0)
    with pytest.raises(AdapterError, match="leaves no free slot"):
        await registry.load("p", "poet", pinned=True)
    client.ended.set()
    await unloading
    await registry.load("p", "poet", pinned=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": None}, "the server runs without LoRA"),
        ({"lora": config()}, "loading adapters at runtime requires --lora-root"),
    ],
)
async def test_a_server_that_cannot_load_says_so(engine: FakeEngineClient, settings: Any, message: str) -> None:
    async with AsyncTestClient(create_app(make_server(engine, **settings))) as http:
        assert message in (await load(http, "x", "poet", 400))["error_message"]


async def test_a_lost_engine_is_reported(http: Http, engine: FakeEngineClient) -> None:
    engine.lose("the engine process ended with code -9")
    for path, body in (("load", {"lora_name": "x", "lora_path": "poet"}), ("unload", {"lora_name": "first"})):
        assert (await http.post(f"/{path}_lora_adapter", json=body)).status_code == 503


def test_an_adapter_cannot_start_under_the_models_name(engine: FakeEngineClient) -> None:
    with pytest.raises(LaunchError, match="'tiny' is a name of the model itself"):
        make_server(engine, lora=LoraConfig(paths={"tiny": "/adapters/tiny"}))
