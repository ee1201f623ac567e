"""What the server does with the results of a check."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from jaxserve.layout.backends import choose_attention_backend
from jaxserve.layout.device_results import (
    DeviceResults,
    current_versions,
    read_results,
    results_path,
    write_results,
)
from jaxserve.parallel.mesh import make_mesh
from kernels_pallas.paged_attention.cases import Case
from kernels_pallas.tuning import TuningTable, attention_key, fields_of, pick
from tests.support.kernels import needs_pallas

KIND = "cpu"  # that of the devices that tests run on
CONFIG = Case(q_lens=(), kv_lens=(), heads=(8, 2, 128), page_size=128).config("bfloat16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_CACHE", str(tmp_path))


def results(**fields: Any) -> DeviceResults:
    return DeviceResults(**{"device_kind": KIND, "versions": current_versions(), **fields})


def test_nothing_was_checked() -> None:
    assert read_results(KIND) == DeviceResults(device_kind=KIND, versions={})


def test_results_are_read_back() -> None:
    written = results(failed={"sampling": ["a call"]}, tiles={"attention decode": {"keys": 64}})
    write_results(written)
    assert read_results(KIND) == written


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"device_kind": "TPU v9"}, "it is for TPU v9, not for cpu"),
        ({"versions": {"jaxlib": "0.1"}}, "it is for {'jaxlib': '0.1'}, not for"),
    ],
)
def test_results_of_other_devices_or_versions_are_refused(
    fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_results(results())
    results_path(KIND).write_bytes(msgspec.json.encode(results(tiles={"x": {"keys": 1}}, **fields)))
    with caplog.at_level(logging.WARNING):
        assert not read_results(KIND).tiles
    assert reason in caplog.text


def test_a_damaged_file_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    write_results(results())
    results_path(KIND).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert not read_results(KIND).tiles
    assert "tiles are chosen by formulas" in caplog.text


def test_auto_does_not_take_kernels_that_failed() -> None:
    write_results(results(failed={"paged_attention": ["tiny, one row: crashed"]}))
    choice = choose_attention_backend("auto", CONFIG, make_mesh(1))
    assert (choice.name, choice.is_fallback) == ("xla", True)
    assert choice.reason == (
        "device_check found 1 wrong results of the native kernels, such as: tiny, one row: crashed"
    )


@needs_pallas
def test_a_tile_of_the_table_is_used_if_it_is_legal() -> None:
    from kernels_pallas.paged_attention.gpu.tile import legal_tiles

    tiles = legal_tiles(CONFIG, decode=True)
    assert len(tiles) > 2
    table = TuningTable({attention_key(CONFIG, "decode"): fields_of(tiles[2])})
    assert pick(tiles, table.tiles.get(attention_key(CONFIG, "decode"))) == tiles[2]
    assert pick(tiles, table.tiles.get(attention_key(CONFIG, "prefill"))) == tiles[0]
    assert pick(tiles, fields_of(tiles[2]) | {"keys": 1 << 20}) == tiles[0]


@needs_pallas
def test_dispatch_takes_tiles_from_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels_pallas import dispatch
    from kernels_pallas.paged_attention.gpu import backend

    made: dict[str, Any] = {}
    monkeypatch.setattr(backend, "GpuAttention", lambda *_, **options: made.update(options))
    gpu = SimpleNamespace(platform="cuda", device_kind="NVIDIA H100 80GB HBM3")
    mesh: Any = SimpleNamespace(devices=SimpleNamespace(flat=[gpu]), shape=make_mesh(1).shape)
    wanted = dispatch.attention_tiles(CONFIG, mesh)[key := attention_key(CONFIG, "decode")][1]
    dispatch.choose_attention("auto", CONFIG, mesh, TuningTable({key: wanted}))
    assert fields_of(made["tiles"][0]) == wanted
