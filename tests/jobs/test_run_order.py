"""The order of tasks: as given, and nothing large left for the end."""

import random
from typing import NamedTuple

from jobs.run_order import Queue


class Item(NamedTuple):
    name: str
    size: float = 0.0


def order(items: list[Item], window: int) -> list[str]:
    queue = Queue(items)
    found: list[str] = []
    while queue:
        found.append(queue.pop(window).name)
    return found


def seconds(sizes: list[float], workers: int, *, is_given_order: bool) -> float:
    """How long a stage lasts where each worker takes the next task when it is free."""
    items = [Item(str(index), size) for index, size in enumerate(sizes)]
    queue = Queue(items)
    free = [0.0] * workers
    for item in items:
        taken = item if is_given_order else queue.pop(2 * workers)
        free[free.index(min(free))] += taken.size
    return max(free)


def test_without_sizes_or_inline_the_order_is_the_one_given():
    items = [Item(name) for name in "cab"]
    assert order(items, 8) == list("cab")
    items = [Item("a", 1), Item("b", 9), Item("c", 2)]
    assert order(items, 1) == list("abc")


def test_a_large_task_at_the_end_starts_while_there_is_work_for_the_others():
    items = [*(Item(str(number), 1.0) for number in range(40)), Item("large", 8.0)]
    found = order(items, 4)
    assert found.index("large") == 16, "48 - 16 is left, and 8 * 4 is no less"
    assert [name for name in found if name != "large"] == [str(number) for number in range(40)]


def test_the_last_ones_start_largest_first_and_of_equals_the_first():
    items = [Item(name, size) for name, size in zip("abcdef", (1, 3, 2, 3, 1, 2), strict=True)]
    assert order(items, 100) == list("bdcfae")


def test_no_stage_lasts_much_longer_than_its_work_or_its_largest_task():
    draw = random.Random(0)
    for _ in range(50):
        workers = draw.randint(2, 8)
        sizes = [draw.paretovariate(1.2) for _ in range(draw.randint(workers, 200))]
        least = max(sum(sizes) / workers, max(sizes))
        assert seconds(sizes, workers, is_given_order=False) <= 1.34 * least
    sizes = [1.0] * 100 + [30.0]
    assert seconds(sizes, 4, is_given_order=True) == 55
    assert seconds(sizes, 4, is_given_order=False) <= 34


def test_what_is_put_back_comes_next_or_last():
    queue = Queue([Item(name) for name in "abc"])
    first, second = queue.pop(4), queue.pop(4)
    queue.put_back(first, soon=False)
    queue.put_back(second, soon=True)
    assert len(queue) == 3
    assert [queue.pop(4).name for _ in range(3)] == ["b", "c", "a"]
    assert not queue


def test_ten_thousand_tasks_come_out_once_each():
    items = [Item(str(number), float(number % 97)) for number in range(10_000)]
    assert sorted(order(items, 64)) == sorted(item.name for item in items)
