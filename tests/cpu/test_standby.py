"""Helpers between two tasks: what a box says, who gets an offer, and that nobody reads a task that is over."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from numbaflash.cpu.jit import entry_point, kernel
from numbaflash.cpu.record import address_of_array
from numbaflash.cpu.standby import BOX_BYTES, STAND_BY_NS, await_items, count_asleep, offer, stand_by, work_together
from numbaflash.cpu.task import Task, report_item, take_item, task_at
from numbaflash.cpu.vector import store_int

ASLEEP, STANDING_BY, SOMEBODYS = 0, 1, 1 << 30
ROOM = 4096


class Boxes:
    """As the pool has them; each says one thing, and all helpers have so much scratch memory."""

    def __init__(self, *words: int, room: int = ROOM) -> None:
        self.memory = np.zeros((len(words), BOX_BYTES // 8), np.int64)
        self.memory[:, 0], self.memory[:, 1] = words, room
        self.address = address_of_array(self.memory)

    @property
    def words(self) -> list[int]:
        return self.memory[:, 0].tolist()


@kernel
def write_numbers(task_address, scratch):
    """Write each item's number to its place in `out`, and to scratch memory."""
    task = task_at(task_address)
    while True:
        item = take_item(task_address)
        if item >= task.items:
            break
        store_int(task.out + 8 * item, item)
        store_int(scratch, item)
        report_item(task_address)


def task_for(numbers: np.ndarray, scratch_bytes: int = ROOM) -> Task:
    return Task(
        items=len(numbers), out=address_of_array(numbers), entry=entry_point(write_numbers), scratch_bytes=scratch_bytes
    )


def test_those_who_stand_by_get_the_task_and_those_who_sleep_are_to_be_woken_up() -> None:
    boxes, task = Boxes(ASLEEP, STANDING_BY, SOMEBODYS, ASLEEP, STANDING_BY), Task()
    assert count_asleep(boxes.address, 5, 3, 0) == 1
    offer(boxes.address, 5, 3, task.address)
    assert boxes.words == [ASLEEP, task.address, SOMEBODYS, ASLEEP, task.address]


@pytest.mark.parametrize(("wanted", "to_be_woken_up"), [(1, 1), (2, 2), (5, 2)])
def test_nobody_is_woken_up_twice_or_for_those_at_work(wanted: int, to_be_woken_up: int) -> None:
    assert count_asleep(Boxes(ASLEEP, SOMEBODYS, ASLEEP).address, 3, wanted, 0) == to_be_woken_up


def test_nobody_is_woken_up_where_enough_stand_by() -> None:
    assert count_asleep(Boxes(ASLEEP, STANDING_BY, STANDING_BY).address, 3, 1, 0) == 0


def test_no_more_get_a_task_than_are_wanted() -> None:
    boxes, task = Boxes(STANDING_BY, STANDING_BY, STANDING_BY), Task()
    offer(boxes.address, 3, 2, task.address)
    assert boxes.words == [task.address, task.address, STANDING_BY]


def test_a_helper_with_too_little_memory_is_to_look_for_the_task_elsewhere() -> None:
    boxes, task = Boxes(STANDING_BY, room=100), Task(scratch_bytes=101)
    assert count_asleep(boxes.address, 1, 1, 101) == 1
    offer(boxes.address, 1, 1, task.address)
    assert boxes.words == [STANDING_BY]


def test_what_nobody_has_begun_is_taken_back_and_others_tasks_stay() -> None:
    task, others = Task(), Task()
    boxes = Boxes(STANDING_BY, others.address, others.address + 1, ASLEEP)
    offer(boxes.address, 4, 1, task.address)
    await_items(task.address, boxes.address, 4)
    assert boxes.words == [STANDING_BY, others.address, others.address + 1, ASLEEP]


def test_items_that_could_not_be_taken_before_are_done_from_the_first_that_is_not_done() -> None:
    numbers, scratch = np.full(5, -1), np.zeros(ROOM // 8, np.int64)
    task = task_for(numbers)
    task["items_done"], task["next_item"] = 2, task["items"]
    work_together(task.address, address_of_array(scratch), Boxes(ASLEEP).address, 1, 1)
    assert numbers.tolist() == [-1, -1, 2, 3, 4]


def test_a_task_that_a_helper_still_reads_is_waited_for() -> None:
    task = Task()
    boxes = Boxes(task.address + 1)
    waiting = threading.Thread(target=await_items, args=(task.address, boxes.address, 1))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    boxes.memory[0, 0] = STANDING_BY
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_helper_does_what_it_is_offered_then_stands_by_for_more_and_goes_to_sleep() -> None:
    numbers, scratch = np.full(3, -1), np.zeros(ROOM // 8, np.int64)
    task = task_for(numbers)
    boxes = Boxes(task.address)
    before = time.monotonic_ns()
    last_done = stand_by(boxes.address, address_of_array(scratch), ROOM)
    now = time.monotonic_ns()
    assert boxes.words == [ASLEEP]
    assert numbers.tolist() == [0, 1, 2]
    assert last_done >= before
    # It stood by; or the CPU was taken from it, and it is to give way until then.
    assert last_done <= now - STAND_BY_NS or last_done > now


def test_a_helper_who_is_offered_nothing_goes_to_sleep() -> None:
    boxes, scratch = Boxes(ASLEEP, room=0), np.zeros(ROOM, np.uint8)
    stand_by(boxes.address, address_of_array(scratch), ROOM)
    assert boxes.words == [ASLEEP]
    assert boxes.memory[0, 1] == ROOM
