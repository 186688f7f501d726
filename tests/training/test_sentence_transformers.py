"""A sentence-transformers model: quantized, adapted with `add_adapter`, trained, saved and loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import layers
from peft import OFTConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from small_llama import save_byte_llama
from transformers import AutoTokenizer, BertConfig, BertModel

import hqq_oft

SENTENCES = ["question 3", "answer 3", "something else"]


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT over bytes, of which sentence-transformers takes the mean of the tokens' vectors."""
    save_byte_llama(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def quantized(folder):
    model = SentenceTransformer(str(folder), device="cpu")
    hqq_oft.quantize_model(model[0].auto_model, skip_modules=["pooler.dense"], progress=False)
    return model


def test_training(patched, folder, tmp_path):
    model = quantized(folder)
    before = model.encode(SENTENCES)
    model.add_adapter(OFTConfig(r=0, oft_block_size=8, target_modules=["query", "key", "value", "output.dense"]))
    assert len(layers(model)) == 10
    data = {"anchor": [f"question {i}" for i in range(16)], "positive": [f"answer {i}" for i in range(16)]}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path / "out"),
            num_train_epochs=8,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(data),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train()
    history = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert history[-1] < history[0]
    after = model.encode(SENTENCES)
    assert np.abs(after - before).max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = quantized(folder)
    loaded.load_adapter(str(tmp_path / "saved"))
    assert np.array_equal(loaded.encode(SENTENCES), after)
