"""Load what `train.py` wrote, serve both adapters, merge one, save and load again: `serve.py FOLDER --out NAME`.

What it finds goes to FOLDER/NAME/served.json.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import ADAPTERS, folders, held_out_loss, logits, samples
from peft import PeftModel
from torch import Tensor

import hqq_oft

NEW_TOKENS = 12


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def load(out: Path) -> Any:
    base = hqq_oft.load_quantized(out / "base", device="cpu", progress=False)
    first, *others = ADAPTERS
    model = PeftModel.from_pretrained(base, out / first, adapter_name=first)
    for name in others:
        model.load_adapter(out / name, adapter_name=name)
    return model.eval()


def generated(model: Any, prompts: Tensor, **options: Any) -> list[list[int]]:
    out = model.generate(
        input_ids=prompts, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return out[:, prompts.shape[1] :].tolist()


def main() -> None:
    folder, out = folders(__doc__)
    hqq_oft.patch_peft()
    model = load(out)
    held_out = {name: samples(folder, name)[1] for name in ADAPTERS}
    facts: dict[str, Any] = {"adapted": {}, "logits": {}}
    for name, tokens in held_out.items():
        model.set_adapter(name)
        facts["adapted"][name] = held_out_loss(model, tokens)
        facts["logits"][name] = logits(model, tokens).tolist()

    prompt = held_out["prose"][:1, :16]
    names = ["prose", "code", "__base__"]
    prompts = prompt.repeat(len(names), 1)
    facts["together"] = generated(model, prompts, adapter_names=names)
    together, facts["one by one"], facts["off"] = logits(model, prompts, adapter_names=names), [], {}
    for name in names:
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            facts["one by one"] += generated(model, prompt)
            facts["off"][name] = [difference(other, logits(model, prompt)[0]) for other in together]

    model.set_adapter("prose")
    report = hqq_oft.merge_report(model)
    facts["report"] = {str(into): report.worst(into) for into in (None, 8, "dense")}
    tokens, facts["merged"] = held_out["prose"], {}
    served = logits(model, tokens)
    for into in (None, 8, "dense"):
        again = load(out)
        again.set_adapter("prose")
        merged = again.merge_and_unload(safe_merge=True, into=into)
        found = logits(merged, tokens)
        facts["merged"][str(into)] = {
            "loss": held_out_loss(merged, tokens),
            "logits off the adapter's": difference(found, served),
            "classes": sorted(
                {type(module).__name__ for module in merged.modules() if "Linear" in type(module).__name__}
            ),
        }
        if into != "dense":
            hqq_oft.save_quantized(merged, out / f"merged-{into}")
            loaded = hqq_oft.load_quantized(out / f"merged-{into}", device="cpu", progress=False)
            facts["merged"][str(into)]["saved bit for bit"] = torch.equal(logits(loaded, tokens), found)
    (out / "served.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
