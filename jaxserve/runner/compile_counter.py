"""Counts what XLA compiles, so that "no compile after ready" is a number and not a hope."""

import jax

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts backend compilations of this process from its creation on."""

    def __init__(self) -> None:
        self._total = 0
        self._at_ready: int | None = None
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def mark_ready(self) -> None:
        """Everything counted later was compiled while serving."""
        self._at_ready = self._total

    def counts(self) -> dict[str, int]:
        """`num_compiles` and `num_compiles_after_ready`."""
        after = 0 if self._at_ready is None else self._total - self._at_ready
        return {"num_compiles": self._total, "num_compiles_after_ready": after}

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILE_EVENT:
            self._total += 1
