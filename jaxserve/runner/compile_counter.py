"""Counts XLA compilations, so that "nothing is compiled while serving" can be checked."""

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts the backend compilations of this process, starting when the counter is created."""

    def __init__(self) -> None:
        self._total = 0
        self._at_ready: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def mark_ready(self) -> None:
        """Count all later compilations in `num_compiles_after_ready`, too."""
        self._at_ready = self._total

    def counts(self) -> dict[str, int]:
        """Return `num_compiles` and `num_compiles_after_ready`."""
        after = 0 if self._at_ready is None else self._total - self._at_ready
        return {"num_compiles": self._total, "num_compiles_after_ready": after}

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            self._total += 1
