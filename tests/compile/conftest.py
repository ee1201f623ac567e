"""Fixtures that compile for devices that are not attached; outcomes are kept between runs and checked in each."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

if jax.__version_info__ >= (0, 11):
    from tests.support.outcomes import OutcomeStore, compiles_only


@pytest.fixture(autouse=True, scope="package")
def _compile_as_users_do(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile with every optimisation, and without JAX's cache, whose programs have no memory figures."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX remembers whether it has a cache.
    yield
    jax.config.update("jax_disable_most_optimizations", not request.config.getoption("--all"))
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, cache_folder: Path) -> "OutcomeStore":
    """The compile outcomes of earlier runs; with --recompile, every program is compiled again."""
    return OutcomeStore(cache_folder / "outcomes", recompile=request.config.getoption("--recompile"))


@pytest.fixture(autouse=True, scope="package")
def _keep_outcomes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make `Lowered.compile` ask the store first."""
    if jax.__version_info__ < (0, 11):
        yield
        return
    outcomes: OutcomeStore = request.getfixturevalue("outcomes")
    compile_here = jax.stages.Lowered.compile

    def compile_or_recall(lowered: jax.stages.Lowered, *args: Any, **kwargs: Any) -> Any:
        if not compiles_only(lowered):
            return compile_here(lowered, *args, **kwargs)
        assert not args
        assert not kwargs
        return outcomes.compile(lowered)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", compile_or_recall)
        yield
