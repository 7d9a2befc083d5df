"""The count of machine instructions: that it counts right, and that our kernels have not grown."""

import json
import shutil
from dataclasses import fields

import pytest

pytest.importorskip("triton")

from benchmarks import sass
from benchmarks.machine_code import Function, Instruction, busy_cycles, classes, functions, resources
from benchmarks.sass_kernels import cuda_paths, nvcc, triton_paths

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
RECORD = json.loads(sass.RECORD.read_text(encoding="utf-8"))
ALLOWANCE = 0.25  # instructions per logit

KNOWN_LOOP = """
__global__ void known_kernel(const uint4* x, float* y, int n) {
  float s = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 32) {
    const uint4 bits = x[i];
    const unsigned v[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float e;
      asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(__uint_as_float(v[j])));
      asm volatile("fma.rn.f32 %0, %1, %1, %0;" : "+f"(s) : "f"(e));
    }
    if (s > 1e30f) {  // rare: not on the way of a trip
#pragma unroll
      for (int j = 0; j < 50; ++j) asm volatile("mul.rn.f32 %0, %0, %0;" : "+f"(s));
    }
  }
  y[threadIdx.x] = s;
}
"""


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_known_loop_is_counted_right(capability):
    cubin = nvcc(KNOWN_LOOP, capability)
    ((name, function),) = functions(cubin).items()
    (loop,) = function.innermost
    trip = function.trip(loop)
    found = classes(trip)
    assert found["exp"] == 4 and found["memory"] == 1
    assert found["fp32"] == 4  # the rare branch's fifty are left out
    assert sum(i.base == "FMUL" for block in function.blocks for i in block) == 50
    assert len(trip) - 9 <= 11, [i.text for i in trip]  # addresses, counter, compares and branches
    assert busy_cycles(trip, capability)["special"] == 4 * 8
    (reading,), storing = sass.phases(function)
    assert reading.logits == 8 and not storing
    assert resources(cubin)[name]["reg"] > 0 and resources(cubin)[name]["stack"] == 0


def listing(*lines: str) -> Function:
    """A function from its instructions, each 16 bytes long."""
    return Function("made up", [Instruction(16 * i, text) for i, text in enumerate(lines)])


def test_ways_around_and_through_a_loop():
    """A row loop with a hot loop in it, work of one thread before it, and an arm that is out of line."""
    function = listing(
        "MOV R1, R2",
        "ISETP.GE P0, PT, R1, R2, PT",  # 0x10, the row loop
        "@P0 BRA 0x50",
        "MOV R3, R3",  # one thread only
        "MOV R4, R4",
        "LDS.128 R4, [R1]",  # 0x50, the hot loop
        "@P1 BRA 0xd0",
        "MUFU.EX2 R5, R4",  # 0x70
        "@P2 BRA 0x50",
        "BAR.SYNC 0x0",
        "@P3 BRA 0x10",
        "@P4 EXIT",
        "BRA 0xc0",  # padding, as ptxas leaves it
        "FMUL R4, R4, R4",  # 0xd0: a new maximum
        "BRA 0x70",
    )
    inner, outer = sorted(function.loops[:2], key=lambda loop: len(loop.blocks))
    assert [i.text for i in function.trip(inner)] == [
        "LDS.128 R4, [R1]", "@P1 BRA 0xd0", "MUFU.EX2 R5, R4", "@P2 BRA 0x50",
    ]  # fmt: skip
    assert inner.blocks < outer.blocks
    assert function.around([inner]) == (4, 6)
    assert function.blocks[outer.header][0].address == 0x10


def test_the_page_has_a_line_for_everything_that_was_counted():
    rows = [sass.Row(**row) for row in RECORD["rows"]]
    page = "\n".join(sass.section())
    for row in rows:
        assert f"| {row.name}{'' if row.variant == 'plain' else ', ' + row.variant} |" in page
    assert {row.capability for row in rows} == set(sass.CAPABILITIES)
    assert {row.name for row in rows} >= {"cuda, cluster", "cuda, resident", "triton, one launch", "liger", "trl"}


def check_against_record(paths, capability):
    """No phase of ours has more instructions per logit than the record says."""
    if sass.compilers() != RECORD["compilers"]:
        pytest.skip(f"the record is of {RECORD['compilers']}, here are {sass.compilers()}")
    recorded = {(r["name"], r["variant"], r["capability"]): sass.Row(**r) for r in RECORD["rows"]}
    grown = []
    for path in paths:
        now = sass.count(path, capability)
        then = recorded[path.name, path.variant, capability]
        for part in ("statistics", "gradient", "bonus", "row", "total"):
            more = getattr(now, part) - getattr(then, part)
            if more > ALLOWANCE:
                kinds = {k: round(v - then.classes[k], 2) for k, v in now.classes.items() if v - then.classes[k] > 0.05}
                grown.append(
                    f"sm_{capability} {path.name}, {path.variant}: {part} +{more:.2f} per logit; more of {kinds}"
                )
        # Fewer warps hide less latency.
        if min(now.warps) < min(then.warps):
            grown.append(f"sm_{capability} {path.name}, {path.variant}: {now.warps} warps, were {then.warps}")
    assert not grown, "\n".join([*grown, "python -m benchmarks.sass --record, if that is meant"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_nvcc  # the record names its version
@pytest.mark.parametrize("capability", sass.CAPABILITIES)
def test_no_kernel_on_any_architecture_has_grown(capability):
    check_against_record([*cuda_paths(capability), *triton_paths(capability)], capability)


@needs_nvcc
def test_a_kernel_that_grew_is_named(monkeypatch):
    """The check above can fail: the same kernels against a record with fewer instructions."""
    smaller = [r | {"statistics": r["statistics"] - 1.0} for r in RECORD["rows"]]
    monkeypatch.setitem(RECORD, "rows", smaller)
    known = {field.name: value for field in fields(sass.Row) for value in [None]}
    row = next(sass.Row(**(known | r)) for r in RECORD["rows"] if r["name"] == "triton, one launch")
    monkeypatch.setattr(sass, "count", lambda *_: sass.Row(**(vars(row) | {"statistics": row.statistics + 1.0})))
    path = type("Path", (), {"name": row.name, "variant": row.variant})
    with pytest.raises(AssertionError, match=r"triton, one launch, plain: statistics \+1.00 per logit"):
        check_against_record([path], row.capability)
