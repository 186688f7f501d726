"""TRL's trainers, given a quantized model and an `OFTConfig`, in their default precision: bfloat16 autocast."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from helpers import layers
from peft import OFTConfig, PeftModel
from small_llama import save_byte_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import hqq_oft

TARGETS = ["q_proj", "v_proj"]  # the other HQQ layers run without an adapter, under autocast too
SAMPLES = range(16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_byte_llama(folder)
    return folder


def quantized(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    hqq_oft.quantize_model(model, progress=False)
    return model


def inputs(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    config = OFTConfig(r=0, oft_block_size=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    return {"model": quantized(folder), "processing_class": tokenizer, "peft_config": config}


def options(out):
    return {
        "output_dir": str(out),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }


def train(trainer):
    """Train, and check that every adapter changed and that the saved one gives the same logits; returns the logs."""
    assert trainer.args.bf16
    assert len(layers(trainer.model)) == len(TARGETS)
    trainer.train()
    model, out = trainer.model.eval(), trainer.args.output_dir
    assert all(layer.oft_R["default"].weight.abs().max() > 0 for layer in layers(model))
    trainer.save_model(out)
    return [row for row in trainer.state.log_history if "loss" in row]


@torch.no_grad()
def check_saved(trainer, folder):
    tokens = torch.arange(8)[None]
    loaded = PeftModel.from_pretrained(quantized(folder), trainer.args.output_dir).eval()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # without autocast
    assert torch.equal(loaded(tokens).logits, trained(tokens).logits)


def test_sft(patched, folder, tmp_path):
    data = Dataset.from_list([{"text": f"The number {i} is followed by {i + 1}."} for i in SAMPLES])
    trainer = SFTTrainer(
        args=SFTConfig(max_length=32, gradient_checkpointing=True, **options(tmp_path)),
        train_dataset=data,
        **inputs(folder),
    )
    losses = [row["loss"] for row in train(trainer)]
    assert losses[-1] < losses[0] - 0.5
    check_saved(trainer, folder)


def test_dpo(patched, folder, tmp_path):
    data = Dataset.from_list([{"prompt": f"{i}: ", "chosen": "yes", "rejected": "no"} for i in SAMPLES])
    trainer = DPOTrainer(args=DPOConfig(max_length=32, **options(tmp_path)), train_dataset=data, **inputs(folder))
    logs = train(trainer)
    # The reference is the model without its adapter: at first both are the same, so the loss is log 2.
    assert logs[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert logs[-1]["rewards/margins"] > 0
    check_saved(trainer, folder)


def test_grpo(patched, folder, tmp_path):
    def reward(completions, **_):
        return [float(len(set(completion))) for completion in completions]

    trainer = GRPOTrainer(
        reward_funcs=reward,
        args=GRPOConfig(max_completion_length=8, num_generations=2, **options(tmp_path)),
        train_dataset=Dataset.from_list([{"prompt": f"{i}: "} for i in SAMPLES]),
        **inputs(folder),
    )
    logs = train(trainer)
    assert any(row["reward_std"] > 0 and row["grad_norm"] > 0 for row in logs)
    check_saved(trainer, folder)
