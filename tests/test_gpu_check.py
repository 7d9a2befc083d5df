"""A visit to a GPU, without one: its order, its clock, and what is on disk when it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from scripts import gpu_check

ROOT = Path(__file__).resolve().parents[1]


def test_a_visit_has_its_order_and_its_clock(tmp_path):
    """Stages as short programs: rows are on disk while one runs, and what takes too long ends."""
    part, output = tmp_path / "part.json", tmp_path / "record.json"
    rows = f"import json, pathlib, time; pathlib.Path({str(part)!r}).write_text(json.dumps({{'rows': [{{'n': 1}}]}}))"
    seen = f"import json; assert json.load(open({str(output)!r}))['rows'] == [{{'n': 1}}]"
    python = [sys.executable, "-c"]
    grandchild = tmp_path / "grandchild"
    starts = "import subprocess; one = subprocess.Popen(['sleep', '60']); "
    starts += f"open({str(grandchild)!r}, 'w').write(str(one.pid))"
    stages = [
        gpu_check.Stage("decide", [*python, f"{starts}; {rows}; time.sleep(60)"], 3, part),
        gpu_check.Stage("look", [*python, seen], 20),
        gpu_check.Stage("rest", [*python, "import time; time.sleep(60)"], 1e9),
        gpu_check.Stage("never", [*python, ""], 1e9),
    ]
    record = {"stages": [], "parts": {}}
    start = time.monotonic()
    assert gpu_check.run_stages(stages, 9, record, output) == 1
    assert time.monotonic() - start < 15
    written = json.loads(output.read_text())
    assert [(stage["name"], stage["exit_status"]) for stage in written["stages"]] == [
        ("decide", gpu_check.CUT_OFF), ("look", 0), ("rest", gpu_check.CUT_OFF),
    ]  # fmt: skip
    assert written["rows"] == [{"n": 1}]
    assert not running(int(grandchild.read_text())), "what a stage started outlives it"


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_build_of_a_visit_is_for_its_device_with_the_lists_nvcc_and_may_not_fail(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import setup_env

    nvcc = tmp_path / "lib/python3.12/site-packages/nvidia/cu13/bin/nvcc"
    monkeypatch.setattr(setup_env, "VENV", tmp_path)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    own = {"IGRPO_BUILD_CUDA": "1", "IGRPO_REQUIRE_EXT": "1", "IGRPO_CUDA_ARCHS": "90a"}
    assert gpu_check.architecture(dry=False) == own, "without an nvcc of its own: the machine's"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch()
    found = gpu_check.architecture(dry=False)
    assert found.items() >= own.items() and found["PATH"].split(":")[0] == str(nvcc.parent)
    assert found["LIBRARY_PATH"].split(":")[0] == str(nvcc.parent.parent / "lib")


def test_a_visit_to_a_gpu_is_planned_in_the_order_of_what_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check, "architecture", lambda dry: {"IGRPO_CUDA_ARCHS": "90a"})
    stages = gpu_check.plan(gpu_check.parse(), tmp_path)
    assert [stage.name for stage in stages] == ["build", "correct", "decide", "learner", "rest"]
    assert sum(stage.seconds for stage in stages[:-1]) < 9 * 60 - 60, "a minute at least for the rest"
    decided = [word.partition("::")[2] for word in stages[2].command if "::" in word]
    assert len(decided) == 9 and [name.rpartition("-")[2] for name in decided[:2]] == ["token]", "token]"]
    assert {name.rpartition("-")[2] for name in decided} == {
        "token]", "kl]", "gspo]", "entropy_bonus]", "frozen_head]",
    }  # fmt: skip


def test_the_learners_steps_of_a_visit_run_anywhere(tmp_path):
    output = tmp_path / "part.json"
    command = [sys.executable, ROOT / "scripts" / "gpu_check.py", "--dry-run", "--learner", output]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(output.read_text())["learner"]["seconds"]) == 2
