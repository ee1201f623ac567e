"""The pool of key/value pages and their reference counts. It knows neither tokens nor sequences."""


class PagePool:
    """Reference-counted pages. A page is free as soon as its last holder releases it."""

    def __init__(self, num_pages: int) -> None:
        # Popped from the end, so low ids are used first.
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages

    @property
    def num_pages(self) -> int:
        """Number of pages in the pool."""
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """Number of pages without a holder."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Take `count` free pages; each starts with one holder.

        Raises:
            ValueError: fewer pages are free; none is taken.
        """
        if count > len(self._free):
            raise ValueError(f"{count} pages requested, {len(self._free)} free")
        if count == 0:
            return []
        pages = self._free[-count:][::-1]
        del self._free[-count:]
        for page in pages:
            self._holders[page] = 1
        return pages

    def hold(self, page: int) -> None:
        """Add a holder to a page that has one.

        Raises:
            ValueError: the page is free.
        """
        if not self._holders[page]:
            raise ValueError(f"page {page} is free")
        self._holders[page] += 1

    def release(self, page: int) -> int:
        """Drop a holder; return the number of holders left.

        Raises:
            ValueError: the page is free already.
        """
        if not self._holders[page]:
            raise ValueError(f"page {page} is free")
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)
        return self._holders[page]

    def num_holders(self, page: int) -> int:
        """Return the number of holders of a page."""
        return self._holders[page]
