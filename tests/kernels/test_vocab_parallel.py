"""`process_group=`: a vocabulary spread over two and three gloo ranks gives the one-rank result, on every rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.vocab_parallel_ranks import cases


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of three processes found, case by case; Triton's kernels run interpreted there."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.vocab_parallel_ranks"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"cwd": Path(__file__).parents[2], "env": environment, "text": True}
    ranks = [
        subprocess.Popen([*command, str(rank), str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        for rank in range(3)
    ]
    try:
        answers = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, answers, strict=True):
        assert rank.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in answers]


@pytest.mark.parametrize("case", cases())
def test_every_rank_has_the_one_rank_result(results, case):
    answers = {rank: found[case] for rank, found in enumerate(results) if case in found}
    if all(answer.startswith("skip") for answer in answers.values()):
        pytest.skip(answers[0])
    assert answers == dict.fromkeys(answers, "ok") and len(answers) == int(case.split()[1])
