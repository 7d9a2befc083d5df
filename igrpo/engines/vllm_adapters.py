"""vLLM in this process with the base once and an adapter beside it: a push is the adapter alone.

Its folder lies in shared memory, or in ``vllm_weight_dir``, for the moment of the push.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from igrpo.engines.adapter_files import NAME, NUMBER, as_loaded, loaded, not_there, write_adapter
from igrpo.engines.arguments import adapter_arguments
from igrpo.engines.base import EngineError
from igrpo.engines.vllm_engine import Compare, VLLMEngine
from igrpo.engines.weight_folder import weight_folder


class AdapterVLLMEngine(VLLMEngine):
    """See ``VLLMEngine``; the source of a push gives the adapter's factors, named and laid out as peft has them.

    Args:
        adapter: what ``adapter_config.json`` says of it.
    """

    sleep_level = 1  # the base must come back by itself

    def __init__(self, *args: Any, adapter: Mapping[str, Any], **named: Any):
        self._adapter = adapter
        super().__init__(*args, **named)

    def _start(self) -> None:
        self._folder = weight_folder(self.config.vllm_weight_dir)
        super()._start()

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _options(self) -> dict[str, Any]:
        return super()._options() | adapter_arguments(self._adapter)

    def _load(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> Compare:
        from vllm.lora.request import LoRARequest

        target = self._folder / f"{version}"
        try:
            factors = {name: tensor.cpu().contiguous() for name, tensor in weights}
            write_adapter(factors, self._adapter, version, target)
            self.engine.add_lora(LoRARequest(NAME, NUMBER, str(target), load_inplace=True))
        except EngineError:
            raise
        except Exception as error:  # whatever went wrong inside, nobody knows what is loaded
            raise EngineError(f"the adapter of version {version} was not loaded: {error}") from error
        finally:
            shutil.rmtree(target, ignore_errors=True)
        self.lora_request = LoRARequest(NAME, NUMBER, str(target))
        expected = as_loaded(factors, self._adapter)
        return lambda _: [(len(expected), not_there(expected, self.llm.collective_rpc(loaded)))]
