"""Turns: one at a time, in the order in which they came, also where some leave before their turn."""

import ctypes
import random
import threading
import time

import pytest

from mtp_engine.runtime.turns import Turns


class Left(BaseException):
    """Comes between any two calls, as Ctrl-C does in the main thread."""


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # sent away between two rounds
@pytest.mark.parametrize("seed", range(3))
def test_one_at_a_time_though_some_leave(seed: int) -> None:
    """Some ask without waiting, and all are sent away now and then, wherever they are."""
    turns, busy, rng = Turns(), threading.Lock(), random.Random(seed)
    had, wrong, over = [0] * 6, list[int](), threading.Event()

    def work(number: int) -> None:
        mine = random.Random(100 * seed + number)
        while not over.is_set():
            try:
                turn = turns.new()
                with turn.lock:
                    if turn.wait(blocking=mine.random() < 0.8):
                        if busy.locked():
                            wrong.append(number)
                        with busy:
                            time.sleep(mine.choice([0, 0, 1e-4]))
                        had[number] += 1
            except Left:
                pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        time.sleep(rng.choice([0, 1e-4, 1e-3]))
        chosen = rng.choice(threads)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(chosen.ident or 0), ctypes.py_object(Left))
    over.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert sum(had) > 100
    last = turns.new()
    with last.lock:
        assert last.wait(blocking=False)


def test_in_the_order_in_which_they_came() -> None:
    """Whoever leaves is passed over, and those behind wait for those before."""
    turns, said = Turns(), list[int]()
    first = turns.new()
    with first.lock:
        assert first.wait()
        threads = [threading.Thread(target=lambda n: take(n), args=(number,)) for number in range(4)]

        def take(number: int) -> None:
            turn = turns.new()
            with turn.lock:
                if turn.wait(blocking=number != 1):
                    said.append(number)

        for number, thread in enumerate(threads):
            before = turns.last
            thread.start()
            while turns.last is before:
                time.sleep(1e-3)
            assert said == [], number
    for thread in threads:
        thread.join(10)
    assert said == [0, 2, 3]
