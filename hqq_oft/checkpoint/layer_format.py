"""One HQQ layer as named tensors, in the format of `HQQLinear.state_dict`, which transformers 4.57 also uses.

Settings are stored as tensors: numbers as scalars, names as ASCII bytes. HQQ decodes them with `eval`; here they are
compared with the accepted values. The weight's size is computed from them and validated before the weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hqq.core.quantize import HQQLinear, Quantizer
from torch import Tensor

from ..ops.packing import LEVELS_PER_ELEMENT, PACKING_BITS
from ..ops.weight import QuantizedWeight
from ..quant import hqq_layer
from .files import TensorSource

_DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
_MAX_SETTING = 64  # bytes; the longest setting, a dtype name, has 14


@dataclass(frozen=True)
class StoredLayer:
    """Settings of an HQQ layer as stored in a checkpoint.

    Attributes:
        shape: `(out_features, in_features)`.
        nbits: requested bits per weight: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: levels per scale; that of a whole row or column if `channel_wise` is False.
        axis: 0 or 1.
        packing: HQQ's name of the packing format.
        channel_wise: False if one scale is used for the whole weight.
        optimize, round_zero: quantizer options, used again when a merged weight is quantized.
        view_as_float: whether the packed bytes are viewed as the compute dtype.
        compute_dtype: dtype of the layer, its scale and its zero.
    """

    shape: tuple[int, int]
    nbits: float
    group_size: int
    axis: int
    packing: str
    channel_wise: bool
    optimize: bool
    round_zero: bool
    view_as_float: bool
    compute_dtype: torch.dtype

    @classmethod
    def read(
        cls, checkpoint: TensorSource, name: str, shape: tuple[int, int] | None = None, has_bias: bool = False
    ) -> StoredLayer:
        """Read the settings of the layer `name`; the weight itself is not read.

        Args:
            checkpoint: where the layer is stored.
            name: its name, which prefixes the names of its tensors.
            shape: `(out_features, in_features)` that the model has there, if it is known.
            has_bias: whether the layer's bias must be stored with it.

        Raises:
            CheckpointError: a setting is missing or invalid, or the dtype or shape of a tensor does not match the
                settings and `shape`.
        """

        def setting(field: str, decode: Callable[[Tensor], Any], accepted: Any = None) -> Any:
            key = f"{name}.{field}"
            tensor = checkpoint.read(key, _MAX_SETTING)
            value = decode(tensor)
            if value is None:
                raise checkpoint.error(key, f"{tensor.tolist()} is not a single number")
            if accepted is not None and value not in accepted:
                raise checkpoint.error(key, f"{value!r} is not one of {', '.join(map(str, accepted))}")
            return value

        for field in ("quant_scale", "quant_zero", "offload_meta"):
            if setting(field, _number, (0, 1)):
                raise checkpoint.error(f"{name}.{field}", "must be 0; HQQ's deprecated formats are not supported")
        found = tuple(setting("shape", lambda tensor: tensor.flatten().tolist()))
        if len(found) != 2 or min(found) < 1 or (shape is not None and found != shape):
            raise checkpoint.error(f"{name}.shape", f"{found}, but config.json has {shape or 'two sizes'}")
        packing = setting("packing", _text, PACKING_BITS)
        nbits = setting("nbits", _number, (8, 6, 5, 4, 3, 2, 1.58, 1))
        if nbits == 1 and packing == "2bit_u8":
            nbits = 1.58  # HQQ truncates nbits in its state dicts
        if Quantizer.bit_to_packing[nbits] != packing:
            raise checkpoint.error(f"{name}.packing", f"{packing} does not match {nbits} bits")
        stored = cls(
            shape=found,
            nbits=nbits,
            group_size=int(setting("group_size", _number)),
            axis=setting("axis", _number, (0, 1)),
            packing=packing,
            channel_wise=bool(setting("channel_wise", _number, (0, 1))),
            optimize=bool(setting("optimize", _number, (0, 1))),
            round_zero=bool(setting("round_zero", _number, (0, 1))),
            view_as_float=bool(setting("view_as_float", _number, (0, 1))),
            compute_dtype=_DTYPES[setting("compute_dtype", _text, _DTYPES)],
        )
        stored._check_tensors(checkpoint, name, has_bias)
        return stored

    def _check_tensors(self, checkpoint: TensorSource, name: str, has_bias: bool) -> None:
        numel = math.prod(self.shape)
        if not 0 < self.group_size <= numel or numel % self.group_size:
            raise checkpoint.error(f"{name}.group_size", f"{self.group_size} does not divide {numel} weights")
        group = self.group_size if self.channel_wise else self.shape[self.axis]
        groups = numel // group
        rows, columns = (groups, group) if self.axis == 1 else (group, groups)
        bits = PACKING_BITS[self.packing]
        storage = torch.int32 if bits == 3 else torch.uint8
        dtype = self.compute_dtype if self.view_as_float else storage
        packed = (-(-rows // LEVELS_PER_ELEMENT[bits]), columns * storage.itemsize // dtype.itemsize)
        checkpoint.expect(f"{name}.W_q", packed, (dtype,))
        per_group = ((groups, 1) if self.axis == 1 else (1, groups)) if self.channel_wise else ()
        for field in ("scale", "zero"):
            checkpoint.expect(f"{name}.{field}", per_group, tuple(_DTYPES.values()))
        if has_bias:
            checkpoint.expect(f"{name}.bias", (self.shape[0],), tuple(_DTYPES.values()))

    def load(
        self,
        checkpoint: TensorSource,
        name: str,
        has_bias: bool,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
    ) -> HQQLinear:
        """Load the layer onto `device`, by default in its stored compute dtype.

        Raises:
            CheckpointError: a tensor is damaged.
            ValueError: the packed weight can't be viewed as `compute_dtype`.
        """
        dtype = compute_dtype or self.compute_dtype
        packed = checkpoint.read(f"{name}.W_q")
        if packed.dtype != dtype and self.view_as_float:
            row = packed.shape[-1] * packed.element_size()
            if row % dtype.itemsize:
                raise ValueError(
                    f"{name}: its rows of {row} packed bytes, stored as {packed.dtype}, can't be viewed as {dtype}; "
                    "load it without compute_dtype."
                )
            packed = packed.view(dtype)
        parts = {}
        for field in ("scale", "zero"):
            parts[field] = checkpoint.read(f"{name}.{field}")
            if not parts[field].isfinite().all():
                raise checkpoint.error(f"{name}.{field}", "contains NaN or infinity")
            parts[field] = parts[field].to(compute_dtype)
        meta = {
            "nbits": self.nbits,
            "group_size": self.group_size,
            "shape": torch.Size(self.shape),
            "axis": self.axis,
            "packing": self.packing,
            "view_as_float": self.view_as_float,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[self.packing],
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
            **parts,
        }
        try:
            QuantizedWeight.from_parts(packed, meta)
        except ValueError as error:
            raise checkpoint.error(f"{name}.W_q", str(error).rstrip(".")) from error
        return hqq_layer.make_layer(
            hqq_layer.PackedState(packed, meta).to(device),
            bias=checkpoint.read(f"{name}.bias").to(device, compute_dtype) if has_bias else None,
            settings={
                "weight_quant_params": {
                    "nbits": self.nbits,
                    "channel_wise": self.channel_wise,
                    "group_size": self.group_size,
                    "optimize": self.optimize,
                    "round_zero": self.round_zero,
                    "axis": self.axis,
                    "view_as_float": self.view_as_float,
                },
                "scale_quant_params": None,
                "zero_quant_params": None,
            },
        )


FIELDS = (
    *("W_q", "scale", "zero", "bias"),
    *("shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "compute_dtype"),
    *("channel_wise", "optimize", "round_zero", "view_as_float"),
    *("quant_scale", "quant_zero", "offload_meta", "encoded_state_dict", "stores_quant_config"),
)
"""Every field name of a stored layer."""


def tensors_of(layer: HQQLinear) -> dict[str, Tensor]:
    """Tensors to store for `layer`, by field. Quantized or stacked scales and zeros are stored as plain tensors.

    Raises:
        ValueError: the layer is not initialized.
    """
    weight = QuantizedWeight.from_hqq(layer)
    settings, meta = hqq_layer.quantization_settings(layer)["weight_quant_params"], layer.meta
    plain = not (meta.get("quant_scale") or meta.get("quant_zero") or "zero_scale" in meta)
    per_group = (-1, 1) if weight.axis == 1 else (1, -1)
    tensors = {
        # An unpacked weight is stored in the 8-bit packing, one level per byte.
        "W_q": layer.W_q.detach() if meta["packing"] else weight.packed,
        "scale": meta["scale"] if plain else weight.scale.reshape(per_group),
        "zero": meta["zero"] if plain else weight.zero.reshape(per_group),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias.detach()
    packing = meta["packing"] or "8bit_u8"
    values: dict[str, Any] = {
        "shape": weight.shape,
        "nbits": settings["nbits"],
        "group_size": settings["group_size"] or weight.group_size,
        "axis": weight.axis,
        "packing": packing,
        "unpack_view_dtype": str(Quantizer.unpack_view_dtype[packing]),
        "compute_dtype": str(layer.compute_dtype),
        "channel_wise": settings.get("channel_wise", True),
        "optimize": settings.get("optimize", True),
        "round_zero": settings.get("round_zero", False),
        "view_as_float": bool(meta.get("view_as_float")),
        "quant_scale": False,
        "quant_zero": False,
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
    }
    return {**tensors, **{field: _encoded(value) for field, value in values.items()}}


def _encoded(value: Any) -> Tensor:
    if isinstance(value, str):
        return torch.tensor(list(value.encode("ascii")), dtype=torch.uint8)
    if isinstance(value, bool):
        return torch.tensor(value, dtype=torch.uint8)
    if isinstance(value, tuple):
        return torch.tensor(value, dtype=torch.int64)
    return torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else torch.int32)


def _number(tensor: Tensor) -> int | float | None:
    value = tensor.item() if tensor.numel() == 1 else math.nan
    if not math.isfinite(value):
        return None
    return round(value, 2) if value % 1 else int(value)  # 1.58 is not exactly representable in float32


def _text(tensor: Tensor) -> str:
    return bytes(tensor.to(torch.uint8).flatten().tolist()).decode("latin-1")
