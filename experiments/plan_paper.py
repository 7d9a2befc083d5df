"""The paper's resource table, worked out with the formulas of ``igrpo plan``, and how far off they are: a table of
docs/scaling.md.

arXiv 2602.09000, appendix D: DeepSeek-R1-Distill-Qwen-7B on MATH (7,500 problems, one epoch), 2 x 8 A100-80GB of which
one node runs vLLM, 16 completions per device and micro-batch, 8 micro-batches, completions of at most 2,048 tokens,
budget 8. The paper's program is not this one: it is taken to pad every sequence, to share no prefix and to hold the
logits of a whole micro-batch. What the paper leaves open is a named constant or said in a docstring here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from igrpo.config.train_config import TrainConfig
from igrpo.plan.generation import Lengths
from igrpo.plan.hardware import DEVICES, GUESSED, Hardware, Rates
from igrpo.plan.memory import activation_bytes_per_token
from igrpo.plan.models import table_shape
from igrpo.plan.shapes import ModelShape
from igrpo.plan.workload import Workload

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"
PROBLEMS, PROMPTS, QUESTION, LIMIT, PER_DEVICE = 7500, 128, 150, 2048, 16
MEAN_LENGTH = 1100
"""Assumed: the paper gives none for this run; reasoning models on MATH, cut at 2,048."""
PUBLISHED = {
    "GRPO": {"memory": 54.9286, "samples": 0.41, "hours": 83.3},
    "iGRPO": {"memory": 54.9349, "samples": 0.34, "hours": 94.1},
}


@dataclass(frozen=True)
class PaperRow:
    name: str
    step: float
    hours: float
    samples: float
    memory: float


def paper_rows() -> tuple[list[PaperRow], list[PaperRow]]:
    """GRPO and iGRPO as predicted with default rates, and again with the learner's rate fitted to GRPO's GPU-hours."""
    default = _rows(GUESSED)
    target = PUBLISHED["GRPO"]["hours"] * 3600 / 16 / (PROBLEMS / PROMPTS)
    grpo = _workload(GUESSED).step("GRPO", "barrier", 0, 8)
    scale = (target - grpo.drafts - grpo.refinements - grpo.sync) / _padded_learner(GUESSED, 0, 8)
    return default, _rows(replace(GUESSED, learner_scale=scale))


def _rows(rates: Rates) -> list[PaperRow]:
    work = _workload(rates)
    rows = []
    for name, N, G in (("GRPO", 0, 8), ("iGRPO", 4, 4)):
        step = work.step(name, "barrier", N, G)
        seconds = step.drafts + step.refinements + step.sync + _padded_learner(rates, N, G)
        hours = seconds * PROBLEMS / PROMPTS * 16 / 3600
        rows.append(PaperRow(name, seconds, hours, PROMPTS / seconds, _memory(work.shape, N)))
    return rows


def _workload(rates: Rates) -> Workload:
    shape = table_shape(MODEL)
    config = TrainConfig(
        model_name_or_path=MODEL, dataset_name="MATH", per_device_train_batch_size=PER_DEVICE,
        gradient_accumulation_steps=8, num_drafts=4, num_generations=4, max_completion_length=LIMIT,
        shared_prefix=False, vllm_max_num_seqs=256,
    )  # fmt: skip
    lengths = Lengths(QUESTION, MEAN_LENGTH, LIMIT)
    return Workload(shape, config, Hardware(DEVICES["A100-80G"], 16, 8), lengths, rates, prompts=PROMPTS)


def _padded(N: int) -> int:
    """Tokens of one padded row: every micro-batch of 16 is as wide as its longest member, near the limit."""
    return QUESTION + LIMIT + (30 + LIMIT if N else 0)


def _padded_learner(rates: Rates, N: int, G: int) -> float:
    work = _workload(rates)
    real = work.prefix(N) + work.lengths.mean
    return work.learner_seconds(N, G) * _padded(N) / real


def _memory(shape: ModelShape, N: int) -> float:
    """GB on one of 8 learning GPUs: weights, gradients and Adam in shards, layer inputs, one layer, whole logits.

    The logits are of completion tokens only, in bf16 with a gradient of the same size; that the published figure hardly
    grows with a draft in the prompt needs the prompt to be cropped, so the rows here have the same width.
    """
    tokens = PER_DEVICE * (QUESTION + LIMIT)
    sharded = (4 + 8 + 2 + 2) * shape.parameters / 8
    gathered = 2 * 2 * shape.layer_parameters + 2 * shape.vocab_size * shape.hidden_size
    layer_inputs = 2 * tokens * shape.hidden_size * shape.num_layers
    one_layer = tokens * activation_bytes_per_token(shape, bf16=True)
    logits = 2 * 2 * PER_DEVICE * LIMIT * shape.vocab_size
    return (sharded + gathered + layer_inputs + one_layer + logits) / 1e9


def lines() -> list[str]:
    """The comparison as a Markdown table with the errors."""
    default, fitted = paper_rows()
    head = ["| | paper | predicted | error | learner's rate fitted to GRPO | error |", "|---|--:|--:|--:|--:|--:|"]
    rows = []
    for kind, unit in (("hours", "GPU-h"), ("samples", "samples/s"), ("memory", "peak GB")):
        for one, two in zip(default, fitted, strict=True):
            real = PUBLISHED[one.name][kind]
            a, b = getattr(one, kind), getattr(two, kind)
            rows.append(
                f"| {one.name} {unit} | {real:g} | {a:.3g} | {a / real - 1:+.0%} | {b:.3g} | {b / real - 1:+.0%} |"
            )
    ratio = PUBLISHED["iGRPO"]["hours"] / PUBLISHED["GRPO"]["hours"]
    a, b = (pair[1].hours / pair[0].hours for pair in (default, fitted))
    rows.append(f"| iGRPO / GRPO | {ratio:.3f} | {a:.3f} | {a / ratio - 1:+.1%} | {b:.3f} | {b / ratio - 1:+.1%} |")
    return [*head, *rows]
