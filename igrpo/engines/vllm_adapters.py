"""vLLM in this process with the base once and an adapter beside it: a push is the adapter alone.

vLLM reads adapters from folders as peft writes them; ours lie in shared memory, or in ``vllm_weight_dir``, for the
moment of the push. One adapter is ever loaded, under one name, replaced in place.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from igrpo.engines.base import EngineError, WeightSource
from igrpo.engines.config import EngineConfig
from igrpo.engines.servers.push import not_written, weight_folder
from igrpo.engines.vllm_engine import VLLMEngine
from igrpo.engines.weights import Sent, fingerprint, recorded

NAME, NUMBER = "policy", 1
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, for which vLLM makes room."""


class AdapterVLLMEngine(VLLMEngine):
    """See ``VLLMEngine``; the source of a push gives the adapter's factors, named and laid out as peft has them.

    Args:
        adapter: what ``adapter_config.json`` says of it.
    """

    sleep_level = 1  # the base must come back by itself

    def __init__(
        self,
        path: str,
        config: EngineConfig,
        max_model_length: int,
        stop_token_ids: Sequence[int],
        seed: int,
        adapter: Mapping[str, Any],
        masks: bool = False,
    ):
        self._adapter = adapter
        super().__init__(path, config, max_model_length, stop_token_ids, seed, masks)

    def _start(self) -> None:
        self._folder = weight_folder(self.config.vllm_weight_dir)
        super()._start()

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _options(self) -> dict[str, Any]:
        rank = next(rank for rank in RANKS if rank >= self._adapter["r"])
        return super()._options() | {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}

    def _push(self, source: WeightSource, version: int) -> int:
        from vllm.lora.request import LoRARequest

        sent: dict[str, Sent] = {}
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        target = self._folder / f"{version}"
        try:
            factors = {name: tensor.cpu().contiguous() for name, tensor in recorded(source(), sent, dtype)}
            self._write(factors, version, target)
            self.engine.add_lora(LoRARequest(NAME, NUMBER, str(target), load_inplace=True))
        except EngineError:
            raise
        except Exception as error:  # whatever went wrong inside, nobody knows what is loaded
            raise EngineError(f"the adapter of version {version} was not loaded: {error}") from error
        finally:
            shutil.rmtree(target, ignore_errors=True)
        self.lora_request = LoRARequest(NAME, NUMBER, str(target))
        # Requests that run lose their blocks too, and read prompt and tokens so far again under the new adapter.
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("the prefix cache still holds blocks of the old adapter")
        compared = self._compare_factors(factors)
        self.version, self._source, self._sent = version, source, sent
        return compared

    def _write(self, factors: Mapping[str, torch.Tensor], version: int, target: Path) -> None:
        try:
            target.mkdir()
            save_file(dict(factors), target / "adapter_model.safetensors")
            (target / "adapter_config.json").write_text(json.dumps(dict(self._adapter)), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise not_written(version, target, error) from error

    def _compare_factors(self, factors: Mapping[str, torch.Tensor]) -> int:
        """Bit for bit, the scale multiplied into B as vLLM does it."""
        scale = self._adapter["lora_alpha"] / self._adapter["r"]
        scaled = (".lora_B.", ".lora_embedding_B")
        expected = {n: _bits(t * scale if any(part in n for part in scaled) else t) for n, t in factors.items()}
        there = {bits for found in self.llm.collective_rpc(_loaded) for bits in found}
        wrong = [name for name, bits in expected.items() if bits not in there]
        if wrong or not expected:
            raise EngineError(f"after the push the engine still differs in {wrong or 'every tensor'}")
        return len(expected)


def _loaded(worker: Any) -> list[tuple[Any, ...]]:
    """Of each factor that this worker holds."""
    adapter = worker.model_runner.lora_manager._adapter_manager.get_adapter(NUMBER)
    found = []
    for layer in adapter.loras.values():
        for factor in (layer.lora_a, layer.lora_b):
            found += [_bits(t) for t in (factor if isinstance(factor, list) else [factor]) if t is not None]
    return found


def _bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tuple(tensor.shape), tensor.dtype, int(fingerprint(tensor.contiguous())))
