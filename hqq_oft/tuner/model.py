"""Tuners for models with this package's layers: unloading HQQ layers, atomic merging, mixed-adapter batches."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hqq.core.quantize import HQQLinear
from peft.tuners.mixed.model import MixedModel
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.oft.model import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm import tqdm

from ..quant.hqq_layer import forget_quantization, quantization_settings, take_over
from ..quant.linears import as_in_the_model, fuse_dense
from ..quant.marks import mark_quantized
from ..quant.solver import Solver, check_solver
from .fold import MergeInto, check_into
from .layer import HqqOFTLinear
from .merge import MergeableLayer

logger = logging.getLogger("hqq_oft")


class HqqOFTModel(OFTModel):
    """An `OFTModel` that can unload HQQ layers, merges all layers or none, and supports mixed-adapter batches.

    A model's tuner is changed to this class when its first `HqqOFTLinear` or `OFTLinear` is inserted.
    """

    _unloaded_errors: Mapping[str, float] = {}  # `adopt` changes the class of a tuner without running __init__

    def merge_errors(self) -> dict[str, float]:
        """Quantization or rounding error of each merged HQQ layer: name -> |W'_q - W'| / |W'|.

        After `merge_and_unload`, the errors of the layers that it merged and removed.
        """
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, HqqOFTLinear)]
        merged = {name: layer.merge_error for name, layer in layers if layer.merge_error is not None}
        return merged if layers else dict(self._unloaded_errors)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        replace_module(super()._replace_module, parent, child_name, new_module, child)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, solver: Solver = "hqq"
    ) -> None:
        """As in PEFT, but atomic: if one layer fails, the layers merged before it are restored.

        Args:
            adapter_names: the adapters to merge, by default the active ones.
            safe_merge: check for NaN and infinity.
            solver: of HQQ layers, as in `merge_and_unload`.
        """
        self._merge_all(tqdm_disable=None, safe_merge=safe_merge, adapter_names=adapter_names, solver=solver)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        into: MergeInto = None,
        solver: Solver = "hqq",
    ) -> nn.Module:
        """As in PEFT, but atomic: all layers or none. `hqq_oft.merge_report` measures the error of each choice.

        Args:
            progressbar: show a progress bar.
            safe_merge: check for NaN and infinity.
            adapter_names: the adapters to merge, by default the active ones.
            into: what the HQQ layers that adapters are merged into become: HQQ layers with their own settings (None) or
                with that many bits, or `"dense"` linear layers in their compute dtype, whose only error is rounding.
            solver: how HQQ layers are quantized again: `"hqq"` as HQQ does, `"search"` with a smaller error, as in
                `quantize_model`; a layer whose adapter does nothing is then reproduced exactly.

        Returns:
            The model without adapters.

        Raises:
            ValueError: `into` or `solver` is not one of these, a layer cannot be merged, or `"search"` does not serve
                its settings; the model is unchanged.
        """
        check_into(into)
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names, into=into, solver=solver
        )

    def _merge_all(
        self,
        tqdm_disable: bool | None,
        safe_merge: bool,
        adapter_names: list[str] | None,
        into: MergeInto = None,
        solver: Solver = "hqq",
    ) -> tuple[dict[str, float], dict[nn.Module, nn.Linear]]:
        """Merge every layer; with `into="dense"` each `HqqOFTLinear` is unchanged and its replacement is returned.

        Returns:
            The error of each `HqqOFTLinear` by name, and the dense replacements by layer.
        """
        errors: dict[str, float] = {}
        dense: dict[nn.Module, nn.Linear] = {}
        check_solver(solver)
        self._check_merge_allowed()
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)]
        with _merge_undone_on_error([layer for _, layer in layers]):
            # disable=None shows the bar only on a terminal
            progress, worst = tqdm(layers, disable=tqdm_disable, desc="Merging OFT layers", unit="layer"), 0.0
            for name, layer in progress:
                error = None
                with onload_layer(layer):
                    if not isinstance(layer, HqqOFTLinear):
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                    elif into != "dense":
                        layer.merge(safe_merge, adapter_names, into, solver)
                        error = layer.merge_error
                    elif (merged := layer.merged_linear(safe_merge, adapter_names)) is not None:
                        dense[layer], error = merged
                if error is not None:
                    errors[name] = error
                    logger.info("%s: quantizing the merged weight changed it by %.2e", name, error)
                    worst = max(worst, error, key=lambda error: (math.isnan(error), error))
                    progress.set_postfix(error=f"{error:.1e}", worst=f"{worst:.1e}")
        return errors, dense

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        into: MergeInto = None,
        solver: Solver = "hqq",
    ) -> nn.Module:
        unload = functools.partial(
            super()._unload_and_optionally_merge, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if not merge:
            return unload(merge=False, progressbar=progressbar)
        # First merge every layer, then let PEFT replace them; it finds them already merged.
        places = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent._modules.items()
            if isinstance(child, BaseTunerLayer)
        ]
        with _merge_undone_on_error([child for _, _, child in places]):
            try:
                errors, dense = self._merge_all(not progressbar, safe_merge, adapter_names, into, solver)
                for parent, name, child in places:
                    if child in dense:
                        setattr(parent, name, as_in_the_model(child.get_base_layer(), dense[child]))
                with warnings.catch_warnings():
                    warnings.filterwarnings(
                        "ignore", message="All adapters are already merged|Already following adapters"
                    )
                    model = super()._unload_and_optionally_merge(safe_merge=safe_merge, adapter_names=adapter_names)
                self._unloaded_errors = errors
                if into is not None and into != "dense":
                    for _, _, child in places:
                        if isinstance(child, HqqOFTLinear) and child.merged:
                            base = child.get_base_layer()
                            base.quant_config = quantization_settings(base, into)
                if dense:
                    fuse_dense(model)
                if into is not None and errors:
                    mark_quantized(model)
                    forget_quantization(model)
                return model
            except BaseException:
                for parent, name, child in places:
                    setattr(parent, name, child)
                raise

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` of one forward or `generate` to every layer, with the checks of PEFT's LoRA.

        As in PEFT, the number of beams is read from the keyword `num_beams`, not from a `generation_config`.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        handles: list[Any] = []
        try:
            for module, names in self._modules_with_adapter_names(adapter_names, kwargs.get("num_beams")):
                hook = functools.partial(_add_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _modules_with_adapter_names(self, adapter_names: Any, beams: Any) -> list[tuple[nn.Module, list[str]]]:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        layers = [module for module in self.modules() if isinstance(module, OFTLayer)]
        foreign = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, MergeableLayer)})
        if foreign:
            raise ValueError(
                "`adapter_names` requires every OFT layer to be an HqqOFTLinear or an OFTLinear, but some of the model "
                f"are PEFT's own ({', '.join(foreign)}), which ignore it. Call `convert(model)`; target no "
                "convolutions or embeddings."
            )
        unexpected = set(adapter_names) - {name for layer in layers for name in layer.oft_R} - {"__base__"}
        if unexpected:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")
        # Beam search repeats each sample, but only for the decoder; an encoder gets the original samples.
        repeated = [name for name in adapter_names for _ in range(beams if isinstance(beams, int) else 1)]
        in_encoder: set[nn.Module] = set()
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            in_encoder = set(self.model.get_encoder().modules())
        return [
            (module, list(adapter_names) if module in in_encoder else repeated)
            for module in self.modules()
            if isinstance(module, (MergeableLayer, AuxiliaryTrainingWrapper))
        ]


def _add_adapter_names(module: nn.Module, args: Any, kwargs: Any, *, adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


@contextmanager
def _merge_undone_on_error(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """Restore the weights and the lists of merged adapters of all layers if the block raises.

    PEFT's own layers merge into their weight in place, so a copy of it is kept inside the block.
    """
    ours = [(layer, layer.merge_state()) for layer in layers if isinstance(layer, MergeableLayer)]
    others = [
        (layer, weight, weight.detach().clone(), list(layer.merged_adapters))
        for layer in layers
        if not isinstance(layer, MergeableLayer)
        and isinstance(weight := getattr(layer.get_base_layer(), "weight", None), nn.Parameter)
    ]
    try:
        yield
    except BaseException:
        for layer, state in ours:
            layer.restore_merge_state(state)
        for layer, weight, before, merged in others:
            weight.data = before
            layer.get_base_layer().weight = weight  # PEFT may have replaced the parameter
            layer.merged_adapters[:] = merged
        raise


class HqqMixedModel(MixedModel):
    """The tuner of a `PeftMixedModel` that can unload HQQ layers."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        replace_module(super()._replace_module, parent, child_name, new_module, child)


_OUR_TUNERS: dict[type[nn.Module], type[nn.Module]] = {OFTModel: HqqOFTModel, MixedModel: HqqMixedModel}
_PEFT_TUNERS = {ours: theirs for theirs, ours in _OUR_TUNERS.items()}


def adopt(tuner: nn.Module) -> None:
    """Change a PEFT tuner to this package's subclass, in place, and take over the HQQ layers without adapters too."""
    if type(tuner) in _OUR_TUNERS:
        tuner.__class__ = _OUR_TUNERS[type(tuner)]
        for module in tuner.modules():
            if isinstance(module, HQQLinear):
                take_over(module)


def match_tuners(model: nn.Module) -> None:
    """Change each tuner in `model` to this package's class if it contains one of its layers, else to PEFT's."""
    for tuner in [module for module in model.modules() if type(module) in {*_OUR_TUNERS, *_PEFT_TUNERS}]:
        if any(isinstance(module, MergeableLayer) for module in tuner.modules()):
            adopt(tuner)
        else:
            tuner.__class__ = _PEFT_TUNERS.get(type(tuner), type(tuner))


def replace_module(
    original: Callable[..., None], parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
) -> None:
    """PEFT's `_replace_module`, except that a layer that was wrapped is put back as it is.

    PEFT would copy its `.weight`, which HQQ's and other packed layers do not have.

    Args:
        original: PEFT's `_replace_module`.
        parent, child_name, new_module, child: its arguments.
    """
    if isinstance(child, BaseTunerLayer) and new_module is child.get_base_layer():
        setattr(parent, child_name, new_module)
    else:
        original(parent, child_name, new_module, child)
