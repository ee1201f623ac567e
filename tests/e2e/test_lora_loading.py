"""Adapters are loaded and unloaded while a real server answers requests."""

import asyncio
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.conftest import ServerProcess
from tests.e2e.test_lora import complete
from tests.support.tiny import CONFIG, LINEAR_MODULES, write_adapter

FOLDERS = ("a", "b", "c", "d", "e")
NUM_OPERATIONS = 500
EVERYTHING = (*LINEAR_MODULES, "embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(FOLDERS):
        write_adapter(root / name, seed=seed, rank=2 + seed, modules=EVERYTHING if seed % 2 else LINEAR_MODULES)
    return root


@pytest.fixture(scope="module")
def lora_server(flags: list[str], root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with two slots besides the base's, and at most three adapters in host memory."""
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all", "--lora-root", str(root)]
    limits = ["--max-loras-per-batch", "3", "--max-loaded-loras", "3"]
    process = ServerProcess(*flags, *lora, *limits, log=tmp_path_factory.mktemp("lora") / "log").wait_ready()
    yield process
    assert process.stop() == 0
    assert "a step raised" not in process.log.read_text()


def change(server: ServerProcess, what: str, **body: object) -> tuple[int, str | None, list[str]]:
    """Load or unload an adapter; return the status, the error message and the names that are loaded then."""
    answer = httpx.post(f"{server.url}/{what}_lora_adapter", json=body, timeout=60)
    found = answer.json()
    return answer.status_code, found["error_message"], list(found["loaded_adapters"])


def load(server: ServerProcess, name: str, folder: str) -> None:
    assert change(server, "load", lora_name=name, lora_path=folder)[:2] == (200, None)


def unload(server: ServerProcess, name: str) -> None:
    assert change(server, "unload", lora_name=name)[:2] == (200, None)


@pytest.fixture(scope="module")
def alone(lora_server: ServerProcess) -> dict[str, str]:
    """The answers of the base and of each adapter when it is the only one loaded."""
    answers: dict[str, str] = {"": complete(lora_server, "tiny")}
    for folder in FOLDERS:
        load(lora_server, "alone", folder)
        answers[folder] = complete(lora_server, "alone")
        unload(lora_server, "alone")
    assert len(set(answers.values())) == len(answers)
    return answers


def test_more_adapters_than_memory_holds_are_read_again(
    lora_server: ServerProcess, alone: dict[str, str], root: Path
) -> None:
    for name in FOLDERS:
        load(lora_server, name, name)
    for name in (*FOLDERS, *FOLDERS):
        assert complete(lora_server, name) == alone[name]
    # An adapter that is read again must be the one that was loaded.
    kept = root / "a-kept"
    (root / "a").rename(kept)
    shutil.copytree(root / "b", root / "a")
    for name in FOLDERS[1:]:
        complete(lora_server, name)
    body = {"model": "a", "prompt": [1], "max_tokens": 1}
    answer = httpx.post(f"{lora_server.url}/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "the adapter 'a' cannot be read again")
    shutil.rmtree(root / "a")
    kept.rename(root / "a")
    assert complete(lora_server, "a") == alone["a"]
    for name in FOLDERS:
        unload(lora_server, name)


def test_adapters_that_cannot_be_served_change_nothing(
    lora_server: ServerProcess, alone: dict[str, str], root: Path
) -> None:
    load(lora_server, "good", "b")
    write_adapter(root / "wide", rank=9)
    write_adapter(root / "other-base", CONFIG | {"hidden_size": 32})
    write_adapter(root / "dora", use_dora=True)
    write_adapter(root / "huge", lora_alpha=1e300)
    (write_adapter(root / "empty") / "adapter_model.safetensors").unlink()
    (write_adapter(root / "pickle") / "adapter_model.safetensors").rename(root / "pickle" / "adapter_model.bin")
    broken = write_adapter(root / "nan") / "adapter_model.safetensors"
    tensors = load_file(broken)
    tensors[next(iter(tensors))][0, 0] = np.nan
    save_file(tensors, broken)
    cut = write_adapter(root / "cut") / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    for folder, message in {
        "wide": "rank 9 is more than --max-lora-rank 8",
        "other-base": "the adapter does not fit the model",
        "dora": "use_dora is True",
        "empty": "adapter_model.safetensors does not exist",
        "pickle": "is a pickle file",
        "huge": "are too large for float32",
        "nan": "values that are not finite",
        "cut": "adapter_model.safetensors",
        "../adapters": "not a folder below --lora-root",
    }.items():
        status, error, loaded = change(lora_server, "load", lora_name="bad", lora_path=folder)
        assert (status, loaded) == (400, ["good"])
        assert message in (error or "")
        assert str(root) not in (error or "")
        assert complete(lora_server, "good") == alone["b"]
    assert complete(lora_server, "tiny") == alone[""]
    unload(lora_server, "good")


class Clients:
    """Concurrent clients that load, unload and query adapters at random.

    Attributes:
        answered: number of requests that an adapter answered.
    """

    def __init__(self, url: str, alone: dict[str, str]) -> None:
        self._url = url
        self._alone = alone
        self._random = random.Random(0)
        # The folders that a name may be loaded from; the last name has two.
        self._folders = {"x": ["a"], "y": ["b"], "z": ["c"], "w": ["d", "e"]}
        # Names that are certainly loaded, and the number of requests to unload each name.
        self._loaded: set[str] = set()
        self._num_unloads: Counter[str] = Counter()
        self.answered = 0

    async def run(self, count: int) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as http:
            for _ in range(count):
                action = self._random.choice((self._load, self._unload, self._ask, self._ask, self._ask))
                await action(http, self._random.choice(list(self._folders)))

    async def _load(self, http: httpx.AsyncClient, name: str) -> None:
        before = self._num_unloads[name]
        body = {"lora_name": name, "lora_path": self._random.choice(self._folders[name])}
        answer = await http.post("/load_lora_adapter", json=body)
        if answer.status_code == 200 and self._num_unloads[name] == before:
            self._loaded.add(name)
        assert answer.status_code == 200 or "is already loaded" in answer.json()["error_message"]

    async def _unload(self, http: httpx.AsyncClient, name: str) -> None:
        self._num_unloads[name] += 1
        self._loaded.discard(name)
        answer = await http.post("/unload_lora_adapter", json={"lora_name": name})
        assert answer.status_code == 200 or "is not loaded" in answer.json()["error_message"]

    async def _ask(self, http: httpx.AsyncClient, name: str) -> None:
        loaded, before = name in self._loaded, self._num_unloads[name]
        body = {"prompt": [1, 2, 3], "max_tokens": 16, "temperature": 0, "ignore_eos": True, "model": f"tiny:{name}"}
        answer = await http.post("/v1/completions", json=body)
        if answer.status_code == 404:
            assert not loaded or self._num_unloads[name] > before
            return
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] in [self._alone[folder] for folder in self._folders[name]]
        self.answered += 1


def test_random_interleavings(lora_server: ServerProcess, alone: dict[str, str]) -> None:
    clients = Clients(lora_server.url, alone)

    async def run() -> None:
        await asyncio.gather(*(clients.run(NUM_OPERATIONS // 10) for _ in range(10)))

    asyncio.run(run())
    assert clients.answered > NUM_OPERATIONS // 10
    loaded = change(lora_server, "unload", lora_name="no such")[2]
    for name in loaded:
        unload(lora_server, name)
    assert change(lora_server, "unload", lora_name="no such")[2] == []
    # Every slot can be used again immediately.
    for folder in ("a", "b"):
        load(lora_server, folder, folder)
        assert complete(lora_server, folder) == alone[folder]
    assert "jaxserve_compiles_after_ready_total 0.0" in httpx.get(f"{lora_server.url}/metrics").text
