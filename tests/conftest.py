"""Eight CPU devices, strict dtypes, and shared fixtures."""

import gc
import os
from collections.abc import Iterator
from typing import Any

# GPU programs are compiled without a GPU, on which candidates could be tried.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0"
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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How long the compilers took for the steps of real targets."""
    seconds = {
        report.nodeid.rpartition("::")[2]: " + ".join(
            f"{value}" for name, value in report.user_properties if name == "compile_s"
        )
        for report in terminalreporter.stats.get("passed", [])
        if any(name == "compile_s" for name, _ in report.user_properties)
    }
    if seconds:
        terminalreporter.section("seconds to compile")
        for test, value in sorted(seconds.items()):
            terminalreporter.write_line(f"{value:>12}  {test}")


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One folder of compiled programs, shared by the workers of a run."""
    return str(tmp_path_factory.getbasetemp().parent / "compiled")


@pytest.fixture(scope="session", autouse=True)
def _share_compiled_programs(compilation_cache: str) -> None:
    """What one test has compiled, others load."""
    jax.config.update("jax_compilation_cache_dir", compilation_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """A CPU program is a dozen memory mappings, of which Linux gives a process 65,530: XLA crashes at the next."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as the server does."""
    return "asyncio"
