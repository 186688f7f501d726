"""HQQ in the `from_pretrained` of transformers 5, whose own integration cannot quantize and does not read HQQ layers.

transformers 5 loads a model through conversions: patterns of stored names, the parameter that they make, and operations
on their tensors. `_Quantize` turns a dense weight that was just read into an HQQ layer, `_Deserialize` the tensors of a
stored layer, and `_Dequantize` those of stored layers that this transformers fuses, such as the experts of MoE models.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, apply_renamings
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

from ..ops import table as ops
from ..quant import hqq_layer, quantizer
from ..quant.defaults import kept_by_default
from ..quant.experts import Experts, is_fused
from ..quant.linears import SAME_FUNCTION, expose, mark_origin
from ..quant.marks import mark_quantized, reads_weight
from ..quant.settings import QuantizationSettings
from .files import LoadedTensors
from .layer_format import FIELDS, StoredLayer

logger = logging.getLogger("hqq_oft")

_FIELDS = tuple(field for field in FIELDS if field != "bias")  # the bias is a parameter of its own, in any order


class _Operation(ConversionOps):
    def __init__(self, quantizer: HqqQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        return self  # conversions are copied for each parameter


class _Quantize(_Operation):
    """A dense weight becomes an HQQ layer in the model; other tensors are returned."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any) -> Any:
        rest = {}
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            dense = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(model, key):
                rest[key] = value
                continue
            settings = copy.deepcopy(self.quantizer.settings[name])
            weight = settings["weight_quant_params"]
            weight["group_size"] = weight["group_size"] or dense.shape[weight["axis"]]
            if dense.shape != model.get_submodule(name).weight.shape:
                raise ValueError(f"{key} has shape {tuple(dense.shape)}, which is not the model's.")
            state, _ = quantizer.quantize(dense, settings, dense.dtype, dense.device)
            self.quantizer.place(model, name, hqq_layer.make_layer(state, None, settings), missing_keys)
        return rest


class _Deserialize(_Operation):
    """The tensors of a stored HQQ layer become the layer, or a dense weight where the model has no linear layer."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> Any:
        name = full_layer_name.rpartition(".")[0]
        found = {key.removeprefix("\\.").removesuffix("$"): value[0] for key, value in input_dict.items()}
        if "W_q" not in found:  # parameters that happen to be called like a field
            return {
                full_layer_name if key == full_layer_name else f"{name}.{key}": value for key, value in found.items()
            }
        module = model.get_submodule(name)
        is_linear = isinstance(module, nn.Linear) and not reads_weight(model, name)
        layer = self.quantizer.stored(found, name, (module.out_features, module.in_features) if is_linear else None)
        if not is_linear:  # a linear layer in transformers 4, such as the routers of MoE models
            return {full_layer_name: self.quantizer.dense(layer)}
        self.quantizer.place(model, name, layer, missing_keys)
        return {}


class _Dequantize(_Operation):
    """Stored HQQ layers become dense weights, for the operations that fuse them."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any) -> Any:
        dense = {key: list(values) for key, values in input_dict.items() if key.endswith("weight")}
        for key in [key for key in input_dict if key.endswith("W_q")]:
            stem = key.removesuffix("W_q")
            columns = {field: input_dict[stem + field] for field in _FIELDS if stem + field in input_dict}
            layers = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            self.quantizer.made_dense.add(full_layer_name)
            dense[f"{stem}weight"] = [
                self.quantizer.dense(self.quantizer.stored(tensors, full_layer_name, None)) for tensors in layers
            ]
        return dense


def _stored_layers(files: Sequence[str]) -> set[str]:
    """Names of the HQQ layers in safetensors files."""
    names: set[str] = set()
    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                stored = list(opened.keys())
            names.update(name.removesuffix(".W_q") for name in stored if name.endswith(".W_q"))
    return names


class HqqQuantizer(HqqHfQuantizer):
    """What `from_pretrained` of transformers 5 calls for models with an `HqqConfig`.

    Attributes:
        settings: HQQ's `quant_config` of each layer to quantize, by name; empty for a stored HQQ model.
        dtype: that of the model, to which stored layers are cast; None for as they are.
        made_dense: parameters that stored HQQ layers were dequantized for.
        has_experts: whether HQQ layers of single experts are stored, under the names that `quantize_model` gives them.
    """

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.settings: dict[str, dict[str, Any]] = {}
        self.dtype: torch.dtype | None = None
        self.made_dense: set[str] = set()
        self.has_experts = False
        self._places: dict[str, list[str]] = {}
        self._own: dict[int, Any] = {}

    # --- Before the weights ------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError for a device map with a disk, or with the CPU beside other devices."""
        device_map = kwargs.get("device_map")
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            raise ValueError(f"HQQ layers can't be offloaded to the CPU or a disk; device_map is {device_map}.")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Note the dtype of the model."""
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
            layers = {apply_renamings(name, renamings) for name in _stored_layers(checkpoint_files or ())}
            expose(model, layers.__contains__)
            self.has_experts = any(isinstance(module, Experts) for module in model.modules())
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(id(module), []).append(name)
        self._places = {name: places for places in names.values() for name in places}
        if not self.pre_quantized:
            self._choose_layers(model)

    def _choose_layers(self, model: Any) -> None:
        config, skipped = self.quantization_config.quant_config, self.quantization_config.skip_modules or ()
        single = "weight_quant_params" in config  # otherwise dynamic_config: settings by the end of a layer's name
        kept = kept_by_default(
            model, {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        for name, linear in model.named_modules():
            if not isinstance(linear, nn.Linear):
                continue
            tag = None if single else next((tag for tag in config if f".{name}".endswith(f".{tag}")), None)
            settings = config if single else config.get(tag)
            if settings is None or any(pattern in name for pattern in skipped):
                continue  # excluded by the configuration
            weight = settings["weight_quant_params"]
            reason = "its weight is tied" if f"{name}.weight" in tied else kept.get(name)
            if type(linear) is not nn.Linear and type(linear).__name__ not in SAME_FUNCTION:
                reason = f"it is a {type(linear).__name__}, which may compute a different function"
            if reason is None:
                reason = QuantizationSettings(weight["nbits"], weight["group_size"], weight["axis"]).why_not(linear)
            if reason is None:
                self.settings[name] = {key: value for key, value in settings.items() if key != "offload_meta"}
                continue
            logger.warning("%s stays dense: %s", name, reason)
        if others := [name for name, module in model.named_modules() if type(module) is Conv1D or is_fused(module)]:
            logger.warning(
                "%s and %d more stay dense: from_pretrained quantizes nn.Linear only; hqq_oft.quantize_model quantizes "
                "Conv1D and experts too",
                others[0],
                len(others) - 1,
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of a dense model is a weight to quantize."""
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.settings

    # --- The weights -------------------------------------------------------------------------------------------------

    def get_quantize_ops(self) -> ConversionOps:
        """The operation on each weight to quantize."""
        return _Quantize(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed weights are not cast."""
        own = any(isinstance(operation, _Operation) for operation in getattr(converter, "operations", ()))
        return None if own else dtype

    def get_weight_conversions(self) -> list[Any]:
        """The conversion of stored HQQ layers."""
        if not self.pre_quantized:
            return []
        return [WeightConverter([rf"\.{field}$" for field in _FIELDS], ".weight", [_Deserialize(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Rename and dequantize stored HQQ layers where the model renames and fuses weights, and load all others."""
        own, updated = self.get_weight_conversions(), []
        self._own = {id(conversion): None for conversion in own}
        for entry in weight_conversions if own else ():
            sources, targets = entry._original_source_patterns, entry._original_target_patterns
            added = [entry]
            if self.has_experts and isinstance(entry, WeightConverter):
                continue  # it would fuse them
            if not all(source.endswith("weight") for source in sources):
                pass
            elif isinstance(entry, WeightConverter):
                names = [
                    f"{source.removesuffix('weight')}{field}" for source in sources for field in ("weight", *_FIELDS)
                ]
                added = [entry.copy(names, targets, operations=[_Dequantize(self), *entry.operations])]
                self._own[id(added[0])] = entry
            elif type(entry) is WeightRenaming and targets[0].endswith("weight"):
                stems = [pattern.removesuffix("weight") for pattern in (sources[0], targets[0])]
                added += [entry.copy(*(f"{stem}{field}" for stem in stems)) for field in _FIELDS]
                self._own.update((id(renaming), None) for renaming in added[1:])
            updated += added
        return [*updated, *own] if own else weight_conversions

    def stored(self, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int] | None) -> Any:
        """The HQQ layer of these tensors by field, without its bias, in the model's dtype.

        Raises:
            CheckpointError: they are not those of an HQQ layer of this shape.
        """
        source = LoadedTensors({f"{name}.{field}": tensor for field, tensor in tensors.items()}, "the checkpoint")
        device = tensors["W_q"].device
        return StoredLayer.read(source, name, shape).load(source, name, False, device, self.dtype)

    def dense(self, layer: Any) -> Tensor:
        """The dense weight of a stored layer, in the model's dtype."""
        return ops.dequantize(hqq_layer.PackedState.of(layer).weight(), self.dtype or layer.compute_dtype)

    def place(self, model: Any, name: str, layer: Any, missing_keys: set[str]) -> None:
        """Put an HQQ layer into the model in place of a linear layer, whose bias it takes, loaded or not."""
        linear = model.get_submodule(name)
        layer.bias = linear.bias
        layer.train(linear.training)
        layer._is_hf_initialized = True
        mark_origin(linear, layer)
        for place in self._places[name]:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            missing_keys.discard(f"{place}.weight")

    # --- After the weights -------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Saving reverses the conversions: it needs those without HQQ.
        conversions = getattr(model, "_weight_conversions", None) or []
        originals = [self._own.get(id(conversion), conversion) for conversion in conversions]
        model._weight_conversions = [conversion for conversion in originals if conversion is not None]
        layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
        for layer in layers:
            if layer.bias is not None:
                if not getattr(layer.bias, "_is_hf_initialized", False):
                    nn.init.zeros_(layer.bias)  # missing in the checkpoint, as transformers has reported
                layer.bias.requires_grad_(False)
        if self.made_dense:
            logger.warning("%d parameter(s) that transformers fuses were dequantized.", len(self.made_dense))
        if layers:
            mark_quantized(model)
        else:
            logger.warning("HqqConfig quantized no layer of the model.")
        return model
