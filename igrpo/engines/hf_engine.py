"""Hugging Face ``generate`` behind the engine protocol: slower than vLLM, but runs wherever transformers does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from igrpo.data_types import Kept
from igrpo.engines.base import EngineError, Request, Result, Sampling, WeightSource
from igrpo.engines.config import EngineConfig
from igrpo.engines.routes import read_routes
from igrpo.models.rotary import pin_rotary
from igrpo.models.routers import Routers

NOTHING_ELSE = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""generate's own truncation, switched off."""


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Temperature and truncation in the order in which generate would apply them."""
    if sampling.temperature == 0:
        return []
    return [
        TemperatureLogitsWarper(float(sampling.temperature)),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1.0 else []),
        *([MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ]


class _Recorder(LogitsProcessor):
    """Comes last, so it sees the distribution that is sampled from. Keeps the tokens' own [R] log-probabilities alone:
    generate's ``output_scores`` would keep [R, V] for each of them, gigabytes for a real vocabulary."""

    def __init__(self, masks: bool) -> None:
        self._columns: list[torch.Tensor] = []
        self._distribution: torch.Tensor | None = None
        self._masks = masks
        self.kept: list[tuple[list[int], ...]] = []
        """[T][R] token ids that were left to choose from, with ``masks``."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._note(input_ids)
        if self._masks:
            left = scores > -torch.inf
            ids = left.nonzero()[:, 1].tolist()
            ends = left.sum(-1).cumsum(0).tolist()
            self.kept.append(tuple(ids[start:end] for start, end in pairwise([0, *ends])))
        self._distribution = scores.float().log_softmax(-1)  # [R, V], of the token that comes next
        return scores

    def _note(self, input_ids: torch.Tensor) -> None:
        if self._distribution is not None:
            self._columns.append(self._distribution.gather(-1, input_ids[:, -1:]))

    def logprobs(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[R, T], once all tokens are drawn."""
        self._note(input_ids)
        return torch.cat(self._columns, dim=1)


class HFEngine:
    """See ``igrpo.engines.base.Engine``. Holds its own copy of the weights, as any engine does."""

    def __init__(
        self,
        path: str,
        config: EngineConfig,
        max_model_length: int,
        stop_token_ids: Sequence[int],
        seed: int,
        masks: bool = False,
        adapter: Mapping[str, Any] | None = None,
        routes: bool = False,
    ):
        self.path, self.config, self.masks, self.adapter = path, config, masks, adapter
        self.max_model_length = max_model_length
        self.stop_token_ids = list(stop_token_ids)
        self.routes = routes
        self._waiting: list[Request] = []
        self.restart()
        self.seed(seed)

    def restart(self) -> None:
        config = self.config
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            self.path, revision=config.model_revision or "main", trust_remote_code=config.trust_remote_code, dtype=dtype
        ).eval()
        # The model's own sampling defaults, a repetition penalty for example, would not be the policy's distribution.
        self.model.generation_config = GenerationConfig()
        pin_rotary(self.model, self.max_model_length)
        self.model.to("cpu" if config.use_cpu or not torch.cuda.is_available() else "cuda")
        self._routers = Routers(self.model) if self.routes else None
        self.version = 0

    def submit(self, request: Request) -> None:
        if len(request.prompt_ids) + request.sampling.max_tokens > self.max_model_length:
            raise EngineError(
                f"{request.request_id}: {len(request.prompt_ids)} prompt + {request.sampling.max_tokens} completion "
                f"tokens exceed the context of {self.max_model_length}"
            )
        self._waiting.append(request)

    @torch.no_grad()
    def poll(self) -> list[Result]:
        """Finishes every waiting request that has the first one's settings, as one left-padded batch."""
        if not self._waiting:
            return []
        first = self._waiting[0]
        batch = [r for r in self._waiting if r.sampling == first.sampling and r.n == first.n]
        self._waiting = [r for r in self._waiting if r not in batch]
        ids, mask = self._left_padded([r.prompt_ids for r in batch for _ in range(r.n)])
        recorder = _Recorder(masks=self.masks and first.sampling.truncates)
        if self._routers is not None:
            self._routers.note()
        whole = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=first.sampling.max_tokens,
            do_sample=first.sampling.temperature > 0,
            logits_processor=LogitsProcessorList([*_warpers(first.sampling), recorder]),
            **NOTHING_ELSE,
            eos_token_id=self.stop_token_ids,
            pad_token_id=self.stop_token_ids[0],
            use_cache=True,
        )
        tokens = whole[:, ids.shape[1] :]  # [R, T]
        chosen = recorder.logprobs(whole)
        kept = list(zip(*recorder.kept, strict=True))  # [R][T]
        results = [self._result(r, *(x[i * r.n : (i + 1) * r.n] for x in (tokens, chosen, kept)))
                   for i, r in enumerate(batch)]  # fmt: skip
        return results if self._routers is None else self._with_routes(results, len(ids), ids.shape[1])

    def _with_routes(self, results: list[Result], rows: int, longest: int) -> list[Result]:
        """What the routers have noted of ``rows`` sequences, whose prompts were padded to ``longest`` tokens."""
        each, made = iter(self._routers.of_rows(rows).numpy()), []  # (tokens, layers, k)
        for result in results:
            first = longest - len(result.prompt_ids)
            own = (next(each)[first : longest + len(ids) - 1] for ids in result.token_ids)
            made.append(replace(result, routes=tuple(map(read_routes, own))))
        return made

    def _result(
        self, request: Request, tokens: torch.Tensor, logprobs: torch.Tensor, kept: Sequence[Sequence[list[int]]]
    ) -> Result:
        ids, values, reasons = [], [], []
        for row, row_logprobs in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            stop = next((t for t, token in enumerate(row) if token in self.stop_token_ids), None)
            length = len(row) if stop is None else stop + 1
            ids.append(tuple(row[:length]))
            values.append(tuple(row_logprobs[:length]))
            reasons.append("length" if stop is None else "stop")
        return Result(
            request.request_id, request.prompt_ids, tuple(ids), tuple(values), tuple(reasons), self.version, 0,
            tuple(Kept.of(sets[: len(row)]) for sets, row in zip(kept, ids, strict=True)) if kept else None,
        )  # fmt: skip

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self.stop_token_ids[0])
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    def abort(self, request_ids: Collection[str]) -> None:
        self._waiting = [r for r in self._waiting if r.request_id not in request_ids]

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def sleep(self) -> bool:
        return False

    def push_weights(self, source: WeightSource, version: int) -> dict[str, float]:
        """By transformers' own loading, which knows how a folder's tensors become the model's."""
        if self.adapter is not None:
            self._push_adapter(source, version)
            self.version = version
            return {}
        old = self.model
        try:
            weights = {name: tensor.detach().clone() for name, tensor in source()}  # loading would not copy them
            model, found = type(old).from_pretrained(
                None, config=old.config, state_dict=weights, dtype=old.dtype, output_loading_info=True
            )
        except Exception as error:  # a source that stopped half-way, or a tensor that does not fit
            raise EngineError(f"the push of version {version} failed: {error}") from error
        wrong = {kind: sorted(names) for kind, names in found.items() if names and kind.endswith("_keys")}
        if wrong:
            kind, names = next(iter(wrong.items()))
            raise EngineError(f"the push of version {version}: {kind.replace('_', ' ')} {names[:3]}")
        self.model = model.eval().to(old.device)
        self.model.generation_config = GenerationConfig()
        self._routers = Routers(self.model) if self.routes else None
        self.version = version
        return {}

    def _push_adapter(self, source: WeightSource, version: int) -> None:
        """Beside the base, which stays as it is."""
        from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict

        if not isinstance(self.model, PeftModel):
            config = LoraConfig.from_peft_type(**self.adapter)
            self.model = get_peft_model(self.model, config, autocast_adapter_dtype=False).eval()
        try:
            found = set_peft_model_state_dict(self.model, dict(source()))
        except Exception as error:  # a source that stopped half-way, or a tensor that does not fit
            raise EngineError(f"the push of version {version} failed: {error}") from error
        missing = [name for name in found.missing_keys if ".lora_" in name]
        if missing or found.unexpected_keys:
            raise EngineError(f"the push of version {version}: {[*missing, *found.unexpected_keys][:3]} did not fit")

    @torch.no_grad()
    def score(self, token_ids: Sequence[int]) -> list[float]:
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        logprobs = self.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()

    def close(self) -> None:
        self._waiting.clear()
