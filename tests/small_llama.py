"""A small Llama whose linear layers HQQ has quantized, and one on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64


def small_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def quantize(
    model: nn.Module, *, nbits: int = 4, group_size: int = 16, dtype: torch.dtype = torch.float32
) -> nn.Module:
    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=1)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            module.requires_grad_(False)  # otherwise HQQ's copy of the bias is attached to a graph, and deepcopy raises
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], HQQLinear(module, config, compute_dtype=dtype, device="cpu"))
    model.hqq_quantized = True  # what transformers sets on models that HQQ quantized: PEFT does not change their dtypes
    return model


def quantized_llama(seed: int = 0, **settings) -> nn.Module:
    return quantize(small_llama(seed), **settings)


CHAT = (
    "{% for message in messages %}<s>{{ message['role'] + '\n' + message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def save_byte_llama(folder: Path, chat: bool = False, tied: bool = False) -> None:
    """Write a tiny Llama over bytes, and its tokenizer, as `from_pretrained` reads them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<s>": 256, "</s>": 257}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = {"chat_template": CHAT} if chat else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **template).save_pretrained(
        folder
    )
