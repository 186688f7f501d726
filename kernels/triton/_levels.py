"""Packed bytes to levels by bit operations: exact 16-bit or 32-bit floats `bias + level`, without conversions.

The bits of a level, placed in the mantissa of a float whose exponent makes their last bit worth 1, are that float plus
the level: `0x4300 | 11` is 128 + 11 in bfloat16. The caller subtracts the bias together with the zero. In PTX a 32-bit
register of four packed bytes is spread to two registers of 16-bit lanes (PRMT), and each pair of levels then takes one
LOP3 and at most one shift; conversions from integers would take several instructions for every level.

A 16-bit level is a sum of `digits` floats: one, except for 8 bits in bfloat16, whose mantissa has 7 bits. Products are
linear, so a dot adds the digits: `x * level = x * digit(0) + x * digit(1)`.

Fields are numbered as in HQQ's bytes, the first in the high bits; bits are 8, 4, 2 or 1. `PTX` selects inline assembly;
without it (the interpreter, AMD) the same bit operations are written in Triton.
"""

import triton
import triton.language as tl

from ._pieces import INTERPRETED

# Mantissa and exponent of the 16-bit floats: bits of the mantissa, and the exponent's bias.
_FORMAT = {"bf16": (7, 127), "fp16": (10, 15)}


@triton.constexpr_function
def digits(BITS, DTYPE):
    """Number of 16-bit floats whose sum is a level: 1 or 2."""
    return 2 if _FORMAT[str(DTYPE)][0] < BITS else 1


@triton.constexpr_function
def _placement(FIELD, DIGIT, BITS, DTYPE):
    """Shift to the right, mask, and bits of the bias, of one digit in a 16-bit lane; and the bias."""
    mantissa, exponent_bias = _FORMAT[str(DTYPE)]
    count = 2 if mantissa < BITS else 1
    width = BITS // count
    weight = width * (count - 1 - DIGIT)  # the digit counts 2 ** weight
    first = 8 - BITS * (FIELD + 1) + weight  # its lowest bit in the byte
    shift = max(0, first + width - mantissa)
    first -= shift
    exponent = mantissa - first + weight
    return shift, ((1 << width) - 1) << first, (exponent + exponent_bias) << mantissa, 2.0**exponent


@triton.constexpr_function
def level_bias(FIELD, BITS, DTYPE):
    """What the digits of field FIELD of a byte exceed its level by, altogether."""
    return sum(_placement(FIELD, i, BITS, DTYPE)[3] for i in range(digits(BITS, DTYPE)))


@triton.constexpr_function
def _digit_ptx(FIELD, DIGIT, BITS, DTYPE):
    shift, mask, bias, _ = _placement(FIELD, DIGIT, BITS, DTYPE)
    shifts = f"shr.u32 a, a, {shift}; shr.u32 b, b, {shift};" if shift else ""
    return f"""{{
        .reg .b32 a, b;
        prmt.b32 a, $2, 0, 0x4140;
        prmt.b32 b, $2, 0, 0x4342;
        {shifts}
        lop3.b32 $0, a, {mask * 0x10001:#x}, {bias * 0x10001:#x}, 0xEA;
        lop3.b32 $1, b, {mask * 0x10001:#x}, {bias * 0x10001:#x}, 0xEA;
        }}"""


@triton.jit
def digit(packed, FIELD: tl.constexpr, DIGIT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Digit DIGIT of the levels in field FIELD of `packed` (uint8), plus its part of `level_bias`, in DTYPE, exact.

    Args:
        DTYPE: bfloat16 or float16.
    """
    if PTX:
        lanes = tl.inline_asm_elementwise(
            _digit_ptx(FIELD, DIGIT, BITS, DTYPE), "=r,=r,r", [packed], dtype=tl.uint16, is_pure=True, pack=4
        )
        return lanes.to(DTYPE, bitcast=True)
    else:
        place: tl.constexpr = _placement(FIELD, DIGIT, BITS, DTYPE)
        lanes = ((packed.to(tl.uint16) >> place[0]) & place[1]) | place[2]
        return lanes.to(tl.uint16).to(DTYPE, bitcast=True)


@triton.constexpr_function
def _row_digit_ptx(FIELD, DIGIT, BITS, DTYPE):
    shift, mask, bias, _ = _placement(FIELD, DIGIT, BITS, DTYPE)
    shifts = f"shr.u32 a, a, {shift};" if shift else ""
    lines = "".join(
        f"prmt.b32 a, $4, $5, {selector}; {shifts} lop3.b32 ${i}, a, {mask * 0x10001:#x}, {bias * 0x10001:#x}, 0xEA;"
        for i, selector in enumerate(("0x0400", "0x0501", "0x0602", "0x0703"))
    )
    return f"{{ .reg .b32 a; {lines} }}"


@triton.jit
def row_digit(
    packed, FIELD: tl.constexpr, DIGIT: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):  # fmt: skip
    """As `digit`, of a tile [rows, columns] whose rows are summed over by a product: columns come out in another order.

    A product takes pairs of neighbouring rows in one register. PRMT forms them from the bytes of two rows, and with
    `original_columns` no level changes threads: decoding along the rows would move each one through shared memory.
    """
    R: tl.constexpr = packed.shape[0]
    C: tl.constexpr = packed.shape[1]
    even, odd = tl.split(tl.permute(tl.reshape(packed, (R // 2, 2, C)), (0, 2, 1)))
    if PTX:
        pair = tl.inline_asm_elementwise(
            _row_digit_ptx(FIELD, DIGIT, BITS, DTYPE), "=r,=r,=r,=r,r,r", [even, odd], dtype=tl.int32, is_pure=True,
            pack=4,
        )  # fmt: skip
        first = (pair & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        second = (pair >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    else:
        first = digit(even, FIELD, DIGIT, BITS, DTYPE, PTX)
        second = digit(odd, FIELD, DIGIT, BITS, DTYPE, PTX)
    q = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (R, C))
    return tl.reshape(tl.permute(tl.reshape(q, (R, C // 4, 4)), (0, 2, 1)), (R, C))


@triton.jit
def original_columns(y):
    """`y` with the columns that `row_digit` permuted in their order again: column C / 4 * j + g becomes 4 * g + j."""
    R: tl.constexpr = y.shape[0]
    C: tl.constexpr = y.shape[1]
    return tl.reshape(tl.permute(tl.reshape(y, (R, 4, C // 4)), (0, 2, 1)), (R, C))


@triton.constexpr_function
def _float32_ptx(FIELD, BITS):
    shift = 8 - BITS * (FIELD + 1)
    mask = ((1 << BITS) - 1) * 0x01010101
    field = f"shr.u32 a, $4, {shift}; and.b32 a, a, {mask:#x};" if BITS < 8 else "mov.b32 a, $4;"
    # The byte is the third of the float's four for 128 + level, the lowest for 2 ** 23 + level.
    magic, selectors = (0x43000000, "7044 7144 7244 7344") if BITS < 8 else (0x4B000000, "7440 7441 7442 7443")
    spread = " ".join(f"prmt.b32 ${i}, a, {magic:#x}, 0x{s};" for i, s in enumerate(selectors.split()))
    return f"{{ .reg .b32 a; {field} {spread} }}"


@triton.constexpr_function
def float32_bias(BITS):
    """What `level_float32` exceeds the level by."""
    return 128.0 if BITS < 8 else 0.0


@triton.jit
def level_float32(packed, FIELD: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Levels in field FIELD of `packed` (uint8) plus `float32_bias`, in float32, exact."""
    if PTX:
        out = tl.inline_asm_elementwise(
            _float32_ptx(FIELD, BITS), "=r,=r,=r,=r,r", [packed], dtype=tl.float32, is_pure=True, pack=4
        )
        if BITS == 8:
            out = out - 8388608.0  # 2 ** 23 + level: the difference is exact
        return out
    else:
        level = (packed >> (8 - BITS * (FIELD + 1))) & ((1 << BITS) - 1)
        return level.to(tl.float32) + float32_bias(BITS)


@triton.jit
def half_of(word, i: tl.constexpr, DTYPE: tl.constexpr):
    """16-bit float `i` (0: low half) of a uint32 word, as float32.

    Scales and zeros are read as such pairs: asynchronous copies move at least four bytes.
    """
    if tl.bfloat16 == DTYPE and not INTERPRETED:
        # a bfloat16 is the upper half of a float32
        bits = word << 16 if i == 0 else word & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:
        return (word >> (16 * i)).to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
