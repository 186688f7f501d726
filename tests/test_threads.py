"""Forwards in some threads while others change the layer: every output matches a state between two changes."""

from __future__ import annotations

import sys
import threading
from operator import ge

import pytest
import torch
from helpers import add_adapter, hqq_layer, oft_layer, packed_bytes, same_bytes

CHANGES = 11 * 20
HANGS = 600  # seconds; only a deadlock takes that long


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


def run_threads(changer, *workers, changes=CHANGES):
    """Call `changer(number)` a number of times while the workers repeat; return the exceptions.

    After every other change each worker finishes a whole call, so that it computes with every second state whatever the
    scheduler does; after the rest the changer goes on at once, so that changes meet calls anywhere.
    """
    errors: list[BaseException] = []
    ended = threading.Event()
    finished = [0] * len(workers)
    advanced = threading.Condition()

    def repeat(index, worker):
        try:
            while not ended.is_set() and not errors:
                worker()
                with advanced:
                    finished[index] += 1
                    advanced.notify_all()
        except BaseException as error:
            fail(error)

    def fail(error):
        with advanced:
            errors.append(error)
            advanced.notify_all()

    def change():
        try:
            for number in range(changes):
                changer(number)
                if number % 2:
                    with advanced:
                        # The first of two calls may have begun before the change.
                        wanted = [count + 2 for count in finished]
                        advanced.wait_for(lambda wanted=wanted: errors or all(map(ge, finished, wanted)))
                if errors:
                    return
        except BaseException as error:
            fail(error)
        finally:
            ended.set()

    threads = [threading.Thread(target=repeat, args=each, daemon=True) for each in enumerate(workers)]
    threads.append(threading.Thread(target=change, daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
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

    def forward():
        with torch.set_grad_enabled(training):
            out = layer(x)
        matches = [index for index, state in enumerate(legal) if torch.equal(out, state)]
        assert matches, "an output of no state there was"
        seen.update(matches)

    errors = run_threads(lambda number: change_state(layer, number), forward, forward)
    if errors:
        raise errors[0]
    assert len(seen) == 7
    if layer.merged:
        layer.unmerge()
    assert same_bytes(layer.get_base_layer(), pristine)


def test_adapters_are_added_and_deleted_while_others_serve():
    layer, x = two_adapters(), torch.randn(3, 48)
    with torch.no_grad():
        expected = layer(x)
        mixed = layer(x, adapter_names=["a", "__base__", "b"])

        @torch.no_grad()
        def serve():
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(x, adapter_names=["a", "__base__", "b"]), mixed)

        def guest(number):
            add_adapter(layer, "guest")
            layer.delete_adapter("guest")

        errors = run_threads(guest, serve, serve)
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
