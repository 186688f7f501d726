"""A static roofline of machine code: what the hot loop of a kernel needs of every pipe of a multiprocessor.

The loop is found in the listing of `nvdisasm`; each of its instructions takes an issue slot and a pipe. The pipe that
is busy longest bounds the bytes that all multiprocessors can stream, whatever the memory delivers. Latencies, bank
conflicts, caches and what the uniform data path costs beyond issue slots are left out, so the bound is an upper limit
of the speed: *modelled*, not measured.

Rates, and where they come from:

- CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", in results per clock and multiprocessor; a
  warp instruction holds its pipe on one of four sub-partitions for 128 / results clocks. Float32 add, multiply, fma: 64
  (8.0), 128 (9.0, 10.0). Pairs of float16: 128 (`HFMA2`; bfloat16 on 8.0: 64). Integer multiply-add: 64. Integer add,
  compare, logic, shift, permute, conversions to and from 32 and 16 bits (`I2FP`, `F2FP`): 64. Special functions,
  `POPC`, `FLO` and other conversions (`I2F`, `F2I`): 16. Shuffles: 32. For 10.0 the integer rates of 9.0 are assumed.
- Same guide, "Compute Capabilities": 65536 registers, 64 warps, 32 blocks and 164 (8.0) or 228 KiB (9.0, 10.0) of
  shared memory per multiprocessor, 1 KiB of it reserved for each block; registers come 256 to a warp. Shared memory and
  L1 transfer 128 bytes per clock.
- White papers of A100, H100 and Blackwell: dense 16-bit fmas of the tensor cores per clock and multiprocessor, 1024,
  2048 (wgmma), 4096 (tcgen05); multiprocessors, clocks, memory. `mma.sync` is taken at 1024 everywhere: on 9.0,
  published measurements reach about 0.6 of the rate of wgmma. Clocks are those that such a device sustains.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

PIPES = ("issue", "fma", "alu", "xu", "tensor", "shared")


@dataclass(frozen=True)
class Rates:
    """What one device offers; cycles are those that a warp instruction holds a pipe of its sub-partition."""

    multiprocessors: int
    clock: float  # GHz
    memory: float  # TB/s
    shared: int  # KiB of a multiprocessor
    fp32: int
    bf16: int
    group_mma: int  # fmas per clock and multiprocessor of wgmma or tcgen05


RATES = {
    "sm_80": Rates(108, 1.41, 2.04, 164, fp32=2, bf16=2, group_mma=0),
    "sm_90": Rates(132, 1.755, 3.35, 228, fp32=1, bf16=1, group_mma=2048),
    "sm_100": Rates(148, 1.85, 8.0, 228, fp32=1, bf16=1, group_mma=4096),
}
WARP_MMA = 1024  # fmas per clock and multiprocessor of mma.sync

_GROUPS = {
    "tensor": "HMMA IMMA DMMA QMMA OMMA HGMMA IGMMA QGMMA BGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LDG STG LDGSTS ATOM ATOMG RED REDG LDL STL LD ST",
    "shuffle": "SHFL",
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2",
    "imad": "IMAD IDP IDP4A IMUL VIMAD",
    "half": "HFMA2 HADD2 HMUL2",
    "xu": "MUFU I2F F2I F2F POPC FLO BREV FRND I2I",
    # Only an issue slot: control, synchronization, constants, special registers, tensor memory.
    "control": "BRA BRX JMP EXIT BSSY BSYNC BREAK WARPSYNC BAR DEPBAR LDGDEPBAR NOP CALL RET YIELD MEMBAR ERRBAR CCTL "
    "B2R WARPGROUP WARPGROUPDEPBAR SYNCS FENCE ARRIVES KILL NANOSLEEP PREEXIT ACQBULK ELECT CGAERRBAR BPT "
    "LDC LDCU S2R CS2R LDTM STTM UTCBAR UTMALDG UTMASTG UBLKCP R2UR REDUX",
}
_PIPE = {name: pipe for pipe, names in _GROUPS.items() for name in names.split()}
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w+|\$\S+):")
_NARROW_SHARED = re.compile(r"STS\.[US](?:8|16)|LDS\.[US]8")
_LONGEST_WAIT = 12  # instructions: a loop within a loop that only waits


@dataclass(frozen=True)
class Instruction:
    """One line of a listing; `target` is where a branch leads, `always` says that it depends on no predicate."""

    address: int
    name: str  # with its modifiers
    always: bool
    target: int | None = None

    @property
    def base(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def pipe(self) -> str:
        if self.base in _PIPE:
            return _PIPE[self.base]
        return "control" if self.base.startswith(("U", "S2U", "VOTEU")) else "alu"

    @property
    def width(self) -> int:
        """Bytes that each lane transfers."""
        modifiers = self.name.split(".")[1:]
        for bytes_, names in ((32, ("256",)), (16, ("128",)), (8, ("64",)), (1, ("U8", "S8")), (2, ("U16", "S16"))):
            if any(name in modifiers for name in names):
                return bytes_
        return 4

    @property
    def wavefronts(self) -> float:
        """Transfers of 128 bytes of shared memory and L1."""
        if self.pipe == "shuffle":
            return 1
        if self.pipe not in ("shared", "global"):
            return 0
        matrices = re.search(r"MT?\d+\.(\d)", self.name) if self.base in ("LDSM", "STSM") else None
        return int(matrices[1]) if matrices else max(1.0, 32 * self.width / 128)

    def fmas(self) -> int:
        """Multiply-adds of a warp (a warp group for HGMMA) in 16-bit operations; 0 if the listing does not say."""
        slow = 2 if ".TF32" in self.name else 1
        if found := re.match(r"HMMA\.(16)(8)(\d+)", self.name):
            return slow * 16 * 8 * int(found[3])
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.name):
            return slow * int(found[1]) * int(found[2]) * int(found[3])
        return 0


def parse(listing: str) -> list[Instruction]:
    """The instructions of one kernel, of `nvdisasm -c`, that its warps can reach while their lanes stay together."""
    lines: list[tuple[int, str, str, bool]] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            pending.append(label[1])
        elif found := _INSTRUCTION.match(line):
            address, name, operands = int(found[1], 16), found[2], found[3]
            labels |= dict.fromkeys(pending, address)
            pending = []
            if name.startswith("CALL") and "`(.L" in operands:
                name = "BRA"  # a jump: no return address is kept
            elif "_trap_" in operands:
                name = "BPT"  # the call of a guard that never returns
            conditional = "@" in line.split(found[2])[0] or (name.startswith("BRA") and "," in operands)
            lines.append((address, name, operands, not conditional))
    code = []
    for address, name, operands, always in lines:
        label = re.search(r"`\((\S+?)\)", operands) if name.startswith(("BRA", "CALL")) else None
        code.append(Instruction(address, name, always, labels.get(label[1]) if label else None))
    return _reached(code)


def _reached(code: list[Instruction]) -> list[Instruction]:
    """Without padding and what only runs if the lanes of a warp diverged."""
    position = {each.address: i for i, each in enumerate(code)}
    seen: set[int] = set()
    waiting = [0]
    while waiting:
        here = waiting.pop()
        if here in seen or here >= len(code):
            continue
        seen.add(here)
        each = code[here]
        together = ".CONV" in each.name  # taken by lanes that are together; .DIV by others
        if each.target in position and ".DIV" not in each.name:
            waiting.append(position[each.target])
        if not together and not (each.always and each.base in ("BRA", "EXIT", "RET")):
            waiting.append(here + 1)
    return [each for i, each in enumerate(code) if i in seen]


@dataclass(frozen=True)
class Listing:
    """A kernel divided into its hot loop and the rest. Without a loop that loads, all of it is `hot`."""

    hot: tuple[Instruction, ...]
    rest: tuple[Instruction, ...]
    rare: tuple[Instruction, ...]  # of the hot loop, but run in few of its iterations
    looped: bool
    nested: bool  # whether the hot loop contains a loop of its own, other than a wait

    def stored(self, warps: int) -> int:
        """Bytes that the warps of a block write to global memory in the hot part."""
        return sum(32 * each.width for each in self.hot if each.base == "STG") * warps

    def fmas(self, warps: int) -> int:
        """Multiply-adds of a block on tensor cores in the hot part, where the listing says."""
        return sum(e.fmas() * warps // (4 if e.base == "HGMMA" else 1) for e in self.hot)


def divide(code: list[Instruction], rare: str = "") -> Listing:
    """Find the hot loop: of the loops with asynchronous copies and products, else with loads and products, else with
    loads, the longest that contains no other.

    Args:
        code: a kernel.
        rare: a pattern of instructions that run in few iterations: the part that a branch skips with them is `rare`.
    """
    loops = _loops(code)

    def has(loop: frozenset[int], kind: str) -> bool:
        return any(code[i].pipe == kind or code[i].base in kind.split() for i in loop)

    wanted = (("LDGSTS UTMALDG", "tensor"), ("LDG", "tensor"), ("LDG LDGSTS",))
    fitting = next(filter(None, ([x for x in loops if all(has(x, kind) for kind in kinds)] for kinds in wanted)), [])
    hot = max((x for x in fitting if not any(other < x for other in fitting)), key=len, default=frozenset())
    body = [code[i] for i in sorted(hot)]
    rest = [each for i, each in enumerate(code) if i not in hot]
    if not hot:
        return Listing(tuple(rest), (), (), False, False)
    first, end = _rare_part(body, rare) if rare else (0, 0)
    skipped, body = body[first:end], body[:first] + body[end:]
    kept = {each.address for each in body}
    nested = any(x < hot and len(x) > _LONGEST_WAIT and all(code[i].address in kept for i in x) for x in loops)
    return Listing(tuple(body), tuple(rest), tuple(skipped), True, nested)


def _loops(code: list[Instruction]) -> list[frozenset[int]]:
    """Positions of the instructions of every natural loop: all that reach a branch back without passing its target."""
    position = {each.address: i for i, each in enumerate(code)}
    before: list[list[int]] = [[] for _ in code]
    for i, each in enumerate(code):
        if each.target in position and each.base != "CALL":
            before[position[each.target]].append(i)
        if i + 1 < len(code) and not (each.always and each.base in ("BRA", "EXIT", "RET")):
            before[i + 1].append(i)
    found: dict[int, frozenset[int]] = {}  # by their first instruction: a loop may branch back from several places
    for last, each in enumerate(code):
        head = position.get(each.target, last)
        if head >= last or each.base == "CALL":
            continue
        loop, reached = {head}, [last]
        while reached:
            here = reached.pop()
            if here not in loop:
                loop.add(here)
                reached += before[here]
        if head == 0 or 0 not in loop:  # else it only returns from code that was moved to the end
            found[head] = found.get(head, frozenset()) | loop
    return list(found.values())


def _rare_part(body: list[Instruction], rare: str) -> tuple[int, int]:
    """What the longest branch skips that skips all instructions of the pattern, no other copy and no product."""
    position = {each.address: i for i, each in enumerate(body)}
    matching = [i for i, each in enumerate(body) if re.search(rare, each.name)]
    kept = [i for i, e in enumerate(body) if (e.base == "LDGSTS" and i not in matching) or e.pipe == "tensor"]
    skips = [(i + 1, position[e.target]) for i, e in enumerate(body) if position.get(e.target, 0) > i]
    skips = [(i, end) for i, end in skips if matching and i <= matching[0] and matching[-1] < end]
    skips = [(i, end) for i, end in skips if not any(i <= one < end for one in kept)]
    return max(skips, key=lambda skip: skip[1] - skip[0], default=(0, 0))


def cycles(code: Iterable[Instruction], target: str, warps: int, fmas: float = 0) -> dict[str, float]:
    """Cycles that a block keeps each pipe of a multiprocessor busy.

    Args:
        code: what each of its warps runs.
        target: a key of `RATES`.
        warps: of the block.
        fmas: of the block on tensor cores, for instructions whose listing does not say (tcgen05).
    """
    rates, code = RATES[target], list(code)
    count = Counter(each.pipe for each in code)
    pairs = sum(each.base in ("FADD2", "FMUL2", "FFMA2") for each in code)
    brain = sum(each.pipe == "half" and ".BF16" in each.name for each in code)
    half = count["half"] - brain + brain * rates.bf16
    fma = (count["fp32"] + pairs) * rates.fp32 + half
    # On 8.0 integers are multiplied by the lanes of float32, later by half of them.
    fma = fma + 2 * count["imad"] if rates.fp32 == 2 else max(fma + count["imad"], 2 * count["imad"])
    by_warp = sum(e.fmas() for e in code if e.base == "HMMA") / (WARP_MMA / 4)
    by_group = sum(e.fmas() for e in code if e.base == "HGMMA") / (rates.group_mma or 1)
    group = any(each.base.startswith("UTC") and each.pipe == "tensor" for each in code)
    per_partition = {
        "issue": len(code),
        "fma": fma,
        "alu": 2 * count["alu"],
        "xu": 8 * count["xu"],
        "tensor": by_warp + by_group,
    }
    found = {pipe: value * warps / 4 for pipe, value in per_partition.items()}
    found["tensor"] += fmas / rates.group_mma if group else 0
    found["shared"] = sum(each.wavefronts for each in code) * warps
    return found


def resident(target: str, warps: int, registers: int, shared: int) -> int:
    """Blocks that fit a multiprocessor: `registers` of a thread, `shared` bytes of a block."""
    of_a_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = 65536 // 4 // of_a_warp * 4 // warps
    return min(by_registers, RATES[target].shared * 1024 // (shared + 1024), 64 // warps, 32)


@dataclass(frozen=True)
class Roofline:
    """What a block needs in one iteration of the hot loop; `rest` is what it needs once."""

    target: str
    streamed: float  # bytes of a block
    cycles: dict[str, float]
    rest: dict[str, float]
    resident: int
    barriers: int
    faults: tuple[str, ...]

    @property
    def pipe(self) -> str:
        """The busiest."""
        return max(self.cycles, key=lambda pipe: self.cycles[pipe])

    @property
    def bound(self) -> float:
        """TB/s of all multiprocessors."""
        rates = RATES[self.target]
        return self.streamed / self.cycles[self.pipe] * rates.multiprocessors * rates.clock / 1e3

    @property
    def ratio(self) -> float:
        """Rate of the memory over the bound: above 1, instructions decide and not the memory."""
        return RATES[self.target].memory / self.bound


def roofline(
    listing: Listing,
    target: str,
    *,
    streamed: float,
    warps: int,
    registers: int,
    shared: int,
    spilled: int = 0,
    pipelined: bool = False,
    fmas: float = 0,
) -> Roofline:
    """The roofline of a kernel.

    Args:
        listing: of `divide`.
        target: a key of `RATES`.
        streamed: bytes that a block moves between memory and chip in one iteration.
        warps: of a block.
        registers: of a thread.
        shared: bytes of a block.
        spilled: bytes of stack of a thread.
        pipelined: whether loads should run ahead of their use, by asynchronous copies.
        fmas: as for `cycles`.
    """
    fits = resident(target, warps, registers, shared)
    faults = [f"{spilled} bytes spilled"] if spilled else []
    if fits < 2:
        faults.append("one block on a multiprocessor" if fits else "no block fits a multiprocessor")
    return Roofline(
        target,
        streamed,
        cycles(listing.hot, target, warps, fmas),
        cycles(listing.rest, target, warps),
        fits,
        sum(each.base == "BAR" for each in listing.hot),
        (*faults, *_faults(listing, pipelined)),
    )


def _faults(listing: Listing, pipelined: bool) -> list[str]:
    """What does not belong in the hot part."""
    names = Counter(each.name for each in listing.hot if _NARROW_SHARED.match(each.name))
    if not listing.looped:
        names = Counter({name: n for name, n in names.items() if n > 1})  # one: an allocation of tensor memory
    names |= Counter(each.base for each in listing.hot if each.base in ("CALL", "LDL", "STL"))
    found = [f"{count} {name}" for name, count in sorted(names.items())]
    if pipelined:
        if waited := sum(each.base == "LDG" and each.width <= 4 for each in listing.hot):
            found.append(f"{waited} loads of at most 4 bytes that are not asynchronous")
        if not any(each.base in ("LDGSTS", "UTMALDG") for each in listing.hot):
            found.append("no asynchronous copy")
    if listing.nested:
        found.append("a loop within the hot loop, counted once")
    return found
