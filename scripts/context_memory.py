"""Peak memory of a learner step over the length of one sequence, on this CPU, beside what the memory plan says.

python scripts/context_memory.py smollm2-135m 2048 4096 8192 16384
python scripts/context_memory.py random:4 2048 4096 8192 16384        SmolLM2's widths with 4 layers

A row per length: one sequence, half prompt and half completion, bf16, gradient checkpointing, AdamW. Measured is the
growth of the process's resident memory since before the model was loaded, at its highest so far.
"""

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import TrainingSample
from igrpo.learner.learner import Learner
from igrpo.machine import peak_resident, this_machine
from igrpo.models.loading import load_policy, resolve_model
from igrpo.plan.memory import GIB, memory_plan
from igrpo.plan.shapes import model_shape


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def load(name: str, config: TrainConfig) -> Any:
    if not name.startswith("random:"):
        return load_policy(resolve_model(name), config)
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=int(name.partition(":")[2]),
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2**15,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or folder, or random:LAYERS")
    parser.add_argument("lengths", nargs="+", type=int, metavar="LENGTH", help="tokens of the sequence, 2 or more")
    options = parser.parse_args()
    measure(options.model, options.lengths)


def measure(name: str, lengths: list[int]) -> None:
    config = TrainConfig(
        model_name_or_path=name, dataset_name="unused", use_cpu=True, bf16=True, gradient_checkpointing=True,
        token_budget=1, vllm_mode="server",
    )  # fmt: skip
    before = resident()
    model = load(name, config)
    learner = Learner(model, None, config, pad_token_id=0)
    learner.set_schedule(100)
    shape = model_shape(model.config.to_dict())
    print("| tokens | measured, GiB | plan, GiB | plan / measured | seconds |\n|--:|--:|--:|--:|--:|")
    for length in lengths:
        ids = tuple(torch.randint(5, 1000, (length,)).tolist())
        half = length // 2
        sample = TrainingSample(ids[:half], ids[half:], (-5.0,) * (length - half), 1.0)
        start = time.perf_counter()
        learner.train_on([sample])
        seconds = time.perf_counter() - start
        measured = peak_resident() - before
        plan = memory_plan(shape, config, this_machine(use_cpu=True), context=length).total
        print(
            f"| {length:,} | {measured / GIB:.2f} | {plan / GIB:.2f} | {plan / measured:.2f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
