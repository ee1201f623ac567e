"""The prefix cache: which pages match, which are evicted, and which remain."""

from jaxserve.scheduling.pages import PagePool
from jaxserve.scheduling.prefix_cache import PrefixCache


def fill(cache: PrefixCache, pool: PagePool, cache_key_prefix: str, tokens: list[int]) -> list[int]:
    """Cache a sequence that computes `tokens` and ends, with two tokens per page, and return its pages."""
    assert cache.make_room(len(tokens) // 2)
    pages = pool.take(len(tokens) // 2)
    cache.insert((cache_key_prefix,), tokens, pages)
    cache.release(pages)
    return pages


def test_matches_full_pages_of_the_longest_prefix() -> None:
    pool = PagePool(8)
    cache = PrefixCache(pool, 2)
    pages = fill(cache, pool, "", [1, 2, 3, 4, 5, 6])
    assert cache.match(("",), [1, 2, 3, 4, 9, 9]) == pages[:2]
    assert cache.match(("",), [1, 2, 3]) == pages[:1]
    assert cache.match(("",), [9, 2]) == []
    assert cache.match(("other",), [1, 2, 3, 4]) == []


def test_evicts_the_least_recently_used_leaf_and_never_a_held_page() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, 2)
    first = fill(cache, pool, "", [1, 1, 2, 2])
    fill(cache, pool, "", [3, 3, 4, 4])
    held = cache.match(("",), [1, 1])
    assert held == first[:1]
    assert cache.make_room(3)
    assert cache.match_length(("",), [1, 1, 2, 2]) == 1
    assert not cache.make_room(4)
    cache.release(held)
    assert cache.make_room(4)


def test_namespaces_do_not_pile_up() -> None:
    pool = PagePool(4)
    cache = PrefixCache(pool, 2)
    for salt in range(100):
        fill(cache, pool, str(salt), [1, 2, 3, 4])
    assert len(cache._roots) <= 2
    cache.flush()
    assert pool.num_free == 4
