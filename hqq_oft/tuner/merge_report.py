"""`merge_report`: per layer, the error that merging causes, the effect of the adapter, and the alternatives."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..ops import table as ops
from ..ops.weight import QuantizedWeight
from ..quant import quantizer
from ..quant.hqq_layer import PackedState, quantization_settings
from ..quant.solver import Solver, check_solver
from . import fold
from .fold import MergeInto, check_into
from .layer import HqqOFTLinear


@dataclass(frozen=True)
class Effect:
    """The relative difference of a layer to the adapted layer, with `W'` the adapted weight and `x` the layer's input.

    Attributes:
        weight: |W - W'| / |W'| in the Frobenius norm.
        output: |x (W - W')^T| / |x W'^T|; None without a sample, or if the sample did not reach the layer.
    """

    weight: float
    output: float | None

    def exceeds(self, other: Effect) -> bool:
        """Whether this is the larger change, of the output if measured, else of the weight; NaN counts as larger."""
        mine, others = (self.output, other.output) if self.output is not None else (self.weight, other.weight)
        return not mine <= others  # type: ignore[operator]


@dataclass(frozen=True)
class LayerReport:
    """Measurements of one layer.

    Attributes:
        bits: number of bits of the layer.
        adapter: effect of the adapter: the difference of the layer without it.
        merged: error of merging the layer, for each choice of `into`.
        surviving: share of the adapter's change of the weight that the merged weight W_m contains, for each choice:
            <W_m - W, W' - W> / |W' - W|^2 with the adapted weight W' and the layer's own W; 1 if W' is W.
        bytes: size of weight, scale and zero for each choice; the unmerged layer has the size of None.
    """

    bits: float
    adapter: Effect
    merged: dict[MergeInto, Effect]
    surviving: dict[MergeInto, float]
    bytes: dict[MergeInto, int]

    @property
    def loses_more_than_the_adapter_adds(self) -> bool:
        """Whether merging with the layer's own settings has a larger effect than the adapter."""
        return self.merged[None].exceeds(self.adapter)


@dataclass
class MergeReport:
    """The result of `merge_report`; `str` formats it as a table.

    Attributes:
        layers: the measurements by layer name.
    """

    layers: dict[str, LayerReport] = field(default_factory=dict)

    @property
    def losing(self) -> list[str]:
        """Names of the layers where merging with their own settings loses more than the adapter adds."""
        return [name for name, layer in self.layers.items() if layer.loses_more_than_the_adapter_adds]

    @property
    def erased(self) -> list[str]:
        """Names of the layers where less than half of the adapter's change survives a merge with their own settings."""
        return [name for name, layer in self.layers.items() if not layer.surviving[None] >= 0.5]

    def worst(self, into: MergeInto) -> float:
        """Largest weight error of all layers when merged with `into`."""
        return max(layer.merged[into].weight for layer in self.layers.values())

    def least_surviving(self, into: MergeInto) -> float:
        """Smallest share of the adapter's change that survives in any layer when merged with `into`."""
        return min(layer.surviving[into] for layer in self.layers.values())

    def total_bytes(self, into: MergeInto) -> int:
        """Total size of the weights when merged with `into`; the unmerged model has the size of None."""
        return sum(layer.bytes[into] for layer in self.layers.values())

    def alternatives(self) -> str:
        """The choices as a table: the worst weight error, the least surviving share and the total size."""
        choices = list(next(iter(self.layers.values())).merged)
        rows = [("keep it unmerged", 0.0, 1.0, self.total_bytes(None))]
        rows += [
            (_call(into), self.worst(into), self.least_surviving(into), self.total_bytes(into)) for into in choices
        ]
        width = max(len(label) for label, *_ in rows)
        return "\n".join(
            f"  {label:{width}}  worst weight error {error:8.2%}  surviving at least {share:7.1%}"
            f"  {tqdm.format_sizeof(size, 'B'):>8}"
            for label, error, share, size in rows
        )

    def __str__(self) -> str:
        width = max(len(name) for name in self.layers)
        lines = [f"{'layer':{width}}  bits  weight: adapter   merge  output: adapter   merge  surviving"]
        for name, layer in self.layers.items():
            adapter, merged = layer.adapter, layer.merged[None]
            mark = "  loses more than it adds" if layer.loses_more_than_the_adapter_adds else ""
            lines.append(
                f"{name:{width}}  {layer.bits:4}  {adapter.weight:15.2%} {merged.weight:7.2%}  "
                f"{_percent(adapter.output):>15} {_percent(merged.output):>7}  {layer.surviving[None]:9.1%}{mark}"
            )
        return "\n".join([*lines, "", "choices:", self.alternatives()])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _call(into: MergeInto) -> str:
    return "merge_and_unload()" if into is None else f"merge_and_unload(into={into!r})"


def merge_report(
    model: nn.Module,
    sample: Any = None,
    *,
    adapter_names: list[str] | None = None,
    alternatives: Sequence[float | str] = (8, "dense"),
    solver: Solver = "hqq",
) -> MergeReport:
    """Measure the error of merging each `HqqOFTLinear` of a model; the model is unchanged.

    Merging requantizes the rotated weight. If that changes a layer more than its adapter does, which is usual at
    2 bits, the merged model may be worse than the one without the adapter. A change that is small against the steps of
    the levels is rounded away: of such an adapter only a small share survives. Both raise a warning.

    Takes the time of one merge per choice, and the memory of one layer.

    Args:
        model: a model with `HqqOFTLinear` layers, none of them merged.
        sample: an input for the model: a tensor, a tuple of positional or a mapping of keyword arguments. If given, the
            layers' outputs are compared too, on the input of each layer's first call.
        adapter_names: the adapters to merge, by default each layer's active ones.
        alternatives: values of `merge_and_unload`'s `into` to measure in addition to the layers' own settings.
        solver: as for `merge_and_unload`.

    Returns:
        The measurements.

    Raises:
        ValueError: the model has no `HqqOFTLinear`; an alternative is not a valid `into`; `solver` is unknown, or
            does not serve a layer's settings; a layer is already merged or cannot be merged; no layer has an adapter to
            merge.
    """
    check_solver(solver)
    choices: list[MergeInto] = [None]
    for into in alternatives:
        check_into(into)  # type: ignore[arg-type]
        choices.append(into)  # type: ignore[arg-type]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HqqOFTLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no HqqOFTLinear to merge.")
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{merged[0]} is merged: unmerge first; model.merge_errors() returns its error.")

    report = MergeReport()
    measure = functools.partial(_measure, adapter_names=adapter_names, choices=choices, solver=solver)
    found = {} if sample is None else _measure_in_forward(model, layers, sample, measure)
    for name in layers.keys() - found.keys():
        found[name] = measure(layers[name], None)
    report.layers = {name: measured for name in layers if (measured := found[name]) is not None}
    if not report.layers:
        raise ValueError("no layer has an active adapter to merge.")
    found_in = {
        "Merging loses more than the adapter adds": report.losing,
        "Less than half of the adapter's change survives a merge": report.erased,
    }
    said = [f"{what} in {len(names)} of {len(report.layers)} layers." for what, names in found_in.items() if names]
    if said:
        warnings.warn(f"{' '.join(said)} The choices:\n{report.alternatives()}", stacklevel=2)
    return report


@torch.no_grad()
def _measure(
    layer: HqqOFTLinear,
    x: Tensor | None,
    adapter_names: list[str] | None,
    choices: list[MergeInto],
    solver: Solver,
) -> LayerReport | None:
    order = layer._adapters_after_merge(adapter_names)
    if not order:
        return None
    base = layer.get_base_layer()
    pristine = QuantizedWeight.from_hqq(base)
    exact = layer._rotated_weight(order, check=False)
    rows = None if x is None else x.reshape(-1, x.shape[-1]).to(exact)
    output = None if rows is None else rows @ exact.T

    def effect(weight: Tensor, error: float | None = None) -> Effect:
        error = fold.relative_distance(weight, exact) if error is None else error
        if rows is None or output is None:
            return Effect(error, None)
        return Effect(error, fold.relative_distance(rows @ weight.to(exact).T, output))

    before = ops.dequantize(pristine, exact.dtype)
    change = (exact - before).flatten()
    whole = change @ change

    def surviving(weight: Tensor) -> float:
        return 1.0 if whole == 0 else float(change @ (weight.to(exact) - before).flatten() / whole)

    merged: dict[MergeInto, Effect] = {}
    share: dict[MergeInto, float] = {}
    size: dict[MergeInto, int] = {}
    for into in choices:
        error = None
        if into == "dense":
            stored = exact.to(base.compute_dtype)
            size[into] = stored.nbytes
        else:
            state, error = quantizer.requantize(base, exact, into, solver)
            stored, size[into] = ops.dequantize(state.weight(), exact.dtype), _bytes(state)
        merged[into], share[into] = effect(stored, error), surviving(stored)
    bits = quantization_settings(base)["weight_quant_params"]["nbits"]
    return LayerReport(bits, effect(before), merged, share, size)


def _bytes(state: PackedState) -> int:
    tensors = [state.packed, *(value for value in state.meta.values() if isinstance(value, Tensor))]
    return sum(tensor.nbytes for tensor in tensors)


@torch.no_grad()
def _measure_in_forward(
    model: nn.Module,
    layers: dict[str, HqqOFTLinear],
    sample: Any,
    measure: Callable[[HqqOFTLinear, Tensor], LayerReport | None],
) -> dict[str, LayerReport | None]:
    """Run the sample and measure each layer in a pre-forward hook, so that only one layer's input is held at a time."""
    found: dict[str, LayerReport | None] = {}

    def once(name: str, layer: HqqOFTLinear, args: tuple[Any, ...]) -> None:
        if name not in found:
            found[name] = measure(layer, args[0])

    handles = [
        layer.register_forward_pre_hook(lambda module, args, name=name: once(name, module, args))
        for name, layer in layers.items()
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        if isinstance(sample, Mapping):
            model(**sample)
        elif isinstance(sample, tuple):
            model(*sample)
        else:
            model(sample)
    finally:
        for module, mode in training.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    return found
