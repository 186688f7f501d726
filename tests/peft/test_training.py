"""Common training setups: transformers' Trainer, accumulation, resuming, checkpointing, autocast, compilation."""

from __future__ import annotations

import helpers
import pytest
import torch
from small_llama import VOCABULARY, small_llama
from small_llama import quantize as quantize_llama
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

import hqq_oft

SETTINGS = {"target_modules": ["q_proj", "v_proj", "up_proj"], "use_cayley_neumann": True}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(base=None, **settings):
    torch.manual_seed(0)
    return helpers.adapted(base, **{**SETTINGS, **settings})


def dataset(samples=24):
    tokens = torch.randint(0, VOCABULARY, (samples, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fit(folder, model, resume=None, **arguments):
    """The loss of each step, and the trained parameters."""
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(model, TrainingArguments(str(folder), **{**defaults, **arguments}), train_dataset=dataset())
    trainer.train(resume_from_checkpoint=resume)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, parameters(model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with hqq_oft.patch_peft():
        return fit(tmp_path_factory.mktemp("plain"), adapted())


def test_trainer_trains_the_adapters_and_nothing_else(tmp_path):
    model = adapted()
    before, base = parameters(model), [m.W_q.clone() for m in model.modules() if hasattr(m, "W_q")]
    losses, after = fit(tmp_path, model, max_steps=18, learning_rate=2e-2)
    assert len(losses) == 18
    assert sum(losses[-6:]) < sum(losses[:6]) - 0.3  # the third epoch and the first
    assert len(after) == 6
    assert all(not torch.equal(before[name], after[name]) for name in after)
    assert all(
        torch.equal(a, m.W_q) for a, m in zip(base, (m for m in model.modules() if hasattr(m, "W_q")), strict=True)
    )


def test_accumulated_batches_are_one_large_batch(tmp_path, plain):
    losses, after = fit(tmp_path, adapted(), per_device_train_batch_size=2, gradient_accumulation_steps=2)
    expected_losses, expected = plain
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name in expected:
        assert_close(after[name], expected[name], rtol=0, atol=1e-5)


def test_resuming_repeats_the_run_bit_for_bit(tmp_path):
    settings = {"module_dropout": 0.5, "coft": True, "eps": 0.5}
    schedule = {"lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 3}
    losses, expected = fit(tmp_path, adapted(**settings), **schedule)
    model = adapted(**settings)
    torch.manual_seed(99)  # neither the random numbers nor the parameters of the process count, but the checkpoint's
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    again, after = fit(tmp_path, model, resume=str(tmp_path / "checkpoint-3"), **schedule)
    assert again == losses
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, plain, reentrant):
    losses, after = fit(
        tmp_path, adapted(), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert losses == plain[0]
    assert all(torch.equal(after[name], plain[1][name]) for name in after)


def test_shared_rotations(tmp_path, plain):
    model = adapted()
    with hqq_oft.share_rotations(model):
        losses, after = fit(tmp_path, model)
    assert losses == plain[0]
    assert all(torch.equal(after[name], plain[1][name]) for name in after)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
def test_bf16_keeps_float32_parameters(tmp_path, plain, model_dtype):
    """Autocast over a float32 model, and over a bfloat16 one."""
    base = quantize_llama(small_llama().to(model_dtype), dtype=model_dtype)
    losses, after = fit(tmp_path, adapted(base, target_modules=ALL), bf16=True, max_steps=18, learning_rate=2e-2)
    assert all(p.dtype == torch.float32 for p in after.values())
    assert sum(losses[-6:]) < sum(losses[:6]) - 0.3


def test_a_compiled_model_is_one_graph():
    torch._dynamo.reset()
    tokens = torch.stack([row["input_ids"] for row in dataset(4)])
    model = adapted().train()
    results = []
    # Tracing finds graph breaks; generating code would take most of the time and find nothing more.
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss = run(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for eager, compiled in zip(*results, strict=True):
        assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
