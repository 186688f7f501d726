"""The roofline of machine code: what small listings cost, which loop is the hot one, what counts as a fault."""

from __future__ import annotations

import pytest

from tests import sass

DECODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;
.L_x_0:
        /*0020*/                   DEPBAR.LE SB0, 0x1 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   LDS.128 R4, [R3] ;
        /*0050*/                   LDSM.16.M88.4 R8, [R3+0x100] ;
        /*0060*/                   LOP3.LUT R5, R4, 0xf000f, RZ, 0xc0, !PT ;
        /*0070*/                   PRMT R6, R4, 0x5140, RZ ;
        /*0080*/                   FFMA R7, R5, R6, R7 ;
        /*0090*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*00a0*/                   I2F.U8 R9, R5 ;
        /*00b0*/              @!P1 LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R10.64] ;
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/               @P0 BRA `(.L_x_0) ;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R12 ;
        /*00f0*/                   EXIT ;
.L_x_1:
        /*0100*/                   BRA `(.L_x_1);
        /*0110*/                   NOP;
"""
LOOP_OF_DECODE = 12


def lines(*instructions: str, start: int = 0) -> str:
    """Instructions as `nvdisasm` lists them; one that ends in a colon is a label."""
    text, address = [], start
    for each in instructions:
        if each.endswith(":"):
            text.append(each)
        else:
            text.append(f"        /*{address:04x}*/                   {each} ;")
            address += 16
    return "\n".join(text)


def loop(*body: str) -> str:
    """A kernel whose hot loop has this body, a copy and a product."""
    copy, product = "LDGSTS.E.BYPASS.128 [R3], [R10.64]", "HMMA.16816.F32 R12, R4, R8, R12"
    return lines("MOV R1, R2", ".L_x_0:", copy, product, *body, "@P0 BRA `(.L_x_0)", "EXIT")


def faults(text: str, **changes: object) -> tuple[str, ...]:
    options = {"streamed": 1024, "warps": 4, "registers": 128, "shared": 1024, "pipelined": True} | changes
    return sass.roofline(sass.divide(sass.parse(text)), "sm_90", **options).faults


def test_cycles_of_every_pipe():
    listing = sass.divide(sass.parse(DECODE))
    assert listing.looped
    assert len(listing.hot) == LOOP_OF_DECODE
    found = sass.roofline(listing, "sm_90", streamed=2048, warps=8, registers=128, shared=32 << 10, pipelined=True)
    # Two warps to each of four sub-partitions; 4 wavefronts each of LDS.128, LDSM of four matrices and LDGSTS.128.
    assert found.cycles == {"issue": 24, "fma": 2, "alu": 8, "xu": 16, "tensor": 16, "shared": 8 * 12}
    assert found.pipe == "shared"
    assert found.bound == pytest.approx(2048 / 96 * 132 * 1.755 / 1e3)
    assert found.ratio == pytest.approx(3.35 / found.bound)
    assert found.barriers == 1
    assert found.rest["issue"] == 2 * 4  # without the endless loop and the padding at the end
    assert found.faults == ()


def test_rates_of_targets_differ():
    code = sass.parse(lines("FFMA R1, R2, R3, R4", "IMAD R1, R2, R3, R4", "HFMA2.BF16_V2 R1, R2, R3, R4"))
    assert sass.cycles(code, "sm_80", 4)["fma"] == 2 + 2 + 2
    assert sass.cycles(code, "sm_90", 4)["fma"] == 3
    group = sass.parse(lines("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24"))
    assert sass.cycles(group, "sm_90", 4)["tensor"] == 64 * 128 * 16 / 2048
    fifth = sass.parse(lines("UTCHMMA gdesc[UR6], gdesc[UR10], tmem[UR14], tmem[UR24], idesc[UR25], !UPT"))
    assert sass.cycles(fifth, "sm_100", 4, fmas=64 * 128 * 64)["tensor"] == 64 * 128 * 64 / 4096


@pytest.mark.parametrize(
    ("name", "width", "wavefronts"),
    [
        ("LDG.E", 4, 1),
        ("LDG.E.64.CONSTANT", 8, 2),
        ("LDG.E.LTC128B.U16", 2, 1),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16, 4),
        ("STS.U8", 1, 1),
        ("LDSM.16.MT88.4", 4, 4),
        ("LDSM.16.M88.2", 4, 2),
        ("SHFL.BFLY", 4, 1),
        ("LOP3.LUT", 4, 0),
    ],
)
def test_widths_and_wavefronts(name, width, wavefronts):
    (each,) = sass.parse(lines(f"{name} R1, [R2]"))
    assert (each.width, each.wavefronts) == (width, wavefronts)


def test_blocks_on_a_multiprocessor():
    assert sass.resident("sm_90", warps=8, registers=160, shared=0) == 1  # 12 warps of 160 registers fit
    assert sass.resident("sm_90", warps=4, registers=128, shared=0) == 4
    assert sass.resident("sm_90", warps=4, registers=32, shared=100 << 10) == 2
    assert sass.resident("sm_80", warps=4, registers=32, shared=100 << 10) == 1
    assert sass.resident("sm_90", warps=2, registers=16, shared=0) == 32


def test_the_hot_loop_has_copies_and_products():
    prologue = ("LDG.E.128 R4, [R2.64]", "HMMA.16816.F32 R12, R4, R8, R12", *["FADD R1, R1, R1"] * 40)
    text = lines(
        ".L_x_0:", *prologue, "@P0 BRA `(.L_x_0)", ".L_x_1:", "LDGSTS.E.128 [R3], [R4.64]", "HMMA.16816.F32 R1, R2, R3",
        "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip
    assert [each.base for each in sass.divide(sass.parse(text)).hot] == ["LDGSTS", "HMMA", "BRA"]


def test_code_moved_to_the_end_belongs_to_its_loop():
    text = lines(
        ".L_x_0:", "LDGSTS.E.128 [R3], [R4.64]", "HMMA.16816.F32 R1, R2, R3, R1", "@!P1 BRA `(.L_x_2)", ".L_x_1:",
        "@P0 BRA `(.L_x_0)", "EXIT", ".L_x_2:", "NANOSLEEP 0x1", "BRA `(.L_x_1)",
    )  # fmt: skip
    listing = sass.divide(sass.parse(text))
    assert [each.base for each in listing.hot] == ["LDGSTS", "HMMA", "BRA", "BRA", "NANOSLEEP", "BRA"]
    assert [each.base for each in listing.rest] == ["EXIT"]


def test_a_return_to_the_kernel_closes_no_loop():
    far = ("LDGSTS.E.128 [R3], [R4.64]", "HMMA.16816.F32 R1, R2, R3, R1", *["FADD R1, R1, R1"] * 9)
    text = lines(
        "MOV R1, R2", "@P1 BRA `(.L_x_2)", ".L_x_1:", "FADD R1, R1, R1", ".L_x_0:", "LDGSTS.E.128 [R3], [R4.64]",
        "HMMA.16816.F32 R1, R2, R3, R1", "@P0 BRA `(.L_x_0)", "EXIT", ".L_x_2:", *far, "BRA `(.L_x_1)",
    )  # fmt: skip
    assert [each.base for each in sass.divide(sass.parse(text)).hot] == ["LDGSTS", "HMMA", "BRA"]


def test_what_only_diverged_warps_run_does_not_count():
    text = loop("BRA.CONV ~URZ, `(.L_x_1)", "CALL.REL.NOINC `($__internal_0_$__cuda_sm70_warpsync)", ".L_x_1:")
    assert faults(text) == ()
    text = loop("BRA.DIV ~URZ, `(.L_x_2)", ".L_x_1:")
    far = (".L_x_2:", "CALL.REL.NOINC `($__internal_0_$__cuda_sm70_shflsync)", "BRA `(.L_x_1)")
    assert faults(text + "\n" + lines(*far, start=0x400)) == ()


def test_guards_are_not_calls():
    assert (
        faults(loop("CALL.REL.NOINC `($__internal_0_$__cuda_sm10x_tcgen05_guardrail_trap_unallocated_columns)")) == ()
    )


def test_without_a_loop_all_instructions_count():
    text = lines("LDG.E.64 R2, [R4.64]", "FADD R1, R2, R3", "STG.E.128 [R4.64], R8", "EXIT")
    listing = sass.divide(sass.parse(text))
    assert (listing.looped, len(listing.hot), listing.rest) == (False, 4, ())
    assert listing.stored(warps=2) == 2 * 32 * 16


def test_rare_parts_are_separate():
    rare = ("@P2 BRA `(.L_x_1)", "LDGSTS.E.ZFILL [R1], [R2.64]", "FADD R1, R1, R1", ".L_x_1:")
    listing = sass.divide(sass.parse(loop(*rare)), rare=r"LDGSTS(?!.*BYPASS)")
    assert [each.base for each in listing.rare] == ["LDGSTS", "FADD"]
    assert [each.base for each in listing.hot] == ["LDGSTS", "HMMA", "BRA", "BRA"]


@pytest.mark.parametrize("name", ["STS.U16", "STS.U8", "LDS.U8", "LDS.S8"])
def test_narrow_accesses_to_shared_memory_are_a_fault(name):
    assert faults(loop(f"{name} R1, [R2]", f"{name} R1, [R2]")) == (f"2 {name}",)


@pytest.mark.parametrize("name", ["STS", "STS.64", "LDS.U16", "LDS.128"])
def test_wide_accesses_to_shared_memory_are_not(name):
    assert faults(loop(f"{name} R1, [R2]")) == ()


def test_calls_are_a_fault():
    call = "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_u64)"
    assert faults(loop(call)) == ("1 CALL",)
    subroutine = "\n" + lines(
        "$__internal_0_$__cuda_sm20_div_u64:", *["FADD R1, R1, R1"] * 7, "RET.REL R2", start=0x400
    )
    listing = sass.divide(sass.parse(loop(call) + subroutine))
    assert sum(each.base == "FADD" for each in listing.rest) == 7  # counted, once


@pytest.mark.parametrize("name", ["LDG.E", "LDG.E.U16", "LDG.E.U16.CONSTANT"])
def test_narrow_loads_that_are_not_asynchronous_are_a_fault(name):
    text = loop(f"{name} R1, [R2.64]")
    assert faults(text) == ("1 loads of at most 4 bytes that are not asynchronous",)
    assert faults(text, pipelined=False) == ()
    assert faults(loop("LDG.E.128 R4, [R2.64]", "LDGSTS.E [R3], [R2.64]")) == ()


def test_a_product_without_asynchronous_copies_is_a_fault():
    text = lines(".L_x_0:", "LDG.E.128 R4, [R2.64]", "HMMA.16816.F32 R1, R2, R3, R1", "@P0 BRA `(.L_x_0)", "EXIT")
    assert faults(text) == ("no asynchronous copy",)


def test_spills_are_a_fault():
    assert faults(loop("LDL R1, [R1]"), spilled=8) == ("8 bytes spilled", "1 LDL")


def test_one_block_is_a_fault():
    assert faults(loop(), registers=255, warps=8) == ("one block on a multiprocessor",)
    assert faults(loop(), shared=228 << 10) == ("no block fits a multiprocessor",)


def test_a_loop_within_the_hot_loop_is_a_fault():
    inner = (".L_x_1:", *["FADD R1, R1, R1"] * 20, "@P1 BRA `(.L_x_1)")
    assert faults(loop(*inner)) == ("a loop within the hot loop, counted once",)
    assert faults(loop(".L_x_1:", "NANOSLEEP 0x1", "@P1 BRA `(.L_x_1)")) == ()  # a wait
