"""Which adapter is in which of the device's slots."""

from collections import Counter, OrderedDict

from jaxserve.config import LoraEvictionPolicy
from jaxserve.step import AdapterLoad


class AdapterSlots:
    """Slots by adapter. Slot 0 is of rows without one, and never changes hands; `""` names no adapter.

    An adapter stays in its slot after its last row has left, until another one needs the slot.

    Args:
        num_slots: slot 0 included.
        policy: who goes first of those that no row uses: the one that was used least recently, or came first.
    """

    def __init__(self, num_slots: int, policy: LoraEvictionPolicy = "lru") -> None:
        self._num_slots = num_slots
        self._policy = policy
        self._pinned: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """The device's slots have lost what was in them, and no row runs."""
        self._free = list(range(self._num_slots - 1, 0, -1))
        # In the order in which they go.
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._num_rows: Counter[str] = Counter()
        self._loads: list[AdapterLoad] = []

    def has_free_slot(self, adapter: str) -> bool:
        """Whether `hold` would find a slot."""
        return not adapter or adapter in self._slots or bool(self._free) or self._idle() is not None

    def hold(self, adapter: str) -> int:
        """The adapter's slot, for one row more; the device loads it with the next step, if it has not yet."""
        if not adapter:
            return 0
        if adapter not in self._slots:
            if not self._free:
                idle = self._idle()
                assert idle is not None, "has_room was not asked"
                self._free.append(self._slots.pop(idle))
            self._slots[adapter] = self._free.pop()
            self._loads.append(AdapterLoad(self._slots[adapter], adapter))
        elif self._policy == "lru":
            self._slots.move_to_end(adapter)
        self._num_rows[adapter] += 1
        return self._slots[adapter]

    def release(self, adapter: str) -> None:
        """One row less."""
        if adapter:
            self._num_rows[adapter] -= 1

    def pin(self, adapter: str) -> None:
        """Never give the adapter's slot to another one."""
        self._pinned.add(adapter)

    def forget(self, adapter: str) -> None:
        """The adapter is gone: its slot is free. No row uses it."""
        assert not self._num_rows.pop(adapter, 0)
        self._pinned.discard(adapter)
        if (slot := self._slots.pop(adapter, None)) is not None:
            self._free.append(slot)
            self._loads = [load for load in self._loads if load.adapter != adapter]

    def take_loads(self) -> tuple[AdapterLoad, ...]:
        """What the next step has to load, since the last call."""
        loads, self._loads = tuple(self._loads), []
        return loads

    def _idle(self) -> str | None:
        movable = (adapter for adapter in self._slots if adapter not in self._pinned)
        return next((adapter for adapter in movable if not self._num_rows[adapter]), None)
