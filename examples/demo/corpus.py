"""Real text that every Python brings along: the prose of its language reference, and the source of its library."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 256  # bytes
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class Text:
    """Tokens as int64, split into what is trained on and what is held out."""

    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, documents: Iterable[Tensor], held_out_share: float = 0.1) -> Text:
        """Every tenth document is held out, whole."""
        every = round(1 / held_out_share)
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for index, document in enumerate(documents):
            parts[index % every == every - 1].append(document)
        return cls(*map(torch.cat, parts))

    def batches(self, count: int, size: int, length: int, seed: int) -> list[Tensor]:
        """`count` batches `[size, length]` of random windows of the training text."""
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.train) - length, (count, size, 1), generator=generator)
        return list(self.train[starts + torch.arange(length)])

    def evaluation_batches(self, count: int, size: int, length: int) -> list[Tensor]:
        """The same evenly spread windows of the held-out text every time."""
        starts = torch.linspace(0, len(self.held_out) - length, count * size).long()
        return list((self.held_out[starts[:, None] + torch.arange(length)]).reshape(count, size, length))


def topics() -> dict[str, str]:
    """The topics of `help()`: the language reference in English, about half a megabyte.

    Topics repeat each other's paragraphs; only the first of each is kept, so that nothing held out is trained on.
    """
    seen: set[str] = set()
    texts = {}
    for name, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip() not in seen]
        seen.update(paragraph.strip() for paragraph in paragraphs)
        if paragraphs:
            texts[name] = "\n\n".join(paragraphs)
    return texts


def sources(limit: int = 4_000_000) -> list[bytes]:
    """The standard library's own source, without its tests, up to `limit` bytes."""
    documents: list[bytes] = []
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not _LEFT_OUT & set(path.relative_to(root).parts) and sum(map(len, documents)) < limit:
            documents.append(path.read_bytes())
    return documents


def prose() -> Text:
    """The topics, as bytes."""
    return Text.of(_as_bytes(text.encode()) for text in topics().values())


def code(limit: int = 4_000_000) -> Text:
    """The sources, as bytes."""
    return Text.of(map(_as_bytes, sources(limit)))


def held_out_topic() -> str:
    """The name of a topic that is held out."""
    return list(topics())[59]


def question(topic: str) -> str:
    """What a user asks about a topic."""
    return f"What does Python's documentation say about {topic}?"


def chat(tokenizer: Any, topic: str, answer: str | None = None) -> Tensor:
    """The question about a topic and its answer as tokens; without one, up to where the model is to answer."""
    messages = [{"role": "user", "content": question(topic)}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)
    return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)


def chats(tokenizer: Any) -> Text:
    """The topics as answers in chats."""
    return Text.of(chat(tokenizer, name, text) for name, text in topics().items())


def code_tokens(tokenizer: Any, limit: int = 400_000) -> Text:
    """The sources, tokenized."""
    texts = (document.decode("utf-8", "replace") for document in sources(limit))
    return Text.of(torch.tensor(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)


def _as_bytes(document: bytes) -> Tensor:
    return torch.frombuffer(bytearray(document + b"\n"), dtype=torch.uint8).long()
