"""Set-up of every test session: eight CPU devices, strict dtype promotion, and shared fixtures."""

import contextlib
import gc
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# GPU programs are compiled without a GPU, so XLA cannot autotune by running candidates. Workers inherit the flags, and
# JAX's keys of compiled programs count every repetition.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(
        [
            *os.environ.get("XLA_FLAGS", "").split(),
            "--xla_force_host_platform_device_count=8",
            "--xla_gpu_autotune_level=0",
        ]
    )
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
# No deadline: the first example of a test pays for imports and compilation.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")

_NUM_SLOWEST = 25
_KEEP_DAYS = 14


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options `--all` and `--recompile`."""
    parser.addoption("--all", action="store_true", help="also the cases that are marked slow")
    parser.addoption(
        "--recompile", action="store_true", help="ask the compilers of targets again, whatever earlier runs kept"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Disable most compiler optimisations, in servers as well, unless `--all` asks for what users get.

    Tiny models take longer to compile than to run: without LLVM's optimisations, a test run is a quarter shorter.
    """
    if not config.getoption("--all"):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the slowest tests and the seconds spent in each folder."""
    seconds: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("@")[0]] += report.duration
    folders: Counter[str] = Counter()
    for test, duration in seconds.items():
        folders[test.partition("::")[0].rpartition("/")[0]] += duration
    terminalreporter.section(f"{_NUM_SLOWEST} slowest tests, in seconds with set-up and teardown")
    for test, duration in seconds.most_common(_NUM_SLOWEST):
        terminalreporter.write_line(f"{duration:8.1f}  {test}")
    terminalreporter.section("seconds of each folder, over all workers")
    for folder, duration in folders.most_common():
        terminalreporter.write_line(f"{duration:8.1f}  {folder}")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxserve-tests"


# xdist reads the groups in the same hook, so this one must run first.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow cases, and keep tests that share a server or an engine on one xdist worker."""
    if not config.getoption("--all") and "slow" not in (config.option.markexpr or ""):
        left_out = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str | None:
    shared = getattr(item, "fixturenames", ())
    for name in ("server", "demo"):
        if name in shared:
            return name
    scopes = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
    own = [name for name, definitions in scopes.items() if definitions[-1].scope == "module"]
    # Every module has one module-scoped fixture already: `_forget_compiled_programs`.
    return item.nodeid.partition("::")[0] if len(own) > 1 else None


def pytest_sessionstart(session: pytest.Session) -> None:
    """Delete cached files that have not been written or touched for `_KEEP_DAYS` days."""
    if hasattr(session.config, "workerinput"):
        return
    oldest = time.time() - _KEEP_DAYS * 24 * 3600
    for path in _cache_folder().rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink()


@pytest.fixture(scope="session")
def cache_folder() -> Path:
    """A folder that outlives a test run, so that unchanged programs are not compiled again."""
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@pytest.fixture(scope="session")
def compilation_cache(cache_folder: Path) -> str:
    """The folder of compiled programs, shared by workers and runs. JAX's keys cover programs, flags and versions."""
    return str(cache_folder / "compiled")


@pytest.fixture(scope="session", autouse=True)
def _share_compiled_programs(compilation_cache: str) -> None:
    """Let each test load the programs that other tests have compiled."""
    jax.config.update("jax_compilation_cache_dir", compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """Free the programs of each module, since XLA crashes when memory mappings run out.

    A CPU program has a dozen mappings, and Linux allows a process 65,530.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, as the server does."""
    return "asyncio"
