"""Weights on their way through shared memory: nobody else's are deleted, one's own leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from igrpo.engines import EngineError
from igrpo.engines.servers.push import publish
from igrpo.engines.weight_folder import PREFIX, SHARED_MEMORY, weight_folder
from igrpo.settings import ConfigError

ROOT = Path(__file__).resolve().parents[2]
OTHER = """
import os, sys
from pathlib import Path
from igrpo.engines.weight_folder import weight_folder
folder = weight_folder(None)
(folder / "weights").write_text("of a run that is killed")
print(folder, Path(sys.argv[1]).is_dir(), os.getpid(), flush=True)
os._exit(9)  # at once, with nothing tidied: the first process of a container takes no SIGKILL from inside
"""


@pytest.mark.parametrize("namespace", [["unshare", "-rpf", "--mount-proc"], []], ids=["container", "same machine"])
def test_a_live_runs_weights_stay_and_a_killed_ones_go(namespace):
    """The other run is in a container of its own, which shares the memory and sees none of our processes."""
    if namespace and subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    ours = weight_folder(None)
    try:
        other = [*namespace, sys.executable, "-c", OTHER, str(ours)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(other, capture_output=True, text=True, cwd=ROOT, timeout=100, env=environment)
        theirs, seen, pid = done.stdout.split()
        assert done.returncode == 9, done.stderr
        assert seen == "True" and ours.is_dir() and Path(theirs).is_dir()
        assert pid == "1" or not namespace  # a number that belongs to another process here
        again = weight_folder(None)
        again.rmdir()
        assert ours.is_dir() and not Path(theirs).exists()
    finally:
        ours.rmdir()


def test_the_folder_is_for_this_user_and_so_is_what_is_cleared_away(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("not weights")
    link, file = SHARED_MEMORY / f"{PREFIX}999999999-link", SHARED_MEMORY / f"{PREFIX}999999999-file"
    strange = SHARED_MEMORY / f"{PREFIX}999999999-strange"
    strange.mkdir()
    link.symlink_to(precious)
    file.write_text("")
    try:
        if os.getuid() == 0:
            os.chown(strange, 4321, 4321)
        folder = weight_folder(None)
        assert folder.stat().st_mode & 0o777 == 0o700 and folder.stat().st_uid == os.getuid()
        folder.rmdir()
        assert (precious / "file").is_file() and link.is_symlink() and file.is_file()
        assert strange.is_dir() == (os.getuid() == 0)
    finally:
        link.unlink()
        file.unlink()
        strange.rmdir()


def test_no_room_or_no_folder_is_a_sentence(small_disk, tmp_path):
    def source():
        yield "small", torch.zeros(1000)
        yield "large", torch.zeros(1 << 20)

    folder = weight_folder(str(small_disk))
    with pytest.raises(EngineError, match=r"version 3 could not be written to .*No space left.*vllm_weight_dir"):
        publish(source, 3, folder)
    with pytest.raises(EngineError, match=r"version 3 could not be written to .*No space left.*vllm_weight_dir"):
        publish(source, 3, folder, {"r": 1, "lora_alpha": 1})
    assert list(folder.iterdir()) == []  # what was written made way again
    folder.rmdir()
    with pytest.raises(EngineError, match="version 4 could not be written"):
        publish(source, 4, folder)
    (tmp_path / "file").write_text("")
    for chosen in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(ConfigError, match="vllm_weight_dir: no folder for the weights can be made in"):
            weight_folder(str(chosen))
