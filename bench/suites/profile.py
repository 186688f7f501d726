"""Sizes that suit a machine: `gpu` as asked of one GPU, `cpu` for a few cores, and both with tiny layers to run dry."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..problem import Setting

MAIN = Setting()
VARIANTS = (
    *(Setting(bits=bits) for bits in (2, 3, 8)),
    Setting(axis=0),
    Setting(group=128),
    *(Setting(block=block) for block in (16, 64, 96, 128, 256)),
    Setting(share=True),
    Setting(exact=True),
    Setting(dtype="fp16"),
)


@dataclass(frozen=True)
class Decoder:
    """Shape of a Llama's decoder layers.

    Attributes:
        hidden, intermediate, heads, key_value_heads: as `LlamaConfig` has them.
        layers: how many.
        vocabulary: size of the embedding.
    """

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int = 1024


@dataclass(frozen=True)
class Profile:
    """Shapes and sizes of all suites.

    Attributes:
        shapes: out- and in-features of the layers, the most telling first.
        first: tokens at which those are measured before anything else.
        tokens: all the numbers of tokens.
        training_from: tokens from which training is measured as well.
        variants: settings beside the main one, and the tokens at which they are measured.
        against_gemlite: tokens at which GemLite is measured, which tries out many tiles for each.
        compiled: shape and tokens at which what `torch.compile` makes is measured.
        adapters: features of every adapter of one model, for one launch of Cayley transforms.
        decoder, sequences: of the whole model's training step, by tokens of a batch.
        served, decoded: sequences in a batch and adapters mixed in it; how far into them decoding is timed.
        buffers: bytes that the sets of buffers of one layer take together at least, so that no cache holds them.
    """

    shapes: tuple[tuple[int, int], ...]
    first: tuple[int, ...]
    tokens: tuple[int, ...]
    training_from: int
    variants: tuple[Setting, ...]
    variant_tokens: tuple[int, ...]
    against_gemlite: tuple[int, ...]
    compiled: tuple[tuple[int, int, int], ...]
    adapters: tuple[int, ...]
    decoder: Decoder
    sequences: tuple[int, ...]
    served: int
    decoded: int
    buffers: int

    def copies(self, n: int, k: int) -> int:
        """Sets of buffers for a layer."""
        return max(1, min(64, -(-self.buffers // int(MAIN.layer(n, k).weight_bytes))))


LLAMA_70B = (28672, 8192)
GPU = Profile(
    shapes=((4096, 4096), (14336, 4096), LLAMA_70B, (4096, 14336), (1024, 4096), (8192, 28672)),
    first=(1, 16, 512, 4096),
    tokens=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    training_from=256,
    variants=VARIANTS,
    variant_tokens=(1, 16, 4096),
    against_gemlite=(1, 16, 4),
    compiled=((4096, 4096, 1), (4096, 4096, 4096)),
    adapters=(4096, 4096, 4096, 4096, 4096, 4096, 14336) * 32,
    decoder=Decoder(4096, 14336, 32, 8, 4),
    sequences=(2048, 8192),
    served=8,
    decoded=255,
    buffers=160 << 20,
)
CPU = Profile(
    shapes=((4096, 4096), (14336, 4096)),
    first=(1, 16, 512),
    tokens=(1, 16, 512),
    training_from=256,
    variants=(Setting(bits=8), Setting(bits=2), Setting(bits=3), Setting(axis=0), Setting(dtype="fp32")),
    variant_tokens=(1,),
    against_gemlite=(),
    compiled=(),
    adapters=(1024, 1024, 1024, 1024, 1024, 1024, 2816) * 4,
    decoder=Decoder(1024, 2816, 8, 8, 4),
    sequences=(256,),
    served=4,
    decoded=32,
    buffers=0,
)


def dry(profile: Profile) -> Profile:
    """The same cases on layers small enough to run each in no time: every path, no times."""
    small = {4096: 512, 14336: 1024, 28672: 1536, 8192: 768, 1024: 256, 2816: 512}
    return replace(
        profile,
        shapes=tuple((small[n], small[k]) for n, k in profile.shapes),
        first=tuple(min(m, 40) for m in profile.first[:1] + profile.first[-1:]),
        tokens=tuple(sorted({min(m, 40) for m in profile.tokens if m in (1, 16) or m >= 512})),
        training_from=40,
        variant_tokens=(1, 40),
        against_gemlite=profile.against_gemlite[:1],
        compiled=tuple((512, 512, 40) for _ in profile.compiled[:1]),
        adapters=(768, 768, 1536),
        decoder=Decoder(768, 768, 4, 2, 1, 64),
        sequences=(24,),
        served=3,
        decoded=4,
        buffers=1,
    )


PROFILES = {"gpu": GPU, "cpu": CPU, "dry": dry(GPU), "dry-cpu": dry(CPU)}
