"""The readers-writer lock of a layer's state."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time

import pytest

from hqq_oft.tuner.state_lock import StateLock


@pytest.fixture(autouse=True)
def _switch_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # switches threads as often as possible
    yield
    sys.setswitchinterval(interval)


def test_writers_are_not_starved_and_the_lock_is_reentrant():
    lock = StateLock()
    with lock.reading(), lock.reading(), lock.writing(), lock.writing(), lock.reading():
        pass
    order = []
    reading, wanted = threading.Event(), threading.Event()

    def read():
        with lock.reading():
            reading.set()
            wanted.wait()
            order.append("first reader")

    def write():
        with lock.writing():
            order.append("writer")

    def read_later():
        with lock.reading():
            order.append("second reader")

    threads = [threading.Thread(target=read, daemon=True)]
    threads[0].start()
    reading.wait()
    threads.append(threading.Thread(target=write, daemon=True))
    threads[1].start()
    while not lock._waiting:
        time.sleep(0.001)
    threads.append(threading.Thread(target=read_later, daemon=True))
    threads[2].start()
    time.sleep(0.02)
    assert order == []
    wanted.set()
    for thread in threads:
        thread.join(600)
    assert order == ["first reader", "writer", "second reader"]


def test_two_forwards_that_both_change_their_layer_do_not_deadlock():
    lock, errors, changed = StateLock(), [], []
    both_read = threading.Barrier(2)

    def change():
        try:
            with lock.reading():
                both_read.wait(600)
                with lock.writing():
                    changed.append(threading.get_ident())
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=change, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()
    assert len(changed) == len(errors) == 1
    assert "a forward in another thread waits to change this layer" in errors[0]
    with lock.writing(), lock.reading():
        pass


def test_a_copy_of_a_held_lock_is_not_held():
    lock = StateLock()
    with lock.writing():
        for copied in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            assert copied is not lock
            thread = threading.Thread(target=lambda other: other.writing().__enter__(), args=(copied,))
            thread.start()
            thread.join(600)
            assert not thread.is_alive()
