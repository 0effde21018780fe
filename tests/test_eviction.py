"""What is evicted: pure choices against brute force and against LRU."""

import random
from collections import OrderedDict

from hypothesis import given, settings
from hypothesis import strategies as st

from data.eviction import NEVER, Cached, NextUses, victims

files = st.lists(
    st.builds(
        Cached,
        st.uuids().map(str),
        st.integers(1, 50),
        st.one_of(st.just(NEVER), st.integers(0, 20).map(float)),
        st.integers(0, 9).map(float),
        st.booleans(),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(files, st.integers(0, 60), st.integers(0, 300), st.integers(-1, 20))
def test_leases_hold_and_the_budget_is_kept_unless_only_protected_files_are_left(cached, needed, budget, keep_until):
    chosen = victims(cached, needed, budget, keep_until)
    left = [file for file in cached if file.name not in chosen]
    by_name = {file.name: file for file in cached}
    assert len(set(chosen)) == len(chosen)
    assert not any(by_name[name].leased or by_name[name].next_use <= keep_until for name in chosen)
    over = sum(file.bytes for file in left) + needed > budget
    assert not over or all(file.leased or file.next_use <= keep_until for file in left)
    # Nothing is given up without need: the last one chosen was still needed.
    if chosen:
        assert sum(file.bytes for file in left) + by_name[chosen[-1]].bytes + needed > budget
    # Whatever stays is needed no later than whatever goes.
    free = [file.next_use for file in left if not file.leased and file.next_use > keep_until]
    assert not chosen or not free or max(free) <= min(by_name[name].next_use for name in chosen)


def misses_lru(trace, places):
    cache, misses = OrderedDict(), 0
    for name in trace:
        if name not in cache:
            misses += 1
            if len(cache) == places:
                cache.popitem(last=False)
        cache[name] = True
        cache.move_to_end(name)
    return misses


def misses_farthest(trace, places):
    uses, cache, misses = NextUses(), {}, 0
    for at, name in enumerate(trace):
        uses.announce("r", trace[at:])
        if name not in cache:
            misses += 1
            cached = [Cached(other, 1, uses.next_use(other), last) for other, last in cache.items()]
            for gone in victims(cached, 1, places):
                del cache[gone]
        cache[name] = float(at)
        uses.used("r", name)
    return misses


def least_misses(trace, places):
    """Fewest misses of any policy, by trying all evictions."""
    states = {frozenset(): 0}
    for name in trace:
        following = {}
        for state, misses in states.items():
            if name in state:
                options = [(state, misses)]
            elif len(state) < places:
                options = [(state | {name}, misses + 1)]
            else:
                options = [(state - {gone} | {name}, misses + 1) for gone in state]
            for option, count in options:
                following[option] = min(count, following.get(option, count))
        states = following
    return min(states.values())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=18), st.integers(1, 4))
def test_with_a_known_future_no_policy_misses_less(trace, places):
    assert misses_farthest(trace, places) == least_misses(trace, places) <= misses_lru(trace, places)


def test_on_long_shuffled_epochs_it_misses_much_less_than_lru():
    generator, trace = random.Random(0), []
    for _ in range(8):
        trace += generator.sample(range(40), 40)
    trace = [str(name) for name in trace]
    assert misses_farthest(trace, 20) < 0.75 * misses_lru(trace, 20)


def test_orders_of_several_readers_are_merged_and_the_gone_are_forgotten():
    uses = NextUses()
    uses.announce("one", ["a", "b", "c", "b"])
    uses.announce("two", ["c", "d"])
    assert uses.order() == ["a", "c", "b", "d"] and uses.next_use("b") == 1
    uses.used("two", "c")
    assert uses.next_use("c") == 2
    uses.forget("one")
    assert uses.next_use("c") == NEVER and uses.order() == ["d"]
