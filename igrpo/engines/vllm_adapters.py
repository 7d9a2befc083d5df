"""vLLM in this process with the base once and an adapter beside it: a push is the adapter alone.

Its folder lies in shared memory, or in ``vllm_weight_dir``, for the moment of the push.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from igrpo.engines.adapter_files import NAME, NUMBER, as_loaded, loaded, not_there, write_adapter
from igrpo.engines.arguments import adapter_arguments
from igrpo.engines.base import EngineError, WeightSource
from igrpo.engines.config import EngineConfig
from igrpo.engines.vllm_engine import VLLMEngine
from igrpo.engines.weight_folder import weight_folder
from igrpo.engines.weights import Sent, recorded


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
        top_k: int = 0,
    ):
        self._adapter = adapter
        super().__init__(path, config, max_model_length, stop_token_ids, seed, masks, top_k=top_k)

    def _start(self) -> None:
        self._folder = weight_folder(self.config.vllm_weight_dir)
        super()._start()

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _options(self) -> dict[str, Any]:
        return super()._options() | adapter_arguments(self._adapter)

    def _push(self, source: WeightSource, version: int) -> int:
        from vllm.lora.request import LoRARequest

        sent: dict[str, Sent] = {}
        dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        target = self._folder / f"{version}"
        try:
            factors = {name: tensor.cpu().contiguous() for name, tensor in recorded(source(), sent, dtype)}
            write_adapter(factors, self._adapter, version, target)
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
        self._set_version(version)
        self._source, self._sent = source, sent
        return compared

    def _compare_factors(self, factors: Mapping[str, torch.Tensor]) -> int:
        """Bit for bit."""
        expected = as_loaded(factors, self._adapter)
        wrong = not_there(expected, self.llm.collective_rpc(loaded))
        if wrong or not expected:
            raise EngineError(f"after the push the engine still differs in {wrong or 'every tensor'}")
        return len(expected)
