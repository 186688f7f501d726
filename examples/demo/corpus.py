"""Real text that every Python brings along: the prose of its language reference, and the source of its library."""

from __future__ import annotations

import importlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256  # bytes
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class Text:
    """Bytes as int64 tokens, split into what is trained on and what is held out."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, documents: list[bytes], held_out_share: float = 0.1) -> Text:
        """Every tenth document is held out, whole."""
        every = round(1 / held_out_share)
        parts: tuple[list[bytes], list[bytes]] = ([], [])
        for index, document in enumerate(documents):
            parts[index % every == every - 1].append(document)
        train, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8).long() for part in parts)
        return cls(train, held_out)

    def batches(self, count: int, size: int, length: int, seed: int) -> list[Tensor]:
        """`count` batches `[size, length]` of random windows of the training text."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.train) - length, (count, size, 1), generator=generator)
        return list(self.train[starts + torch.arange(length)])

    def evaluation_batches(self, count: int, size: int, length: int) -> list[Tensor]:
        """The same evenly spread windows of the held-out text every time."""
        starts = torch.linspace(0, len(self.held_out) - length, count * size).long()
        return list((self.held_out[starts[:, None] + torch.arange(length)]).reshape(count, size, length))


def prose() -> Text:
    """The topics of `help()`: the language reference in English, about half a megabyte.

    Topics repeat each other's paragraphs; only the first of each is kept, so that nothing held out is trained on.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    seen: set[str] = set()
    documents = []
    for name in sorted(topics):
        paragraphs = [paragraph for paragraph in topics[name].split("\n\n") if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in paragraphs)
        if paragraphs:
            documents.append("\n\n".join(paragraphs).encode())
    return Text.of(documents)


def code(limit: int = 4_000_000) -> Text:
    """The standard library's own source, without its tests, up to `limit` bytes."""
    documents: list[bytes] = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(root).parts) and sum(map(len, documents)) < limit:
            documents.append(path.read_bytes())
    return Text.of(documents)
