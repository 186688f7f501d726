"""Tiny models of many architectures, with random weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
}
EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "n_shared_experts": 1, "shared_expert_intermediate_size": 32},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


@dataclass(frozen=True)
class Architecture:
    """A model type and how to make a tiny model of it.

    Attributes:
        model_type: name in transformers' CONFIG_MAPPING.
        settings: arguments of the configuration besides `SIZES`.
        auto: the class whose `from_config` makes the model.
        inputs: makes the arguments of its forward.
        bare: leave `SIZES` out.
        name: if the model type is not enough.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    inputs: Callable[[], dict[str, Tensor]] = lambda: {"input_ids": tokens()}
    bare: bool = False
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.model_type

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[self.model_type](**({} if self.bare else SIZES) | self.settings)
        return getattr(transformers, self.auto).from_config(config).float().eval()


def tokens() -> Tensor:
    return torch.arange(3, 19).reshape(2, 8)


def both() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :5]}


def image(size: int = 16, **rest: Any) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.linspace(-1, 1, 2 * 3 * size * size).reshape(2, 3, size, size), **rest}


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {**VISION, "image_size": 16, "patch_size": 8, "num_channels": 3, "initializer_range": 0.2}
TEXT = {**SIZES, "model_type": "llama"}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
IMAGE_TOKENS = torch.cat([torch.full((2, 4), 90), tokens()], 1)

DECODERS = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "olmo", "olmo2"),
    *("olmo3", "starcoder2", "stablelm", "cohere", "cohere2", "granite", "gpt_neox", "glm", "glm4", "helium"),
    *("nemotron", "smollm3", "ernie4_5", "seed_oss", "hunyuan_v1_dense", "exaone4", "apertus", "arcee", "biogpt"),
]
ARCHITECTURES = [
    *(Architecture(name) for name in DECODERS),
    Architecture("gemma3_text", {"sliding_window": 8}),
    Architecture("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    Architecture("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    Architecture("codegen", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    Architecture("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    Architecture("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    Architecture("falcon", {**{key: SIZES[key] for key in SIZES if key != "head_dim"}, "num_kv_heads": 2,
                            "new_decoder_architecture": True}, bare=True),
    Architecture("bloom", {"n_layer": 2, "n_head": 4}),
    Architecture("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    Architecture("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Architecture("mamba", {"state_size": 8}),
    Architecture("mamba2", {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    Architecture("falcon_mamba", {"state_size": 8}),
    Architecture("recurrent_gemma", {"lru_width": 32, "attention_window_size": 8,
                                     "block_types": ["recurrent", "attention"]}),
    Architecture("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    # Mixtures of experts.
    Architecture("mixtral", EXPERTS),
    Architecture("qwen2_moe", EXPERTS),
    Architecture("qwen3_moe", EXPERTS),
    Architecture("qwen3_next", {**EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                                "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                                "layer_types": ["linear_attention", "full_attention"]}),
    Architecture("olmoe", EXPERTS),
    Architecture("phimoe", EXPERTS),
    Architecture("deepseek_v2", {**EXPERTS, **LATENT, "topk_method": "greedy", "num_key_value_heads": 4}),
    Architecture("deepseek_v3", {**EXPERTS, **LATENT, "num_key_value_heads": 4}),
    Architecture("glm4_moe", EXPERTS),
    Architecture("gpt_oss", {**EXPERTS, "layer_types": ["sliding_attention", "full_attention"]}),
    Architecture("granitemoe", EXPERTS),
    Architecture("granitemoehybrid", {**EXPERTS, "layer_types": ["mamba", "attention"], "mamba_n_heads": 8,
                                      "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
                                      "shared_intermediate_size": 32, "mamba_chunk_size": 8}),
    Architecture("jamba", {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                           "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8}),
    Architecture("ernie4_5_moe", {**EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    Architecture("dbrx", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
                          "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
                          "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}}),
    Architecture("llama4_text", {**EXPERTS, "intermediate_size_mlp": 64, "moe_layers": [0, 1],
                                 "interleave_moe_layer_step": 1, "attention_chunk_size": 16}),
    # Encoders, and encoders with decoders.
    Architecture("bert", auto="AutoModelForMaskedLM"),
    Architecture("roberta", {"num_labels": 3}, "AutoModelForSequenceClassification", name="roberta-classifier"),
    Architecture("llama", {"num_labels": 3}, "AutoModelForSequenceClassification", name="llama-classifier"),
    Architecture("distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
                 "AutoModelForTokenClassification"),
    Architecture("deberta-v2", auto="AutoModelForMaskedLM"),
    Architecture("modernbert", {"global_attn_every_n_layers": 2}, "AutoModelForMaskedLM"),
    Architecture("electra", {"embedding_size": 32}, "AutoModelForQuestionAnswering"),
    Architecture("xlm-roberta", auto="AutoModel"),
    Architecture("t5", T5, "AutoModelForSeq2SeqLM", both),
    Architecture("mt5", T5, "AutoModelForSeq2SeqLM", both),
    Architecture("umt5", T5, "AutoModelForSeq2SeqLM", both),
    Architecture("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
                          "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                          "forced_eos_token_id": None}, "AutoModelForSeq2SeqLM", both),
    Architecture("whisper", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
                             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
                             "max_source_positions": 8, "max_target_positions": 32, "num_mel_bins": 8,
                             "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None},
                 "AutoModelForSpeechSeq2Seq",
                 lambda: {"input_features": torch.linspace(-1, 1, 2 * 8 * 16).reshape(2, 8, 16),
                          "decoder_input_ids": tokens()[:, :5]}),
    # Vision, and vision with language.
    Architecture("vit", {**PATCHES, "num_labels": 3}, "AutoModelForImageClassification", image(), bare=True),
    Architecture("siglip_vision_model", PATCHES, "AutoModel", image(), bare=True),
    Architecture("clip", {"text_config": SIZES, "vision_config": PATCHES, "projection_dim": 32}, "AutoModel",
                 image(input_ids=tokens()), bare=True),
    Architecture("llava", {"vision_config": {**PATCHES, "model_type": "clip_vision_model"}, "text_config": TEXT,
                           "image_token_index": 90, "vision_feature_layer": -1}, "AutoModelForImageTextToText",
                 image(input_ids=IMAGE_TOKENS), bare=True),
    Architecture("gemma3", {"vision_config": {**PATCHES, "model_type": "siglip_vision_model"},
                            "text_config": {**SIZES, "model_type": "gemma3_text", "sliding_window": 8},
                            "image_token_index": 90, "mm_tokens_per_image": 4}, "AutoModelForImageTextToText",
                 image(input_ids=IMAGE_TOKENS, token_type_ids=(IMAGE_TOKENS == 90).long()), bare=True),
]  # fmt: skip
