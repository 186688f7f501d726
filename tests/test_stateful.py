"""Random calls on random layers, compared with a model of the expected state.

A layer's state, as its user sees it: which adapters there are, with which parameters, which are active, merged,
disabled, and what the layer computes. After every call the state is the expected one; after one that raises, the one
from before.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import oracle
import torch
from helpers import hqq_layer, packed_bytes, relative_error, same_bytes
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

from hqq_oft import HqqOFTLinear

NAMES = st.sampled_from(["a", "b", "c"])
OUT, IN = 16, 24
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(0))

LAYERS = st.fixed_dictionaries(
    {
        "nbits": st.sampled_from([8, 4, 3, 2, 1]),
        "axis": st.sampled_from([0, 1]),
        "group_size": st.sampled_from([8, 24]),
        "bias": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
    }
)
ADAPTERS = st.fixed_dictionaries(
    {
        "oft_block_size": st.sampled_from([2, 4, 6, 8]),
        "block_share": st.booleans(),
        "use_cayley_neumann": st.booleans(),
        "num_cayley_neumann_terms": st.sampled_from([1, 2, 4, 5]),
        "coft": st.booleans(),
        "eps": st.just(0.5),
        "module_dropout": st.sampled_from([0.0, 0.5]),
    }
)


class Layer(RuleBasedStateMachine):
    """The rules are the calls; `expected` is what the user is told they do."""

    @initialize(
        layer=LAYERS,
        adapters=st.tuples(ADAPTERS, ADAPTERS, ADAPTERS),
        keep=st.sampled_from(["device", "cpu"]),
        seed=st.integers(0, 99),
    )
    def make(self, layer, adapters, keep, seed):
        torch.manual_seed(seed)
        base = hqq_layer(OUT, IN, optimize=False, **layer)
        self.pristine, self.weight = packed_bytes(base), oracle.of_layer(base)
        self.layer = HqqOFTLinear(base, "a", r=0, **adapters[0])
        self.layer.keep_pristine = keep
        for name, adapter in zip("bc", adapters[1:], strict=True):
            self.layer.update_layer(name, 0, **adapter)
        self.adapters = {name: (adapter, self._randomize(name)) for name, adapter in zip("abc", adapters, strict=True)}
        self.active, self.merged, self.disabled = ["a"], [], False
        self.layer.eval()

    def _randomize(self, name):
        weight = self.layer.oft_R[name].weight
        nn.init.normal_(weight, std=0.1)
        return weight.detach().clone()

    # --- Calls ---

    @rule(name=NAMES, adapter=ADAPTERS, seed=st.integers(0, 99))
    def add_or_replace(self, name, adapter, seed):
        def call():
            torch.manual_seed(seed)
            self.layer.update_layer(name, 0, **adapter)

        if self._expect(call, ValueError if name in self.merged else None):
            self.adapters[name] = (adapter, self._randomize(name))

    @rule(name=NAMES, adapter=ADAPTERS)
    def add_with_a_setting_out_of_range(self, name, adapter):
        self._expect(lambda: self.layer.update_layer(name, 0, **{**adapter, "module_dropout": 1.5}), ValueError)

    @rule(name=NAMES)
    def delete(self, name):
        if name not in self.adapters:
            return
        if self._expect(lambda: self.layer.delete_adapter(name), ValueError if name in self.merged else None):
            del self.adapters[name]
            self.active = list(self.layer.active_adapters)  # which one takes over is PEFT's choice
            assert name not in self.active

    @rule(name=NAMES)
    def change_a_parameter(self, name):
        if name in self.adapters and name not in self.merged:
            with torch.no_grad():
                self.layer.oft_R[name].weight.mul_(0.5)
            self.adapters[name] = (self.adapters[name][0], self.layer.oft_R[name].weight.detach().clone())

    @rule(names=st.permutations(["a", "b", "c"]), count=st.integers(1, 3))
    def switch(self, names, count):
        names = [name for name in names[:count] if name in self.adapters]
        if names:
            self.layer.set_adapter(names)
            self.active = names

    @rule(names=st.none() | st.lists(NAMES, min_size=1, max_size=2, unique=True), safe=st.booleans())
    def merge(self, names, safe):
        self.layer.merge(safe_merge=safe, adapter_names=names)
        new = [n for n in (self.active if names is None else names) if n in self.adapters and n not in self.merged]
        if new:
            self.merged = self.merged + new
            if set(self.merged) <= set(self.active):
                self.merged = [name for name in self.active if name in self.merged]

    @precondition(lambda self: not self.merged)
    @rule(name=NAMES, value=st.sampled_from([float("nan"), float("inf")]))
    def safe_merge_of_a_broken_adapter(self, name, value):
        if name not in self.adapters or self.adapters[name][1].numel() == 0:
            return
        if self.adapters[name][0]["use_cayley_neumann"] and self.adapters[name][0]["num_cayley_neumann_terms"] == 1:
            return  # one term is the identity for every parameter
        weight = self.layer.oft_R[name].weight
        with torch.no_grad():
            weight[0, 0] = value
        sound, self.adapters[name] = self.adapters[name], (self.adapters[name][0], weight.detach().clone())
        self._expect(lambda: self.layer.merge(safe_merge=True, adapter_names=[name]), ValueError)
        with torch.no_grad():
            weight.copy_(sound[1])
        self.adapters[name] = sound

    @rule()
    def unmerge(self):
        self.layer.unmerge()
        self.merged = []

    @rule(enabled=st.booleans())
    def enable(self, enabled):
        self.layer.enable_adapters(enabled)
        self.disabled = not enabled

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def replace_by_a_copy(self, how):
        if how == "deepcopy":
            self.layer = copy.deepcopy(self.layer)
        elif how == "pickle":
            self.layer = pickle.loads(pickle.dumps(self.layer))
        else:
            buffer = io.BytesIO()
            torch.save(self.layer, buffer)
            buffer.seek(0)
            self.layer = torch.load(buffer, weights_only=False)

    @rule()
    def save_and_load_the_adapters(self):
        state = {key: value.clone() for key, value in self.layer.oft_R.state_dict().items()}
        with torch.no_grad():
            for parameter in self.layer.oft_R.parameters():
                parameter.add_(1)
        self.layer.oft_R.load_state_dict(state)

    @rule(seed=st.integers(0, 99))
    def train_a_step(self, seed):
        torch.manual_seed(seed)
        self.layer.train()
        trainable = [p for p in self.layer.oft_R.parameters() if p.requires_grad]
        if trainable:
            optimizer = torch.optim.SGD(trainable, lr=0.1)
            out = self.layer(X)
            if out.requires_grad:
                out.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        self.layer.eval()
        if self.disabled:
            self.merged = []  # a forward of a disabled layer takes the merged adapters out
        for name, (adapter, before) in self.adapters.items():
            now = self.layer.oft_R[name].weight.detach().clone()
            # In training an active adapter is what gradients reach, and constrained OFT projects.
            if name not in self.active or self.disabled or name in self.merged:
                assert torch.equal(now, before)
            self.adapters[name] = (adapter, now)

    @rule(names=st.lists(st.sampled_from(["a", "b", "c", "__base__"]), min_size=5, max_size=5))
    def a_mixed_batch(self, names):
        if self.disabled:
            return
        with torch.no_grad():
            if self._expect(lambda: self.layer(X, adapter_names=names), ValueError if self.merged else None):
                out = self.layer(X, adapter_names=names)
                for row, name in enumerate(names):
                    expected = self._rotated(X[row : row + 1], [name] if name in self.adapters else [])
                    self._near(out[row : row + 1], expected)

    # --- What must hold ---

    def _expect(self, call, error):
        """Whether `call` succeeds, which it must unless an `error` is expected, and then it changes nothing."""
        if error is None:
            call()
            return True
        before = self._observe()
        try:
            call()
        except error:
            assert self._observe() == before
            return False
        raise AssertionError(f"expected {error.__name__}")

    def _observe(self):
        layer = self.layer
        weights = {name: layer.oft_R[name].weight.detach().numpy().tobytes() for name in layer.oft_R}
        base = {key: value.double().numpy().tobytes() for key, value in packed_bytes(layer.get_base_layer()).items()}
        return weights, base, list(layer.active_adapters), list(layer.merged_adapters), layer.disable_adapters

    def _rotated(self, x, names):
        x = x.to(self.layer.get_base_layer().compute_dtype).double()
        for name in names:
            x = x @ self._rotation(name)
        return self._product(x)

    def _rotation(self, name):
        adapter, v = self.adapters[name]
        terms = adapter["num_cayley_neumann_terms"] if adapter["use_cayley_neumann"] else None
        max_norm = adapter["eps"] / v.shape[0] ** 0.5 if adapter["coft"] else None
        return oracle.rotation(v, adapter["oft_block_size"], IN, terms, max_norm)

    def _product(self, x):
        base = self.layer.get_base_layer()
        bias = 0 if base.bias is None else base.bias.detach().double()
        return x @ oracle.of_layer(base).T + bias

    def _near(self, out, expected):
        # In bfloat16 each of up to three rotations rounds the input once more.
        tolerance = 1e-5 if self.layer.get_base_layer().compute_dtype == torch.float32 else 2e-2
        assert relative_error(out, expected) <= tolerance

    @invariant()
    def the_state_is_the_expected_one(self):
        if not hasattr(self, "layer"):
            return
        layer = self.layer
        assert sorted(layer.oft_R) == sorted(self.adapters)
        for name, (_, v) in self.adapters.items():
            assert torch.equal(layer.oft_R[name].weight, v)
        assert list(layer.active_adapters) == self.active
        assert list(layer.merged_adapters) == self.merged
        assert layer.merged == bool(self.merged)
        assert layer.disable_adapters == self.disabled
        if not self.merged:
            assert same_bytes(layer.get_base_layer(), self.pristine)
            assert layer.merge_error is None
        else:
            # W' for which x W'^T = x R_1 R_2 W^T; how far the stored weight is from it is what the layer says.
            merged = self.weight
            for name in reversed(self.merged):
                merged = merged @ self._rotation(name).T
            error = relative_error(oracle.of_layer(layer.get_base_layer()), merged)
            assert abs(error - layer.merge_error) <= 1e-3 * max(1, error)
        self._the_output_is_the_expected_one()

    @torch.no_grad()
    def _the_output_is_the_expected_one(self):
        out = self.layer(X)
        if self.disabled:
            self.merged = []
            assert same_bytes(self.layer.get_base_layer(), self.pristine)
            self._near(out, self._product(X.to(self.layer.get_base_layer().compute_dtype).double()))
        elif self.merged:
            self._near(out, self._product(X.to(self.layer.get_base_layer().compute_dtype).double()))
        else:
            self._near(out, self._rotated(X, self.active))


def test_random_sequences_of_calls_give_the_expected_state():
    warnings.simplefilter("ignore")  # merging twice, unmerging nothing: each warns, and has tests of its own
    bounds = settings(
        max_examples=250,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Layer, settings=bounds)
