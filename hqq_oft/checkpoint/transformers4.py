"""`HqqQuantizer` lets `from_pretrained` of transformers 4 load HQQ layers in place of `Conv1D`."""

from __future__ import annotations

from typing import Any

from hqq.core.quantize import HQQLinear
from torch import nn
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

from ..quant.linears import expose, mark_origin


class HqqQuantizer(HqqHfQuantizer):
    """What `from_pretrained` calls for models with an `HqqConfig`.

    transformers 4 loads HQQ layers only where the model has an `nn.Linear`, and initializes other weights at random.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._exposed: dict[str, nn.Module] = {}

    def update_expected_keys(self, model: Any, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        """As in transformers, after each `Conv1D` that is stored as an HQQ layer has become a linear layer."""
        if self.pre_quantized:
            before = set(model.modules())
            expose(model, {key.removesuffix(".W_q") for key in loaded_keys if key.endswith(".W_q")}.__contains__)
            # transformers calls this more than once.
            if new := {name: module for name, module in model.named_modules() if module not in before}:
                self._exposed |= new
                expected_keys = list(model.state_dict())
        return super().update_expected_keys(model, expected_keys, loaded_keys)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, linear in self._exposed.items():
            if isinstance(layer := model.get_submodule(name), HQQLinear):
                mark_origin(linear, layer)
        self._exposed = {}
        return super()._process_model_after_weight_loading(model, **kwargs)
