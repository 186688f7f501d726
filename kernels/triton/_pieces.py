"""Shared by the kernels: the matrix product, dequantized weight tiles, rotation tiles, the split-K reduction.

Symbols: tokens M, in-features K, out-features N, OFT block size b. Prefixes of names: `i_` program
indices, `o_` offsets, `m_` masks, `p_` pointers.
"""

import triton
import triton.language as tl

# Whether kernels are interpreted (on CPU tensors) or compiled is fixed when they are decorated, at import.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a * b` in the dtype of `acc`. Every product goes through here.

    The interpreter gives wrong results for bfloat16 operands, so it gets widened ones; the result is the same because
    products of 16-bit numbers are exact in float32.
    """
    if INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """`x` rounded to DTYPE, to nearest even. All stores use this because the interpreter truncates to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def tile_rows(start, limit, band_rows, FIELDS: tl.constexpr, BANDED: tl.constexpr, BN: tl.constexpr):
    """Row numbers of a weight tile and the mask of valid rows.

    In the banded layout (see `weight_tile`) `start` and `limit` count packed rows, and a tile holds the FIELDS bands of
    BN / FIELDS packed rows, one band after another; otherwise they count rows of the weight.

    Returns:
        Row numbers [BN], int64, and their mask [BN].
    """
    o_c = tl.arange(0, BN)
    if BANDED:
        o_r = start + o_c % (BN // FIELDS)
        return ((o_c // (BN // FIELDS)) * band_rows + o_r).to(tl.int64), o_r < limit
    else:
        o_n = start + o_c
        return o_n.to(tl.int64), o_n < limit


@triton.jit
def weight_tile(
    w_ptr, s_ptr, z_ptr, start, limit, o_n, m_n, o_k, m_k, k0, N, K, band_rows, band_elements, groups,
    BITS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, BANDED: tl.constexpr,
    ALIGNED: tl.constexpr, GROUPS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`(level - zero) * scale` for rows `o_n` and columns `o_k`, [BN, BK] in ACC; masked levels and scales are 0.

    HQQ packs the levels, in the order of the flattened weight, as FIELDS consecutive bands; a band is one field of
    every packed element: level `e` is field `e // band_elements` of element `e % band_elements`, with the first
    field in the high bits. If FIELDS divides N (BANDED), a band is a range of whole rows, and one packed tile, loaded
    once, decodes to FIELDS tiles of the weight; otherwise every level is loaded separately.

    Args:
        start, limit: range of packed rows, as for `tile_rows`; used if BANDED.
        k0: first column; a multiple of BK if GROUPS > 0.
        groups: N * K / GROUP.
        ALIGNED: whether GROUP divides K (AXIS 1) or N (AXIS 0).
        GROUPS: number of whole groups in a row of the tile (AXIS 1), or 1 if the row lies within one group; otherwise
            0, with a separate load of every level's scale.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    if BANDED:
        o_r = start + tl.arange(0, BN // FIELDS)
        p_w = w_ptr + o_r[:, None].to(tl.int64) * K + o_k[None, :]
        m_w = (o_r < limit)[:, None] & m_k[None, :]
        packed = tl.load(p_w, mask=m_w, other=0, eviction_policy="evict_first")
        if FIELDS == 1:
            levels = packed.to(tl.int32)
        else:
            o_f = (FIELDS - 1 - tl.arange(0, FIELDS)) * BITS
            fields = (packed.to(tl.int32)[None, :, :] >> o_f[:, None, None]) & MASK
            levels = tl.reshape(fields, (BN, BK))
    else:
        o_e = o_n[:, None] * K + o_k[None, :]
        field = o_e // band_elements
        m_w = m_n[:, None] & m_k[None, :]
        packed = tl.load(w_ptr + (o_e - field * band_elements), mask=m_w, other=0)
        levels = (packed.to(tl.int32) >> ((FIELDS - 1 - field) * BITS).to(tl.int32)) & MASK
    if GROUPS == 1:
        o_g = o_n * (K // GROUP) + k0 // GROUP
        scale = tl.load(s_ptr + o_g, mask=m_n, other=0.0).to(ACC)[:, None]
        zero = tl.load(z_ptr + o_g, mask=m_n, other=0.0).to(ACC)[:, None]
    elif GROUPS > 1:
        o_c = k0 // GROUP + tl.arange(0, GROUPS)
        o_g = o_n[:, None] * (K // GROUP) + o_c[None, :]
        m_g = m_n[:, None] & (o_c < K // GROUP)[None, :]
        scale = tl.load(s_ptr + o_g, mask=m_g, other=0.0).to(ACC)[:, :, None]
        zero = tl.load(z_ptr + o_g, mask=m_g, other=0.0).to(ACC)[:, :, None]
        scale = tl.reshape(tl.broadcast_to(scale, (BN, GROUPS, BK // GROUPS)), (BN, BK))
        zero = tl.reshape(tl.broadcast_to(zero, (BN, GROUPS, BK // GROUPS)), (BN, BK))
    else:
        if ALIGNED:
            if AXIS == 1:
                o_g = o_n[:, None] * (K // GROUP) + (o_k // GROUP)[None, :]
            else:
                o_g = (o_n % (N // GROUP))[:, None] * K + o_k[None, :]
        else:
            if AXIS == 1:
                o_g = (o_n[:, None] * K + o_k[None, :]) // GROUP
            else:
                o_g = (o_n[:, None] * K + o_k[None, :]) % groups
        m_g = m_n[:, None] & m_k[None, :]
        scale = tl.load(s_ptr + o_g, mask=m_g, other=0.0).to(ACC)
        zero = tl.load(z_ptr + o_g, mask=m_g, other=0.0).to(ACC)
    return (levels.to(ACC) - zero) * scale


@triton.jit
def rotation_tile(
    d_ptr, i_slice, o_i, o_j, K, B: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, TRANSPOSE: tl.constexpr
):
    """Rows `o_i` and columns `o_j` of `blockdiag(D)`, or its transpose, within slice `i_slice`: 0 outside the blocks.

    A slice consists of WIDTH / B adjacent blocks, so that small blocks fill a tile.
    """
    block = (i_slice * (WIDTH // B) + o_i // B).to(tl.int64)
    if SHARED:
        block = tl.zeros_like(block)
    m_i = (o_i < WIDTH) & (i_slice * WIDTH + o_i < K)
    m = (o_i[:, None] // B == o_j[None, :] // B) & m_i[:, None] & (o_j < WIDTH)[None, :]
    if TRANSPOSE:
        o_d = (o_j % B)[None, :] * B + (o_i % B)[:, None]
    else:
        o_d = (o_i % B)[:, None] * B + (o_j % B)[None, :]
    return tl.load(d_ptr + block[:, None] * (B * B) + o_d, mask=m, other=0.0)


@triton.jit
def arrive_last(end_ptr, stamp, i_tile, SPLITS: tl.constexpr):
    """Whether this program is the last of a tile's SPLITS to arrive; their earlier stores are visible to that one.

    A tile's ticket, 64 bits, holds the stamp of our process and, in its low 16 bits, how many have arrived. Any other
    stamp counts as no arrivals, so that tickets need not be cleared before a launch; the last program clears its own.

    Args:
        end_ptr: end of the partial sums, where the tickets begin (`_launch.split_buffers`).
        stamp: a number whose low 16 bits are 0.
    """
    p_ticket = end_ptr.to(tl.pointer_type(tl.int64)) + i_tile
    tl.debug_barrier()  # all threads' partial sums are written before the arrival is counted
    seen = stamp.to(tl.int64)
    found = tl.atomic_cas(p_ticket, seen, seen + 1, sem="acq_rel")
    while found != seen:
        seen = found
        arrived = tl.where(seen >> 16 == stamp >> 16, seen, stamp) + 1
        found = tl.atomic_cas(p_ticket, seen, arrived, sem="acq_rel")
    last = tl.where(seen >> 16 == stamp >> 16, seen & 0xFFFF, 0) == SPLITS - 1
    if last:
        tl.store(p_ticket, 0)
    return last


@triton.jit
def add_parts(part_ptr, size, o_out, m_out, SPLITS: tl.constexpr):
    """The sum of SPLITS partial sums, in order."""
    acc = tl.load(part_ptr + o_out, mask=m_out, other=0.0, cache_modifier=".cg")
    for i in range(1, SPLITS):
        # .cg bypasses the L1 cache, which is not coherent with the other programs' stores
        acc += tl.load(part_ptr + i * size + o_out, mask=m_out, other=0.0, cache_modifier=".cg")
    return acc


@triton.jit
def sum_splits(acc, part_ptr, stamp, i_tile, i_split, o_out, m_out, size, SPLITS: tl.constexpr):
    """Sum `acc` over the SPLITS programs, in split order, in the last program to arrive.

    Args:
        part_ptr, stamp: see `_launch.split_buffers`.
        o_out: offsets of `acc` within `size`, int64.

    Returns:
        The sum and `m_out` in the last program to arrive; an all-false mask in the others.
    """
    tl.store(part_ptr + i_split.to(tl.int64) * size + o_out, acc, mask=m_out)
    last = arrive_last(part_ptr + SPLITS * size, stamp, i_tile, SPLITS)
    m_out = tl.where(last, m_out, False)
    if last:
        acc = add_parts(part_ptr, size, o_out, m_out, SPLITS)
    return acc, m_out
