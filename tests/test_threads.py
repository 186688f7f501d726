"""Forwards in some threads while others change the layer: every output matches a state between two changes."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time

import pytest
import torch
from helpers import add_adapter, hqq_layer, oft_layer, packed_bytes, same_bytes

from hqq_oft.tuner.state_lock import StateLock

SECONDS = 2.0


@pytest.fixture(autouse=True)
def _switch_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # switches threads as often as possible
    yield
    sys.setswitchinterval(interval)


def two_adapters():
    layer = oft_layer(hqq_layer(32, 48, group_size=16, optimize=False), adapter="a", std=0.2).eval()
    add_adapter(layer, "b", std=0.2)
    return layer


def change_state(layer, number):
    (
        lambda: layer.set_adapter("a"),
        lambda: layer.merge(),
        lambda: layer.unmerge(),
        lambda: layer.set_adapter(["a", "b"]),
        lambda: layer.merge(),
        lambda: layer.unmerge(),
        lambda: layer.set_adapter("b"),
        lambda: layer.merge(adapter_names=["b"]),
        lambda: layer.enable_adapters(False),  # the next forward unmerges, or this does
        lambda: layer.merged and layer.unmerge(),
        lambda: layer.enable_adapters(True),
    )[number % 11]()


def run_threads(*workers):
    """Repeat each worker until the time is up or one fails; return the exceptions."""
    errors: list[BaseException] = []
    until = time.monotonic() + SECONDS

    def repeat(worker):
        number = 0
        try:
            while time.monotonic() < until and not errors:
                worker(number)
                number += 1
            assert number > 20, "it hardly ran"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS + 30)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return errors


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("training", [False, True])
def test_no_forward_sees_a_partial_change(training):
    layer, x = two_adapters(), torch.randn(3, 48)
    pristine = packed_bytes(layer.get_base_layer())
    with torch.no_grad():
        legal = []
        for number in range(22):
            change_state(layer, number)
            legal.append(layer(x))
    legal = list({tuple(out.flatten().tolist()): out for out in legal}.values())
    assert len(legal) == 7  # three sets of adapters, each merged and not, and the base
    layer.train(training)
    seen = set()

    def forward(number):
        with torch.set_grad_enabled(training):
            out = layer(x)
        matches = [index for index, state in enumerate(legal) if torch.equal(out, state)]
        assert matches, "an output of no state there was"
        seen.update(matches)

    errors = run_threads(forward, forward, lambda number: change_state(layer, number))
    if errors:
        raise errors[0]
    assert len(seen) >= 5
    if layer.merged:
        layer.unmerge()
    assert same_bytes(layer.get_base_layer(), pristine)


def test_adapters_are_added_and_deleted_while_others_serve():
    layer, x = two_adapters(), torch.randn(3, 48)
    with torch.no_grad():
        expected = layer(x)
        mixed = layer(x, adapter_names=["a", "__base__", "b"])

        @torch.no_grad()
        def serve(number):
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x, adapter_names=["a", "__base__", "b"]), mixed)

        def guest(number):
            add_adapter(layer, "guest")
            layer.delete_adapter("guest")

        errors = run_threads(serve, serve, guest)
    if errors:
        raise errors[0]


def test_merges_in_several_threads_are_serialized():
    layer = two_adapters()
    layer.set_adapter(["a", "b"])
    pristine = packed_bytes(layer.get_base_layer())
    layer.merge()
    both = packed_bytes(layer.get_base_layer())
    layer.unmerge()
    for _ in range(20):
        threads = [threading.Thread(target=layer.merge, kwargs={"adapter_names": [name]}) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert layer.merged_adapters == ["a", "b"]
        assert same_bytes(layer.get_base_layer(), both)
        layer.unmerge()
        assert same_bytes(layer.get_base_layer(), pristine)


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
        thread.join(10)
    assert order == ["first reader", "writer", "second reader"]


def test_two_forwards_that_both_change_their_layer_do_not_deadlock():
    lock, errors, changed = StateLock(), [], []
    both_read = threading.Barrier(2)

    def change():
        try:
            with lock.reading():
                both_read.wait(10)
                with lock.writing():
                    changed.append(threading.get_ident())
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=change, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
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
            thread.join(10)
            assert not thread.is_alive()
