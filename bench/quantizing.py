"""Kinds of cases that quantize: one weight, and the whole job of a model, against HQQ's quantizer and PEFT's merge.

Those take seconds: they are called once, and of a model's layers one of each shape, whose time is multiplied.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import hqq_oft
from hqq_oft.check.cases import DTYPES
from hqq_oft.quant import hqq_layer, quantizer

from . import contenders, llama, model
from .cases import MAIN, Job, Shape, kind
from .contenders import HQQ, OURS, PEFT
from .problem import Problem, Setting
from .timing import called, once


def _by_hqq(dense: Tensor, setting: Setting) -> HQQLinear:
    settings = BaseQuantizeConfig(nbits=setting.bits, group_size=setting.group, axis=setting.axis)
    del settings["offload_meta"]
    layer = HQQLinear(None, None, compute_dtype=DTYPES[setting.dtype], device=str(dense.device))
    layer.quantize(dense, **settings)
    return layer


@kind("merge", "quantize {shape} {setting.label} from {source}, sd {deviation}", "quantize")
def quantize(session: Any, shape: Shape, setting: Setting, source: str, deviation: float) -> Iterator[Job]:
    """A dense weight to packed levels; `different`: the share of stored elements that are not HQQ's."""
    dense = (deviation * torch.randn(*shape, device=session.device)).to(DTYPES[source])
    theirs = []
    columns = once(lambda: theirs.append(_by_hqq(dense, setting)), session.device)
    settings = hqq_layer.quantization_settings(theirs[0])
    ours = partial(quantizer.quantize, dense, settings, DTYPES[setting.dtype], session.device)
    state, error = ours()
    moved = model.Cost(dense.nbytes + setting.layer(*shape).weight_bytes, 0)
    different = float((state.packed != theirs[0].W_q).float().mean())
    yield Job(OURS, "quantize", called(ours), (moved,), columns={"error": error, "different": different})
    yield Job(HQQ, "quantize", columns=columns)


@kind("merge", "the whole job of {what}", "cayley dequantize_rotate quantize")
def whole_job(session: Any, what: str, config: LlamaConfig | None) -> Iterator[Job]:
    """Quantize a model, adapt its decoder's linear layers, merge, unmerge, save and load, each once."""
    place = session.device
    dense = llama.load_smollm2(30) if config is None else LlamaForCausalLM(config).to(llama.DTYPE)
    dense = dense.requires_grad_(False).to(place)
    shapes = Counter((m.out_features, m.in_features) for m in dense.model.layers.modules() if hasattr(m, "in_features"))
    yield Job(OURS, "quantize", columns=once(lambda: hqq_oft.quantize_model(dense, progress=False), place))
    adapted = contenders.adapted(dense, OURS, MAIN, place, llama.TARGETS)
    yield Job(OURS, "merge", columns=once(adapted.merge_adapter, place))
    yield Job(OURS, "unmerge", columns=once(adapted.unmerge_adapter, place))
    base = adapted.unload()
    with tempfile.TemporaryDirectory() as folder:
        yield Job(OURS, "save", columns=once(lambda: hqq_oft.save_quantized(base, folder, overwrite=True), place))
        yield Job(OURS, "load", columns=once(lambda: hqq_oft.load_quantized(folder, device=place), place))
    total = {"quantize": 0.0, "merge": 0.0}
    for (n, k), count in shapes.items():
        problem = Problem(n, k, MAIN, place)
        peft, weight = contenders.build(PEFT, problem).layers[0], problem.dense  # made before it is timed
        total["quantize"] += count * once(partial(_by_hqq, weight, MAIN), place)["p50_us"]
        total["merge"] += count * once(peft.merge, place)["p50_us"]
    for name, phase in ((HQQ, "quantize"), (PEFT, "merge")):
        columns = {"status": "measured", "mode": "eager", "repeats": 1, "p50_us": total[phase]}
        yield Job(name, phase, columns=columns | {"note": "one layer of each shape, its time multiplied"})
