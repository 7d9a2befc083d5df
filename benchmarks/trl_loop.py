"""TRL's GRPOTrainer in a whole loop with this project's vLLM engine: the same sampler, prompts, budget and rewards.

    python -m benchmarks.trl_loop --steps 7 --prompts 4 --output steps.json '{"model_name_or_path": …}'

TRL asks for completions through its `rollout_func`; they come from the engine that `igrpo train` uses, which first gets
TRL's weights, as TRL does it once per step. All else is TRL's. `benchmarks.rollouts` runs this in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GROUP = 8


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("settings", type=json.loads, help="keys of TrainConfig, as JSON")
    arguments = parser.parse_args(argv)
    found = run(arguments.settings, arguments.steps, arguments.prompts)
    arguments.output.write_text(json.dumps(found), encoding="utf-8")
    return 0


def run(settings: dict[str, Any], steps: int, prompts: int) -> list[dict[str, float]]:
    """Per step: `rollout/seconds` (completions alone), `step_time`, tokens and samples, under the loop's names."""
    from igrpo.config.train_config import TrainConfig
    from igrpo.data.sources import load_problems
    from igrpo.engines import start_engine
    from igrpo.models.loading import load_tokenizer, resolve_model, stop_token_ids
    from igrpo.rollout.prompts import PromptBuilder

    batch = {"per_device_train_batch_size": prompts * GROUP, "num_generations": GROUP}
    config = TrainConfig(**{**settings, **batch}, algorithm="grpo", use_cpu=not cuda())
    path = resolve_model(config.model_name_or_path)
    tokenizer = load_tokenizer(path, config)
    builder = PromptBuilder(tokenizer, config)
    problems = load_problems(config.dataset_name)
    ids = {problem.prompt: builder.parts(problem).bare for problem in (problems[i] for i in range(len(problems)))}
    length = max(map(len, ids.values())) + config.max_completion_length
    engine = start_engine(path, config, length, stop_token_ids(path, tokenizer, config), config.seed)
    try:
        return train(path, config, engine, ids, steps)
    finally:
        engine.close()


def train(path: str, config: Any, engine: Any, ids: dict[str, tuple[int, ...]], steps: int) -> list[dict[str, float]]:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks.rewards import even_length
    from igrpo.engines import Request, Sampling

    sampling = Sampling(config.temperature, config.max_completion_length)
    found: list[dict[str, float]] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list]:
        engine.push_weights(lambda: weights(trainer.model, config.bf16), trainer.state.global_step + 1)
        start = time.perf_counter()
        unique = list(dict.fromkeys(prompts))
        for i, prompt in enumerate(unique):
            engine.submit(Request(str(i), ids[prompt], prompts.count(prompt), sampling))
        done: dict[str, Any] = {}
        while len(done) < len(unique):
            done |= {result.request_id: result for result in engine.poll()}
        found.append({"rollout/seconds": time.perf_counter() - start})
        outputs = {prompt: done[str(i)] for i, prompt in enumerate(unique)}
        queues = {prompt: zip(o.token_ids, o.logprobs, strict=True) for prompt, o in outputs.items()}
        pairs = [next(queues[prompt]) for prompt in prompts]
        found[-1] |= {"rollout/refinement_tokens": sum(len(t) for t, _ in pairs), "rollout/draft_tokens": 0}
        found[-1]["rollout/samples_per_second"] = len(pairs) / found[-1]["rollout/seconds"]
        return {"prompt_ids": [list(ids[p]) for p in prompts], "completion_ids": [list(t) for t, _ in pairs],
                "logprobs": [list(x) for _, x in pairs]}  # fmt: skip

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found[-1] |= {"step_time": time.perf_counter() - self.start, "peak_memory_gib": peak_memory_gib()}

    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=steps, use_cpu=config.use_cpu, bf16=config.bf16, loss_type="grpo",
            gradient_checkpointing=config.gradient_checkpointing, num_generations=GROUP, temperature=config.temperature,
            max_completion_length=config.max_completion_length, learning_rate=config.learning_rate, save_strategy="no",
            per_device_train_batch_size=config.per_device_train_batch_size, logging_steps=1000, report_to="none",
            disable_tqdm=True, seed=config.seed,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": list(ids)})
        trainer = GRPOTrainer(path, even_length, args, data, rollout_func=rollout)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())
        trainer.train()
    return found


def weights(model: Any, bf16: bool) -> Iterator[tuple[str, Any]]:
    """Names and tensors in the engine's dtype, as our learner sends them."""
    import torch

    for name, parameter in model.named_parameters():
        yield name, parameter.detach().to(torch.bfloat16 if bf16 else torch.float32)


def cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def peak_memory_gib() -> float:
    """As the learner counts it: of the accelerator where there is one, else of this process."""
    import torch

    from igrpo.machine import peak_resident

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident() / 2**30


if __name__ == "__main__":
    sys.exit(main())
