"""Lightning: a module around an adapted model trains and goes on from a checkpoint."""

from __future__ import annotations

import lightning
import pytest
import torch
from helpers import adapted, layers
from small_llama import VOCABULARY
from torch.utils.data import DataLoader

TARGETS = ["q_proj", "v_proj"]  # the other HQQ layers run without an adapter, under autocast too


class FineTuning(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = adapted(target_modules=TARGETS).train()
        self.losses = []

    def training_step(self, tokens, index):
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(module, out, epochs, precision, checkpoint=None):
    torch.manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (16, 12))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
    )
    trainer.fit(module, DataLoader(tokens, batch_size=4), ckpt_path=checkpoint, weights_only=False)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_goes_on_from_a_checkpoint(patched, tmp_path, precision):
    whole = FineTuning()
    fit(whole, tmp_path, 2, precision)
    assert len(set(whole.losses)) == 8
    first = FineTuning()
    fit(first, tmp_path, 1, precision).save_checkpoint(tmp_path / "half.ckpt")
    second = FineTuning()
    fit(second, tmp_path, 2, precision, checkpoint=tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole.losses
    for one, other in zip(layers(second), layers(whole), strict=True):
        assert torch.equal(one.oft_R["default"].weight, other.oft_R["default"].weight)
