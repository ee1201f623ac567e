"""The assignment of LoRA adapters to the device's slots."""

from collections import Counter, OrderedDict

from jaxserve.config import LoraEvictionPolicy
from jaxserve.step import AdapterLoad


class AdapterSlots:
    """Slots by adapter. Slot 0 is reserved for rows without an adapter, whose key is `""`.

    An adapter stays in its slot after its last row has left, until another adapter needs the slot.

    Args:
        num_slots: number of slots, slot 0 included.
        policy: which adapter without rows is evicted first: the least recently used, or the first loaded.
    """

    def __init__(self, num_slots: int, policy: LoraEvictionPolicy = "lru") -> None:
        self._num_slots = num_slots
        self._policy = policy
        self._pinned: set[str] = set()
        self.clear()

    def clear(self) -> None:
        """Mark all slots as empty after the device has lost their contents; no row may be running."""
        self._free = list(range(self._num_slots - 1, 0, -1))
        # In eviction order.
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._num_rows: Counter[str] = Counter()
        self._loads: list[AdapterLoad] = []

    def has_free_slot(self, key: str) -> bool:
        """Whether `hold` would find a slot for the adapter."""
        return not key or key in self._slots or bool(self._free) or self._idle() is not None

    def hold(self, key: str) -> int:
        """Return the adapter's slot and count one more row; the next step loads the adapter if the slot is new."""
        if not key:
            return 0
        if key not in self._slots:
            if not self._free:
                idle = self._idle()
                assert idle is not None, "call has_free_slot before hold"
                self._free.append(self._slots.pop(idle))
            self._slots[key] = self._free.pop()
            self._loads.append(AdapterLoad(self._slots[key], key))
        elif self._policy == "lru":
            self._slots.move_to_end(key)
        self._num_rows[key] += 1
        return self._slots[key]

    def release(self, key: str) -> None:
        """Count one row fewer for the adapter."""
        if key:
            self._num_rows[key] -= 1

    def pin(self, key: str) -> None:
        """Never give the adapter's slot to another adapter."""
        self._pinned.add(key)

    def forget(self, key: str) -> None:
        """Free the slot of an adapter that is removed; no row may use it."""
        assert not self._num_rows.pop(key, 0)
        self._pinned.discard(key)
        if (slot := self._slots.pop(key, None)) is not None:
            self._free.append(slot)
            self._loads = [load for load in self._loads if load.key != key]

    def take_loads(self) -> tuple[AdapterLoad, ...]:
        """Return the loads for the next step: those added since the last call."""
        loads, self._loads = tuple(self._loads), []
        return loads

    def _idle(self) -> str | None:
        movable = (key for key in self._slots if key not in self._pinned)
        return next((key for key in movable if not self._num_rows[key]), None)
