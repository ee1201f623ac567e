"""The prefix cache: a radix tree over full pages of tokens (RadixAttention, arXiv:2312.07104).

A node is one page; its edge is that page's tokens, compared in full, so a hash collision can never make two prompts
share a page. The tree is a holder of each of its pages; a page without another holder can be evicted, least recently
used leaf first. Trees of different key prefixes (adapter, cache salt) share nothing.
"""

import heapq
from collections.abc import Sequence as Tokens
from itertools import count
from typing import TypeAlias

from jaxserve.scheduling.pages import PagePool

CacheKeyPrefix: TypeAlias = tuple[str, ...]


class _Node:
    __slots__ = ("children", "edge", "page", "parent", "used")

    def __init__(self, parent: "_Node | None", edge: tuple[int, ...], page: int) -> None:
        self.parent = parent
        self.edge = edge
        self.page = page
        self.children: dict[tuple[int, ...], _Node] = {}
        self.used = 0


class PrefixCache:
    """A radix tree from token prefixes to pages of a `PagePool`.

    Args:
        pool: the pool that the pages belong to.
        page_size: tokens per page.
        enabled: if False, nothing is inserted and nothing matches.
    """

    def __init__(self, pool: PagePool, page_size: int, *, enabled: bool = True) -> None:
        self._pool = pool
        self._page_size = page_size
        self.enabled = enabled
        self._roots: dict[CacheKeyPrefix, _Node] = {}
        self._nodes: dict[int, _Node] = {}
        # Heap of evictable nodes by last use; entries go stale and are checked when popped.
        self._idle: list[tuple[int, int, _Node]] = []
        self._clock = count(1)

    @property
    def num_pages(self) -> int:
        """Number of pages in the tree."""
        return len(self._nodes)

    def match(self, cache_key_prefix: CacheKeyPrefix, tokens: Tokens[int]) -> list[int]:
        """Return the pages of the longest cached prefix; the caller becomes a holder of each."""
        path = self._path(cache_key_prefix, tokens)
        for node in path:
            self._touch(node)
            self._pool.hold(node.page)
        return [node.page for node in path]

    def match_length(self, cache_key_prefix: CacheKeyPrefix, tokens: Tokens[int]) -> int:
        """Return the number of pages that `match` would return, without holding them or marking them as used."""
        return len(self._path(cache_key_prefix, tokens))

    def insert(self, cache_key_prefix: CacheKeyPrefix, tokens: Tokens[int], pages: Tokens[int], first: int = 0) -> None:
        """Insert full pages; a prefix that is already in the tree keeps its own page.

        Args:
            cache_key_prefix: requests with the same key prefix may share the pages.
            tokens: the whole prefix, page_size tokens per page.
            pages: the pages that hold the tokens.
            first: pages before this index are known to be in the tree.
        """
        if not self.enabled or first >= len(pages):
            return
        node = self._roots.setdefault(cache_key_prefix, _Node(None, (), -1))
        for index, page in enumerate(pages):
            edge = tuple(tokens[index * self._page_size : (index + 1) * self._page_size])
            child = node.children.get(edge)
            if child is None:
                if page in self._nodes:
                    # The page is elsewhere in the tree: its prefix was evicted and is being recomputed.
                    return
                child = _Node(node, edge, page)
                node.children[edge] = child
                self._nodes[page] = child
                self._pool.hold(page)
            self._touch(child)
            node = child

    def release(self, pages: Tokens[int]) -> None:
        """Release a sequence's pages; those that only the tree still holds become evictable."""
        for page in reversed(pages):
            if self._pool.release(page) == 1 and page in self._nodes:
                self._push_idle(self._nodes[page])

    def make_room(self, num_pages: int) -> bool:
        """Evict until `num_pages` pages are free; if that is impossible, evict all evictable ones and return False."""
        while self._pool.num_free < num_pages and self._idle:
            used, _, node = heapq.heappop(self._idle)
            if self._evictable(node) and node.used == used:
                self._evict(node)
        return self._pool.num_free >= num_pages

    def flush(self) -> None:
        """Remove all pages from the tree; sequences keep the pages they hold."""
        for page in self._nodes:
            self._pool.release(page)
        self._roots.clear()
        self._nodes.clear()
        self._idle.clear()

    def _path(self, cache_key_prefix: CacheKeyPrefix, tokens: Tokens[int]) -> list[_Node]:
        node = self._roots.get(cache_key_prefix)
        path: list[_Node] = []
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            node = node.children.get(tuple(tokens[start : start + self._page_size])) if node else None
            if node is None:
                break
            path.append(node)
        return path

    def _touch(self, node: _Node) -> None:
        node.used = next(self._clock)
        if self._evictable(node):
            self._push_idle(node)

    def _evictable(self, node: _Node) -> bool:
        return self._nodes.get(node.page) is node and not node.children and self._pool.num_holders(node.page) == 1

    def _push_idle(self, node: _Node) -> None:
        heapq.heappush(self._idle, (node.used, next(self._clock), node))
        if len(self._idle) > 4 * len(self._nodes) + 64:
            self._idle = [entry for entry in self._idle if self._evictable(entry[2]) and entry[2].used == entry[0]]
            heapq.heapify(self._idle)

    def _evict(self, node: _Node) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.edge]
        del self._nodes[node.page]
        self._pool.release(node.page)
        if self._evictable(parent):
            self._push_idle(parent)
        elif parent.parent is None and not parent.children:
            # The key prefix has no pages left. Clients choose the salts, so empty roots must not accumulate.
            self._roots = {
                cache_key_prefix: root for cache_key_prefix, root in self._roots.items() if root is not parent
            }
