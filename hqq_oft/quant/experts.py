"""A mixture of experts whose weights transformers 5 stores as three-dimensional parameters, with a layer per expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """The experts of a mixture as modules `0`, `1`, ..., each with two linear layers, with the function of `fused`.

    Linear layers can be quantized, adapted and stored one by one. Each expert is `down_proj(gate(gate_up_proj(x)))`, or
    with `up_proj` and an activation function if `fused` has no gate. The layers are views of the parameters of `fused`.

    Args:
        fused: a module of a class that `transformers.integrations.use_experts_implementation` decorates.

    Raises:
        ValueError: `why_not_split` has a reason against it.
    """

    # The attributes of `fused`, as its decorator sets them.
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Any
    post_expert_norm: Any
    fused_class: Any

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        if reason := why_not_split(fused):
            raise ValueError(f"{type(fused).__name__}: {reason}.")
        self.fused_class = type(fused)
        _move_attributes(fused, self)
        for index in range(self.num_experts):
            layers = {name: _layer(fused, name, index) for name in self.projections}
            self.add_module(str(index), nn.ModuleDict(layers))
        self.train(fused.training)

    @property
    def projections(self) -> tuple[str, str]:
        """Names of an expert's layers, in the order in which they are applied."""
        return projections(self)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of each token's experts, weighted.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: `[T, k]`, the experts of each token; other numbers than those of experts contribute nothing.
            top_k_weights: `[T, k]`, their weights.

        Returns:
            `[T, H]`, in the dtype of `hidden_states`.
        """
        tokens, choices = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen.clamp(max=self.num_experts), minlength=self.num_experts + 1).tolist()
        up, down = self.projections
        outputs, start = [hidden_states.new_empty(0, hidden_states.shape[-1])], 0
        for index, count in enumerate(counts[: self.num_experts]):
            if count == 0:
                continue
            expert: Any = self.get_submodule(str(index))
            x = expert[up](hidden_states[order[start : start + count] // choices])
            x = self.fused_class._apply_gate(self, x) if self.has_gate else self.act_fn(x)
            outputs.append(expert[down](x))
            start += count
        x = torch.cat(outputs)
        if self.has_post_expert_norm:
            x = self.post_expert_norm(x)
        x = x * top_k_weights.reshape(-1)[order[:start], None]
        # Summed over a token's experts in a fixed order, unlike with `index_add_` on a GPU.
        scattered = x.new_zeros(tokens * choices, x.shape[-1]).index_copy(0, order[:start], x)
        return scattered.view(tokens, choices, x.shape[-1]).sum(1).to(hidden_states.dtype)

    def fuse(self) -> nn.Module:
        """A module of the original class with the weights of these experts, all of whose layers must be `nn.Linear`."""
        fused = self.fused_class.__new__(self.fused_class)
        nn.Module.__init__(fused)
        experts: list[Any] = [self.get_submodule(str(index)) for index in range(self.num_experts)]
        _move_attributes(self, fused)
        for name in self.projections:
            layers = [expert[name] for expert in experts]
            weights = [layer.weight.T if self.is_transposed else layer.weight for layer in layers]
            setattr(fused, name, nn.Parameter(torch.stack(weights), layers[0].weight.requires_grad))
            if self.has_bias:
                biases = torch.stack([layer.bias for layer in layers])
                setattr(fused, f"{name}_bias", nn.Parameter(biases, layers[0].bias.requires_grad))
        return fused.train(self.training)


def projections(experts: Any) -> tuple[str, str]:
    """Names of the two weights of a module of experts."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds several experts in three-dimensional parameters."""
    return "expert" in type(module).__name__.lower() and any(
        parameter is not None and parameter.dim() == 3 and parameter.shape[0] > 1
        for parameter in module._parameters.values()
    )


def why_not_split(fused: Any) -> str | None:
    """Why `Experts` can't take the place of a module; None if it can."""
    # Set by the decorator, which also makes the class compute what these attributes say.
    marks = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
    if not all(hasattr(fused, mark) for mark in marks):
        return "its experts are fused and don't compute what transformers' shared implementation does"
    if fused._is_expert_parallel:
        return "its experts are distributed"
    names = set(projections(fused))
    names |= {f"{name}_bias" for name in names} if fused.has_bias else set()
    if set(fused._parameters) != names:
        return f"its experts have the parameters {sorted(fused._parameters)} instead of {sorted(names)}"
    return None


def _move_attributes(source: nn.Module, target: nn.Module) -> None:
    """Set everything of `source` on `target` but its parameters, its experts and its class."""
    own = {*vars(nn.Module()), "fused_class"}
    target.__dict__.update({name: value for name, value in vars(source).items() if name not in own})
    for name, module in source.named_children():
        if not name.isdecimal():
            target.add_module(name, module)
    for name, buffer in source._buffers.items():
        target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)


def _layer(fused: Any, name: str, index: int) -> nn.Linear:
    weight = getattr(fused, name)
    matrix = weight.data[index].T if fused.is_transposed else weight.data[index]
    bias = getattr(fused, f"{name}_bias").data[index] if fused.has_bias else None
    return linear_of(matrix, bias, weight.requires_grad).train(fused.training)


def linear_of(weight: Tensor, bias: Tensor | None, requires_grad: bool) -> nn.Linear:
    """A linear layer with these tensors, which it shares.

    Args:
        weight: `[N, K]`.
        bias: `[N]` or None.
        requires_grad: whether its parameters can be trained.
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad)
    return linear


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of experts with three-dimensional parameters, by each of its names."""
    return ((name, module) for name, module in model.named_modules(remove_duplicate=False) if is_fused(module))
