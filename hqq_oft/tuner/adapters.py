"""The adapters of a layer: adding and deleting them."""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING, Any, get_args

import torch
from peft.tuners.oft.layer import MultiplicativeDropoutLayer, OFTLayer, OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._config import KeepPristine, keep_pristine_from_environment
from .rotation_cache import RotationCache
from .settings import AdapterSettings
from .snapshot import MergeState


class AdaptedLayer(nn.Module, OFTLayer):
    """The part of this package's layers that has adapters; `HqqOFTLinear` documents the arguments.

    Subclasses check the base layer, and say where its weight is and in which dtype it computes.
    """

    fan_in_fan_out = False

    if TYPE_CHECKING:  # what PEFT's layer has
        _modules: Any

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 8,
        oft_block_size: int = 0,
        module_dropout: float = 0.0,
        init_weights: bool = True,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        use_cayley_neumann: bool = False,
        num_cayley_neumann_terms: int = 5,
        *,
        config: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._check_base_layer(base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer)
        config = config if config is not None else kwargs.pop("oft_config", None)
        OFTLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self._take_base_layer()
        self.update_layer(
            adapter_name,
            r,
            config,
            oft_block_size=oft_block_size,
            module_dropout=module_dropout,
            init_weights=init_weights,
            coft=coft,
            eps=eps,
            block_share=block_share,
            use_cayley_neumann=use_cayley_neumann,
            num_cayley_neumann_terms=num_cayley_neumann_terms,
        )

    # --- Of each class -----------------------------------------------------------------------------------------------

    @staticmethod
    def _check_base_layer(base: nn.Module) -> None:
        """Raise if `base` is not a layer that the class wraps."""
        raise NotImplementedError

    @property
    def _device(self) -> torch.device:
        """Where the base layer's weight is."""
        raise NotImplementedError

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        """The dtype in which the base layer computes, if it is known before a forward."""
        raise NotImplementedError

    # --- State -------------------------------------------------------------------------------------------------------

    def _take_base_layer(self) -> None:
        """Initialize missing per-layer state."""
        state = vars(self)
        if "_keep_pristine" not in state:
            self.keep_pristine = keep_pristine_from_environment()
        self._merge: MergeState = state.get("_merge", MergeState())
        self._rotations: RotationCache = state.get("_rotations", RotationCache())
        self._lock = threading.RLock()

    def _release_base_layer(self) -> None:
        """Undo `_take_base_layer`, or the part of it that succeeded, before the layer becomes PEFT's own."""
        for name in ("_merge", "_lock", "_rotations"):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return "oft." + super().__repr__()

    @property
    def keep_pristine(self) -> KeepPristine:
        """Where a merge keeps the weight it replaces: `"device"`, `"cpu"` or `"none"`."""
        return self._keep_pristine

    @keep_pristine.setter
    def keep_pristine(self, where: KeepPristine) -> None:
        if where not in get_args(KeepPristine):
            raise ValueError(f"keep_pristine must be one of {get_args(KeepPristine)}, got {where!r}.")
        self._keep_pristine = where

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters, in the order in which their rotations are applied."""
        return list(self._merge.adapters)

    @merged_adapters.setter
    def merged_adapters(self, names: list[str]) -> None:
        self._merge = MergeState(tuple(names))  # of PEFT's constructor: none

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self._merge.adapters)

    def update_layer(
        self, adapter_name: str, r: int = 8, config: Any = None, inference_mode: bool = False, **settings: Any
    ) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its name.
            r: number of blocks; with `oft_block_size` give 0.
            config: a `peft.OFTConfig`; if given, it overrides all settings.
            inference_mode: freeze the parameter.
            **settings: the other settings of the class, by name.

        Raises:
            TypeError: `config` is not an `OFTConfig`, or a setting is unknown.
            ValueError: a setting is out of range, or the adapter of that name is merged; the layer is unchanged.
        """
        config = config if config is not None else settings.pop("oft_config", None)
        chosen = AdapterSettings(r=r, **settings) if config is None else AdapterSettings.from_config(config)
        with self._lock:
            if adapter_name in self.merged_adapters:
                raise ValueError(f"Cannot replace the adapter {adapter_name!r} while it is merged. Unmerge it first.")
            r, block_size = chosen.blocks(self.in_features, self.adjust_oft_parameters)
            self._rotations.drop(adapter_name)
            dropout = MultiplicativeDropoutLayer(p=chosen.module_dropout) if chosen.module_dropout else nn.Identity()
            stored, elements = 1 if chosen.block_share else r, block_size * (block_size - 1) // 2
            names = ("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
            options = {name: getattr(chosen, name) for name in names}
            module = OFTRotationModule(stored, elements, block_size, self.in_features, **options)
            nn.init.zeros_(module.weight) if chosen.init_weights else nn.init.normal_(module.weight, std=0.1)
            self._move_to_base_layer(module)
            # complete, as a forward in another thread may find it at once
            self.oft_dropout[adapter_name], self.oft_R[adapter_name] = dropout, module
            self.r[adapter_name], self.oft_block_size[adapter_name] = r, block_size
            self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT looks for `weight` or `qweight`, which an HQQ layer does not have, and moves nothing then.
        self._move_to_base_layer(self.oft_R[adapter_name], device)

    def _move_to_base_layer(self, module: OFTRotationModule, device: torch.device | None = None) -> None:
        device = device or self._device
        if module.weight.device.type != "meta" and torch.device(device).type != "meta":
            module.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active another becomes so, as in PEFT.

        Raises:
            ValueError: the adapter is merged.
        """
        with self._lock:
            if adapter_name in self.merged_adapters:
                raise ValueError(
                    f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Unmerge them first."
                )
            self._rotations.drop(adapter_name)
            left = [name for name in self._all_available_adapter_names() if name != adapter_name]
            active = [name for name in self.active_adapters if name != adapter_name]
            if adapter_name in self.active_adapters and left:  # before it goes: a forward meanwhile has an adapter
                if not active:
                    warnings.warn(
                        f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                        stacklevel=2,
                    )
                self.set_adapter(active or left[0])
            super().delete_adapter(adapter_name)
