"""`patch_transformers`: transformers' `from_pretrained` quantizes with `HqqConfig` and reads HQQ layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import packaging.version
import transformers
from transformers import HqqConfig
from transformers.quantizers import auto

from .._patching import Patch, PatchHandle

_METHOD = "hqq"


def _change(active: Patch) -> None:
    original = auto.AutoQuantizationConfig.from_dict.__func__

    def any_from_dict(cls: Any, quantization_config_dict: Mapping[str, Any]) -> Any:
        settings = dict(quantization_config_dict)
        if settings.get("method") == _METHOD:
            settings["quant_method"] = settings.pop("method")
        return original(cls, settings)

    read = HqqConfig.from_dict.__func__

    def hqq_from_dict(cls: Any, config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "quant_config" in config:
            return read(cls, {"skip_modules": ["lm_head"], **config}, *args, **kwargs)
        return cls(**{key: value for key, value in config.items() if key != "quant_method"})

    active.set(auto.AutoQuantizationConfig, "from_dict", classmethod(any_from_dict))
    active.set(HqqConfig, "from_dict", classmethod(hqq_from_dict))
    if packaging.version.parse(transformers.__version__).major >= 5:
        from .transformers5 import HqqQuantizer
    else:
        from .transformers4 import HqqQuantizer
    active.set_item(auto.AUTO_QUANTIZER_MAPPING, _METHOD, HqqQuantizer)


patch = Patch(_change)


def patch_transformers() -> PatchHandle:
    """Have transformers 5 quantize `nn.Linear` with `HqqConfig`, save and load HQQ layers again, as 4.57 does.

    Afterwards `from_pretrained(path, quantization_config=HqqConfig(...))` quantizes while it loads: each dense weight
    is read, quantized with this package's quantizer and freed before the next. `from_pretrained` of a directory that
    transformers or `save_quantized` wrote restores the layers bit for bit. `skip_modules` and `dynamic_config` are used
    as in 4.57. Layers stay dense, and are logged, if their weight is tied or read by the model itself, if the model
    keeps them in float32, or if the settings can't pack them. `Conv1D`, as in 4.57, and the experts that transformers 5
    stores as three-dimensional parameters stay dense too, and are logged; `quantize_model` quantizes both. If more than
    half of the bytes stay dense, a UserWarning names the largest. For a weight with NaN or infinity, transformers logs
    a report that names it and raises RuntimeError.

    In every version, `quantization_config` may also be a dict with `"quant_method": "hqq"` or `"method": "hqq"` and the
    arguments of `HqqConfig`. transformers 4 loads HQQ layers in place of `Conv1D` (of GPT-2) too, which it would
    initialize at random; nothing else changes in it. Idempotent. `patch_peft` includes it.

    Returns:
        A handle that can be used in a `with` statement.
    """
    return PatchHandle(patch)


def unpatch_transformers() -> None:
    """Remove the patch, even inside a `with` block; existing models keep their layers."""
    patch.remove()
