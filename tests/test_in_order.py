"""Messages in the order of their numbers, whatever the order they arrive in."""

from hypothesis import given
from hypothesis import strategies as st

from jobs.in_order import MOST_HELD, InOrder


@given(st.permutations(range(3 * MOST_HELD)))
def test_all_arrive_once(numbers):
    order = InOrder()
    found = [message for number in numbers for message in order.put(1, number, number)]
    assert sorted([*found, *order.rest()]) == list(range(len(numbers)))


@given(st.permutations(range(12)))
def test_any_order_of_a_few_is_put_right(numbers):
    order = InOrder()
    assert [message for number in numbers for message in order.put(3, number, number)] == list(range(12))
    assert order.rest() == []


def test_a_lost_one_does_not_hold_back_the_rest():
    order = InOrder()
    found = [message for number in range(1, 2 * MOST_HELD) for message in order.put(0, number, number)]
    assert found == list(range(1, 2 * MOST_HELD))
    # It comes after all: at once.
    assert order.put(0, 0, "late") == ["late"]


def test_a_later_series_brings_the_rest_of_the_one_before():
    order = InOrder()
    assert order.put(1, 1, "b") == []
    assert order.put(2, 0, "c") == ["b", "c"]
    assert order.put(1, 0, "a") == ["a"]
