"""The solver of HQQ's quantizer, for `quantize`: scales, and the zeros and errors of every iteration.

Sums are in PyTorch's order on x86, as in csrc/cpu/quantize.h: lanes, vectors and runs are those of its vectors. Tensors
are reduced by steps whose order is written here, since that of `tl.sum` depends on the layout.
"""

import triton
import triton.language as tl

# For sums that begin with nothing: x + -0.0 is x, so that the compiler leaves the first addition out.
NOTHING = tl.constexpr(-0.0)
# Adding 1.5 * 2^23 to a number below 2^22 leaves no fraction, and an integer in the low bits.
NO_FRACTION = tl.constexpr(12582912.0)


@triton.jit
def rounded(u, TOP: tl.constexpr):
    """The level nearest to `u`, ties to even, from 0 to TOP, plus NO_FRACTION."""
    return tl.minimum(tl.maximum(u, 0.0), TOP) + NO_FRACTION


@triton.jit
def terms(t, zero, TOP: tl.constexpr):
    """`q - t`, whose mean is the next zero, and the distance from the nearest level q; `t` is scale * w."""
    u = t + zero
    q = rounded(u, TOP) - NO_FRACTION
    return q - t, tl.abs(u - q)


@triton.jit
def weights(w_ptr, o_g, m_g, o_k, groups, one, G: tl.constexpr, AXIS: tl.constexpr):
    """Weights `o_k` of groups `o_g`, [groups, weights] in float32; 0 where there are none.

    Args:
        one: the distance of groups in memory (axis 0), 1. If known only at run time, no thread loads several groups.
    """
    if AXIS == 1:
        p_w = w_ptr + o_g.to(tl.int64)[:, None] * G + o_k[None, :]
        return tl.load(p_w, mask=m_g[:, None] & (o_k < G)[None, :], other=0.0).to(tl.float32)
    else:
        p_w = w_ptr + o_k.to(tl.int64)[:, None] * groups + (o_g * one)[None, :]
        w = tl.load(p_w, mask=m_g[None, :] & (o_k < G)[:, None], other=0.0).to(tl.float32)
        return tl.trans(w)


@triton.jit
def scale_and_zero(low, high, TOP: tl.constexpr, ROUND_ZERO: tl.constexpr):
    """What a group's weights are multiplied by, and its first zero; the constants are HQQ's."""
    span = high - low
    flat = span <= 1e-4
    # rounded twice, as PyTorch divides a number by a tensor
    scale = tl.div_rn(tl.full(span.shape, 1.0, tl.float32), tl.where(flat, 1.0, span)) * TOP
    scale = tl.minimum(tl.where(flat, 1.0, scale), 2e4)
    zero = -low * scale
    if ROUND_ZERO:
        whole = (zero.to(tl.float64) + 6755399441055744.0) - 6755399441055744.0  # 1.5 * 2^52
        zero = tl.where(tl.abs(zero) < 2147483648.0, whole.to(tl.float32), zero)
    return scale, zero


@triton.jit
def columns(x, LOG: tl.constexpr):
    """2^LOG tensors with equal shares of the columns of `x`, in order."""
    parts = (x,)
    for level in tl.static_range(LOG):
        halves = ()
        for i in tl.static_range(2**level):
            pairs = tl.reshape(parts[i], (x.shape[0], 2, parts[i].shape[1] // 2))
            left, right = tl.split(tl.permute(pairs, (0, 2, 1)))
            halves = halves + (left, right)
        parts = halves
    return parts


@triton.jit
def add_columns(total, x, LOG: tl.constexpr, FIRST: tl.constexpr):
    """`total` [rows] plus the first FIRST of the 2^LOG columns of `x`, one after another."""
    parts = columns(x, LOG)
    for i in tl.static_range(FIRST):
        total += tl.reshape(parts[i], (x.shape[0],))
    return total


@triton.jit
def sum_pairs(x, LOG: tl.constexpr):
    """Sums of the 2^LOG columns of `x`, [rows]: of neighbours, then of neighbouring sums, in any layout."""
    for _ in tl.static_range(LOG):
        x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), 2)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def sum_row(sums, rest, LEFT: tl.constexpr, TAIL: tl.constexpr):
    """The sum of a row in PyTorch's order, [groups].

    Args:
        sums: of every fourth vector of eight lanes, four tensors [groups, 8].
        rest: the terms that do not fill four vectors: LEFT vectors, then one of TAIL lanes.
    """
    total = tl.full((sums[0].shape[0],), NOTHING, tl.float32)
    first = sums[0]
    for v in tl.static_range(LEFT):
        first += rest[v]
    if TAIL > 0:
        total = add_columns(total, rest[LEFT], 3, TAIL)
    return add_columns(total, ((first + sums[1]) + sums[2]) + sums[3], 3, 8)


@triton.jit
def power(a):
    """a^-0.3 for positive `a`, in double precision, rounded once; step by step that of csrc/cpu/quantize.h."""
    bits = a.to(tl.float64).to(tl.int64, bitcast=True)
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    exponent = ((bits >> 52) - 1023).to(tl.float64)
    high = m > 1.4142135623730951
    m = tl.where(high, m * 0.5, m)
    exponent = tl.where(high, exponent + 1.0, exponent)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    log = s2 * (1.0 / 11) + 0.1111111111111111
    log = log * s2 + 0.14285714285714285
    log = log * s2 + 0.2
    log = log * s2 + 0.3333333333333333
    log = log * s2 + 1.0
    y = (s * log * 2.8853900817779268 + exponent) * -0.3
    whole = (y + 6755399441055744.0) - 6755399441055744.0
    f = (y - whole) * 0.69314718055994531
    result = f * (1.0 / 9) + 1.0
    for i in tl.static_range(8, 0, -1):
        result = result * f * (1.0 / i) + 1.0
    scale = ((whole.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return (result * scale).to(tl.float32)


@triton.jit
def unshrunk(w, q, scale, zero):
    """`w` less its shrunk residual: generalized soft thresholding, which leaves nothing of residuals under 0.17."""
    residual = w - tl.div_rn(q - zero, scale)
    size = tl.abs(residual)
    shrunk = tl.maximum(size - power(tl.maximum(size, 0.125)) * 0.1, 0.0)
    return w - tl.where(residual < 0.0, -shrunk, shrunk)


@triton.jit
def record(zeros_ptr, errors_ptr, i, o_g, m_g, groups, zero, error):
    """Of iteration `i`: the zeros after it, and the tile's sum of residuals."""
    tl.store(zeros_ptr + (i + 1).to(tl.int64) * groups + o_g, zero, mask=m_g)
    tl.store(errors_ptr + i * tl.num_programs(0) + tl.program_id(0), error)


@triton.jit
def tile_error(distances, scale, LOG_GROUPS: tl.constexpr):
    """The sum of residuals of 2^LOG_GROUPS groups, in float64; `distances` [groups] are in levels."""
    of_group = distances * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return tl.sum(sum_pairs(of_group.to(tl.float64)[None, :], LOG_GROUPS), 0)


@triton.jit
def mean(total, G: tl.constexpr):
    """`total / G`, correctly rounded."""
    if G & (G - 1) == 0:
        return total * (1.0 / G)
    else:
        return tl.div_rn(total, tl.full(total.shape, G * 1.0, tl.float32))


@triton.jit(do_not_specialize=["one"])
def quantize_held_kernel(
    w_ptr, scale_ptr, zeros_ptr, errors_ptr, streams_ptr, groups, one,
    TOP: tl.constexpr, G: tl.constexpr, AXIS: tl.constexpr, ROUND_ZERO: tl.constexpr, ITERATIONS: tl.constexpr,
    LOG_GROUPS: tl.constexpr,
):  # fmt: skip
    """Solve 2^LOG_GROUPS short groups per program, in registers; a thread has one group, or half of one.

    Ends when no zero changes any more. A program with a residual that may be over 0.16 leaves its groups to
    `quantize_streamed_kernel`, by a 1 in `streams_ptr`.
    """
    BG: tl.constexpr = 2**LOG_GROUPS
    LANES: tl.constexpr = 8 if AXIS == 1 else 1
    SHAPE: tl.constexpr = (BG, 8) if AXIS == 1 else (BG,)
    PARTS: tl.constexpr = 4 if AXIS == 1 else 1
    VECTORS: tl.constexpr = G // LANES
    COUNT: tl.constexpr = VECTORS // PARTS
    TAIL: tl.constexpr = G % LANES
    RUN: tl.constexpr = 16  # terms that PyTorch adds before it adds their sum to those of other runs
    o_g = tl.program_id(0) * BG + tl.arange(0, BG)
    m_g = o_g < groups
    o_l = tl.arange(0, 8)
    held = ()
    low, high = tl.full((BG, 8), float("inf"), tl.float32), tl.full((BG, 8), float("-inf"), tl.float32)
    for k in tl.static_range(0, G, 8):
        w = weights(w_ptr, o_g, m_g, k + o_l, groups, one, G, AXIS)
        exists = (k + o_l < G)[None, :]
        low, high = tl.minimum(low, tl.where(exists, w, low)), tl.maximum(high, tl.where(exists, w, high))
        if AXIS == 1:
            held = held + (w,)
        else:
            weights_of_groups = columns(w, 3)
            for i in tl.static_range(min(8, G - k)):
                held = held + (tl.reshape(weights_of_groups[i], (BG,)),)
    low, high = tl.min(low, 1), tl.max(high, 1)
    scale, zero = scale_and_zero(low, high, TOP, ROUND_ZERO)
    tl.store(scale_ptr + o_g, scale, mask=m_g)
    tl.store(zeros_ptr + o_g, zero, mask=m_g)

    first, last, limit = low * scale, high * scale, 0.16 * scale
    error = tl.full((), 0.0, tl.float64)
    i = 0
    # 2: a residual may be shrunk; 1: a zero has changed
    state = tl.max(tl.where(m_g & (tl.maximum(0.5, tl.maximum(-(first + zero), last + zero - TOP)) > limit), 2, 1), 0)
    while (i < ITERATIONS) & (state == 1):
        by, z = (scale[:, None], zero[:, None]) if AXIS == 1 else (scale, zero)
        distances = tl.full(SHAPE, NOTHING, tl.float32)
        sums = ()
        for part in tl.static_range(PARTS):
            sum_of_part = tl.full(SHAPE, NOTHING, tl.float32)
            for start in tl.static_range(0, COUNT, RUN):
                sum_of_run = tl.full(SHAPE, NOTHING, tl.float32)
                for step in tl.static_range(start, min(start + RUN, COUNT)):
                    term, distance = terms(held[step * PARTS + part] * by, z, TOP)
                    sum_of_run += term
                    distances += distance
                sum_of_part += sum_of_run
            sums = sums + (sum_of_part,)
        if AXIS == 1:
            rest = ()
            for v in tl.static_range(COUNT * PARTS, (G + LANES - 1) // LANES):
                term, distance = terms(held[v] * by, z, TOP)
                distances += tl.where((v * LANES + o_l < G)[None, :], distance, 0.0)
                rest = rest + (term,)
            total = sum_row(sums, rest, VECTORS % PARTS, TAIL)
            distances = sum_pairs(distances, 3)
        else:
            total = sums[0]
        error = tile_error(distances, scale, LOG_GROUPS)
        after = mean(total, G)
        record(zeros_ptr, errors_ptr, i, o_g, m_g, groups, after, error)
        far = tl.maximum(0.5, tl.maximum(-(first + after), last + after - TOP)) > limit
        state = tl.max(tl.where(m_g & far, 2, (after != zero).to(tl.int32)), 0)
        zero = after
        i += 1
    tl.store(streams_ptr + tl.program_id(0), state == 2)
    while i < ITERATIONS:
        record(zeros_ptr, errors_ptr, i, o_g, m_g, groups, zero, error)
        i += 1


@triton.jit
def streamed_terms(
    w_ptr, o_g, m_g, o_k, groups, scale, zero, TOP: tl.constexpr, G: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """Terms of the next zero and distances from the nearest levels, [groups, weights], of weights `o_k`."""
    w = weights(w_ptr, o_g, m_g, o_k, groups, 1, G, AXIS)
    by, z = scale[:, None], zero[:, None]
    term, distance = terms(w * by, z, TOP)
    exists = m_g[:, None] & (o_k < G)[None, :]
    distance = tl.where(exists, distance, 0.0)
    if tl.max(tl.max(distance - 0.16 * by, 1), 0) > 0.0:
        q = rounded(w * by + z, TOP) - NO_FRACTION
        term = q - unshrunk(w, q, by, z) * by
    return tl.where(exists, term, 0.0), distance


@triton.jit
def quantize_streamed_kernel(
    w_ptr, scale_ptr, zeros_ptr, errors_ptr, streams_ptr, groups,
    TOP: tl.constexpr, G: tl.constexpr, AXIS: tl.constexpr, ROUND_ZERO: tl.constexpr, ITERATIONS: tl.constexpr,
    LOG_GROUPS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """As `quantize_held_kernel`, for groups of any length and residuals of any size: reads W in every iteration.

    A tile has 32 columns, four vectors of eight lanes (axis 1), or one run of 16 weights of a column (axis 0).

    Args:
        HELD: whether the other kernel has solved what it could: only programs with a 1 in `streams_ptr` run.
    """
    BG: tl.constexpr = 2**LOG_GROUPS
    RUN: tl.constexpr = 16
    W: tl.constexpr = 32 if AXIS == 1 else RUN
    LOG_W: tl.constexpr = 5 if AXIS == 1 else 4
    STEPS: tl.constexpr = G // 32 if AXIS == 1 else (G + RUN - 1) // RUN
    RUNS: tl.constexpr = (STEPS + RUN - 1) // RUN if AXIS == 1 else STEPS
    if HELD:  # noqa: SIM102 (known to the compiler)
        if tl.load(streams_ptr + tl.program_id(0)) == 0:
            return
    o_g = tl.program_id(0) * BG + tl.arange(0, BG)
    m_g = o_g < groups
    o_w = tl.arange(0, W)
    low, high = tl.full((BG, W), float("inf"), tl.float32), tl.full((BG, W), float("-inf"), tl.float32)
    for k in range(0, G, W):
        w = weights(w_ptr, o_g, m_g, k + o_w, groups, 1, G, AXIS)
        exists = (k + o_w < G)[None, :]
        low, high = tl.minimum(low, tl.where(exists, w, low)), tl.maximum(high, tl.where(exists, w, high))
    scale, zero = scale_and_zero(tl.min(low, 1), tl.max(high, 1), TOP, ROUND_ZERO)
    tl.store(scale_ptr + o_g, scale, mask=m_g)
    tl.store(zeros_ptr + o_g, zero, mask=m_g)

    error = tl.full((), 0.0, tl.float64)
    i = 0
    moving = 1
    while (i < ITERATIONS) & (moving == 1):
        distances = tl.full((BG, W), 0.0, tl.float32)
        # Sums of runs, of sixteen runs, and so on
        near = tl.full((BG, W) if AXIS == 1 else (BG,), 0.0, tl.float32)
        far, farthest = near, near
        for run in range(RUNS):
            if AXIS == 1:
                of_run = tl.full((BG, W), 0.0, tl.float32)
                for step in range(run * RUN, tl.minimum((run + 1) * RUN, STEPS)):
                    term, distance = streamed_terms(
                        w_ptr, o_g, m_g, step * W + o_w, groups, scale, zero, TOP, G, AXIS
                    )  # fmt: skip
                    of_run += term
                    distances += distance
            else:
                term, distance = streamed_terms(w_ptr, o_g, m_g, run * RUN + o_w, groups, scale, zero, TOP, G, AXIS)
                of_run = add_columns(tl.full((BG,), 0.0, tl.float32), term, LOG_W, RUN)
                distances += distance
            near += of_run
            if (run + 1) % RUN == 0:
                far += near
                near = tl.zeros_like(near)
            if (run + 1) % (RUN * RUN) == 0:
                farthest += far
                far = tl.zeros_like(far)
        total = (near + far) + farthest
        if AXIS == 1:
            term = tl.full((BG, W), 0.0, tl.float32)
            if G % W > 0:
                term, distance = streamed_terms(w_ptr, o_g, m_g, STEPS * W + o_w, groups, scale, zero, TOP, G, AXIS)
                distances += distance
            total = sum_row(columns(total, 2), columns(term, 2), G % W // 8, G % 8)
        error = tile_error(sum_pairs(distances, LOG_W), scale, LOG_GROUPS)
        after = mean(total, G)
        record(zeros_ptr, errors_ptr, i, o_g, m_g, groups, after, error)
        moving = tl.max((m_g & (after != zero)).to(tl.int32), 0)
        zero = after
        i += 1
    while i < ITERATIONS:
        record(zeros_ptr, errors_ptr, i, o_g, m_g, groups, zero, error)
        i += 1
