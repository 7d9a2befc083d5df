"""Reads a kernel's machine code: its loops, and what one trip through them costs. No GPU is needed.

A trip is the way from a loop's first instruction back to it that moves the most bytes of rows, and of those the one
with the fewest instructions. So the branch that a new maximum takes, which is rare, and the byte-wise store of a row
that starts between two 16-byte boundaries are not counted; both arms of a predicated instruction are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.+?)\s*;")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
_FOREVER = 1 << 30


def tool(name: str) -> str:
    """cuobjdump or nvdisasm: those that come with Triton, else what is on PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(bundled) if bundled.is_file() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither in this Triton nor on PATH")
    return found


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, dict[str, int]]:
    """Function -> reg, stack, shared and local of its code. A spilled register lives on the stack."""
    lines = _cuobjdump(cubin, "-res-usage").splitlines()
    found = {}
    for name, usage in pairwise(lines):
        if match := re.match(r"\s*Function (\S+):$", name):
            numbers = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)
            found[match[1]] = {key.lower(): int(value) for key, value in numbers}
    return found


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @cached_property
    def words(self) -> list[str]:
        """The opcode and its operands, the predicate left out."""
        words = self.text.split()
        return words[1:] if words[0].startswith("@") else words

    @property
    def predicated(self) -> bool:
        return self.text.startswith("@") and not self.text.startswith("@PT ")

    @property
    def opcode(self) -> str:
        return self.words[0]

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes. BRA.DIV leaves for warps whose threads went different ways, which none does here."""
        if self.base != "BRA" or ".DIV" in self.opcode:
            return None
        match = _TARGET.search(self.text)
        return int(match[1], 16) if match else None

    @property
    def falls_through(self) -> bool:
        if self.base in ("EXIT", "RET"):
            return self.predicated
        # A uniform predicate is an operand: BRA.U UP0, 0x...
        return self.target is None or self.predicated or any(re.match(r"!?U?P\d", word) for word in self.words[1:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that it loads or stores: in 8 or 16 at a time, which no single number per row is."""
        if self.base not in ("LDG", "LDS", "STG", "STS", "LD", "ST", "LDGSTS"):
            return 0
        return next((size for tag, size in ((".256", 32), (".128", 16), (".64", 8)) if tag in self.opcode), 0)

    @property
    def loads(self) -> bool:
        return self.base in ("LDG", "LDS", "LD")

    @property
    def stores(self) -> bool:
        return self.base in ("STG", "STS", "ST")


@dataclass(frozen=True)
class Loop:
    header: int  # block
    latches: tuple[int, ...]
    blocks: frozenset[int]


class Function:
    """The blocks of one function and its natural loops."""

    def __init__(self, name: str, code: list[Instruction]) -> None:
        self.name, self.code = name, code
        starts = {0}
        place = {instruction.address: i for i, instruction in enumerate(code)}
        for i, instruction in enumerate(code):
            if instruction.target is not None:
                starts.add(place[instruction.target])
            if instruction.target is not None or not instruction.falls_through or instruction.base == "EXIT":
                starts.add(i + 1)
        edges = sorted(start for start in starts if start < len(code))
        self.blocks = [code[a:b] for a, b in zip(edges, [*edges[1:], len(code)], strict=True)]
        number = {start: i for i, start in enumerate(edges)}
        self.successors: list[list[int]] = []
        for i, block in enumerate(self.blocks):
            last, after = block[-1], []
            if last.falls_through and i + 1 < len(self.blocks):
                after.append(i + 1)
            if last.target is not None and (to := number[place[last.target]]) not in after:
                after.append(to)
            self.successors.append(after)

    @cached_property
    def predecessors(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.blocks]
        for i, after in enumerate(self.successors):
            for j in after:
                before[j].append(i)
        return before

    @cached_property
    def order(self) -> list[int]:
        """Reachable blocks, each before those that follow it on ways without a turn back."""
        seen, finished, stack = {0}, [], [(0, iter(self.successors[0]))]
        while stack:
            block, rest = stack[-1]
            following = next((s for s in rest if s not in seen), None)
            if following is None:
                finished.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        return finished[::-1]

    @cached_property
    def dominators(self) -> dict[int, frozenset[int]]:
        """Block -> blocks that every way to it passes."""
        everything = frozenset(self.order)
        found = {block: everything for block in self.order} | {0: frozenset({0})}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                before = [found[p] for p in self.predecessors[block] if p in found]
                now = frozenset.intersection(*before) | {block}
                if now != found[block]:
                    found[block], changed = now, True
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        latches: dict[int, list[int]] = {}
        for block in self.order:
            for after in self.successors[block]:
                if after in self.dominators[block]:
                    latches.setdefault(after, []).append(block)
        return [Loop(header, tuple(found), self._body(header, found)) for header, found in sorted(latches.items())]

    def _body(self, header: int, latches: list[int]) -> frozenset[int]:
        body, stack = {header}, list(latches)
        while stack:
            block = stack.pop()
            if block not in body:
                body.add(block)
                stack.extend(p for p in self.predecessors[block] if p in self.dominators)
        return frozenset(body)

    @cached_property
    def innermost(self) -> list[Loop]:
        return [a for a in self.loops if not any(b is not a and b.blocks < a.blocks for b in self.loops)]

    def trip(self, loop: Loop) -> list[Instruction]:
        """One trip: as described above."""
        return self._way(loop.header, loop.latches, loop.blocks)

    def straight(self) -> list[Instruction]:
        """The same for a whole function: from its start to an exit."""
        return self._way(0, self.exits, frozenset(self.order))

    def _way(self, start: int, ends: tuple[int, ...], inside: frozenset[int]) -> list[Instruction]:
        """The way that moves the most bytes of rows, and of those the one with the fewest instructions."""

        def cost(block: int) -> tuple[int, int]:
            code = self.blocks[block]
            return -sum(instruction.row_bytes for instruction in code), len(code)

        return [i for b in self._best(start, ends, inside, cost) for i in self.blocks[b]]

    @cached_property
    def exits(self) -> tuple[int, ...]:
        last = {block: self.blocks[block][-1] for block in self.order}
        return tuple(block for block, i in last.items() if i.base == "EXIT" and not i.predicated)

    def around(self, hot: list[Loop]) -> tuple[int, int]:
        """Instructions outside the hot loops, which a row passes in this order: at least, at most.

        The least is what a warp issues that takes no part in what one thread does for all; the most is the longest way
        that turns back nowhere. Of a function without a loop over rows: from its start to an exit.
        """
        outer = [a for a in self.loops if all(b.blocks < a.blocks for b in hot)]
        row = min(outer, key=lambda a: len(a.blocks)) if outer else Loop(0, self.exits, frozenset(self.order))
        inside = frozenset().union(*(a.blocks for a in hot))
        stops = [row.header, *(loop.header for loop in hot)]
        lengths = []
        for sign in (1, -1):

            def cost(block: int, sign: int = sign) -> tuple[int, int]:
                return 0, 0 if block in inside else sign * len(self.blocks[block])

            whole = cost(row.header)[1]
            for start, to in zip(stops, [(stop,) for stop in stops[1:]] + [row.latches], strict=True):
                whole += sum(cost(block)[1] for block in self._best(start, to, row.blocks, cost)[1:])
            lengths.append(sign * whole)
        return lengths[0], lengths[1]

    def _best(self, start: int, ends: tuple[int, ...], inside: frozenset[int], cost) -> list[int]:
        """The cheapest way from `start` to one of `ends` that turns back nowhere."""
        never = (_FOREVER, _FOREVER)
        best: dict[int, tuple[tuple[int, int], list[int]]] = {start: (cost(start), [start])}
        for block in self.order:
            if block not in best:
                continue
            (first, second), way = best[block]
            for after in self.successors[block]:
                if after not in inside or after in self.dominators[block]:
                    continue
                more = cost(after)
                total = (first + more[0], second + more[1])
                if total < best.get(after, (never, []))[0]:
                    best[after] = (total, [*way, after])
        return min((best[end] for end in ends if end in best), default=(never, []))[1]


def functions(cubin: bytes) -> dict[str, Function]:
    """Every function of a cubin, by its linker name."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in _cuobjdump(cubin, "-sass").splitlines():
        if match := _FUNCTION.match(line):
            code = found.setdefault(match[1], [])
        elif match := _INSTRUCTION.match(line):
            code.append(Instruction(int(match[1], 16), match[2]))
    return {name: Function(name, code) for name, code in found.items()}


# --- what an instruction is for, and which unit it keeps busy

_CLASSES = {
    "fp32": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2"),
    "max, select": ("FMNMX", "FMNMX3", "HMNMX2", "VHMNMX", "FSETP", "FSEL", "FSET", "PLOP3", "P2R", "R2P"),
    "convert": ("PRMT", "LOP3", "SHF", "F2F", "F2FP", "HADD2", "HMUL2", "I2F", "F2I"),
    "memory": ("LDG", "STG", "LDS", "STS", "LD", "ST", "LDGSTS"),
}
_CLASS_OF = {base: name for name, bases in _CLASSES.items() for base in bases}
CLASSES = ("exp", "fp32", "max, select", "convert", "memory", "other")


def class_of(instruction: Instruction) -> str:
    if instruction.opcode.startswith("MUFU.EX2"):
        return "exp"
    # A left shift of a half by 16 bits, which makes it a float.
    if instruction.base == "IMAD" and instruction.opcode.startswith(("IMAD.U32", "IMAD.SHL")):
        return "convert"
    return _CLASS_OF.get(instruction.base, "other")


def classes(code: list[Instruction]) -> Counter[str]:
    return Counter(class_of(instruction) for instruction in code)


def busy_cycles(code: list[Instruction], capability: int) -> dict[str, int]:
    """Cycles for which these instructions of one warp hold a scheduler's units.

    A scheduler issues one instruction per cycle to 32 threads; a unit of 16 lanes then needs two cycles, the
    special-function unit with its four needs eight. sm_80 has 16 fp32 lanes, later architectures 32.
    """
    busy = Counter(issue=len(code))
    for instruction in code:
        base = instruction.base
        if base in ("MUFU", "F2F", "I2F", "F2I"):
            busy["special"] += 8
        elif base in ("FADD", "FMUL", "FFMA"):
            busy["fp32"] += 2 if capability < 86 else 1
        elif base in ("FADD2", "FMUL2", "FFMA2", "IMAD"):
            busy["fp32"] += 2
        elif class_of(instruction) in ("max, select", "convert") or base in ("ISETP", "SEL", "LEA", "IADD3", "VIADD"):
            busy["integer"] += 2
    return dict(busy)
