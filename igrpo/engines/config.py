"""Settings of the engine that samples: this process's own, or servers, and how weights reach it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from igrpo.engines.arguments import check_arguments
from igrpo.settings import ConfigError
from igrpo.settings.kinds import (
    Address,
    Count,
    Gibibytes,
    Mark,
    PathText,
    Port,
    Positive,
    Processes,
    Seconds,
    ShareAboveZero,
    Text,
)
from igrpo.settings.shared import SeedConfig, WeightsConfig

Quantization = Literal[
    "fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8", "int8_per_channel_weight_only",
    "nvfp4_per_token",
]  # fmt: skip
"""What vLLM 0.28 to 0.33 make of bf16 weights as they are loaded, and again with each push."""
TOLERANCES = {0: 0.2, 8: 0.5, 4: 1.0}
"""Nats per token by the bits that weights are rounded to; 0: they are not."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(SeedConfig, WeightsConfig):
    # --- engine
    use_vllm: bool = True
    """vLLM generates (the CPU build on a machine without a GPU); false: Hugging Face `generate`."""
    vllm_mode: Annotated[Literal["colocate", "server"], Mark.ONLY_IF_ASKED] = "colocate"
    """`colocate`: in the trainer's process; `server`: `vllm serve` processes over HTTP (see docs/engines.md)."""
    vllm_gpu_memory_utilization: ShareAboveZero = 0.3
    """Share of the GPU's memory that vLLM may use."""
    vllm_enable_sleep_mode: Annotated[bool | None, Mark.ONLY_IF_ASKED] = None
    """vLLM in the trainer's process leaves its GPU to learner steps; null: yes, unless a `policy_lag` keeps it busy."""
    vllm_max_model_length: Annotated[Count | None, Mark.ONLY_IF_ASKED] = None
    """Context of the engine in tokens; null: just long enough for the longest refinement of this data set."""
    vllm_tensor_parallel_size: Processes = 1
    """GPUs per engine; to train with more than one takes `vllm_mode: server`."""
    vllm_cpu_kvcache_gib: Gibibytes = 1.0
    """KV-cache size of the CPU engine in GiB."""
    vllm_max_num_seqs: Count = 128
    """Sequences decoded at once."""
    lora_sync: Annotated[Literal["merged", "adapter"], Mark.ONLY_IF_ASKED] = "merged"
    """With `use_peft`: push whole weights with the adapters merged in, or the adapters alone beside one base."""
    vllm_quantization: Annotated[Quantization | None, Mark.ONLY_IF_ASKED] = None
    """Format to which vLLM rounds the weights it samples with (`fp8`); the learner's stay as they are."""
    vllm_engine_args: Annotated[dict[str, Any], Mark.ONLY_IF_ASKED] = field(default_factory=dict)
    """Further arguments of vLLM's engine (`{enforce_eager: true}`), except what the loop relies on."""
    weight_sync_tolerance: Annotated[Positive | None, Mark.ONLY_IF_ASKED] = None
    """Largest mean gap of engine and learner on the probe, nats per token; null: 0.2, of 8 bits 0.5, of 4 bits 1."""

    # --- servers
    vllm_server_base_url: Annotated[Address | None, Mark.ONLY_IF_ASKED] = None
    """A running server (`python -m igrpo.serve`); null: the trainer starts its own."""
    vllm_server_urls: Annotated[list[Address], Mark.ONLY_IF_ASKED] = field(default_factory=list)
    """The same for several servers, which then share the requests."""
    vllm_server_host: Annotated[Text, Mark.ONLY_IF_ASKED] = "127.0.0.1"
    """Address on which started servers listen; a public one is refused."""
    vllm_server_port: Annotated[Port, Mark.ONLY_IF_ASKED] = 0
    """Their first port; 0: any that is free (`igrpo.serve`: 8000)."""
    vllm_server_allow_public: Annotated[bool, Mark.ONLY_IF_ASKED] = False
    """Let servers listen on, and the secret travel over, a public network."""
    vllm_num_servers: Annotated[Processes, Mark.ONLY_IF_ASKED] = 1
    """Servers that the trainer starts."""
    vllm_server_devices: Annotated[str | None, Mark.ONLY_IF_ASKED] = None
    """GPUs of the servers that the trainer starts (`"4,5,6,7"`), divided evenly; null: visible ones that are free."""
    vllm_server_timeout: Annotated[Seconds, Mark.ONLY_IF_ASKED] = 240.0
    """Seconds to wait for a server to come up, or back."""
    vllm_request_timeout: Annotated[Seconds, Mark.ONLY_IF_ASKED] = 1800.0
    """Seconds after which a request counts as hung and is given to another server."""
    vllm_sync_timeout: Annotated[Seconds, Mark.ONLY_IF_ASKED] = 300.0
    """Seconds that each phase of a weight push may take."""
    vllm_weight_transfer: Annotated[Literal["auto", "file", "nccl", "ipc"], Mark.ONLY_IF_ASKED] = "auto"
    """How weights reach servers; `auto`: `nccl` between GPUs, `file` (safetensors in a shared folder) on the CPU."""
    vllm_weight_dir: Annotated[PathText | None, Mark.ONLY_IF_ASKED] = None
    """Folder for `file` (seen by trainer and servers) and `lora_sync: adapter`; null: shared memory of this machine."""
    vllm_group_port: Annotated[Port, Mark.ONLY_IF_ASKED] = 51216
    """First port of the trainer's end of `nccl`, one per server."""

    def check(self) -> None:
        check_arguments(self.vllm_engine_args)
        direct = self.uses_servers and self.vllm_weight_transfer in ("nccl", "ipc")
        if self.sends_adapter and direct:
            raise ConfigError(
                f"vllm_weight_transfer: {self.vllm_weight_transfer} carries whole weights, and lora_sync: adapter "
                "travels as files; write auto, or lora_sync: merged"
            )
        if self.vllm_quantization is not None and not self.bf16:
            raise ConfigError(
                f"vllm_quantization: vLLM makes {self.vllm_quantization} of bf16 weights only; write bf16: true, or "
                "null"
            )

    @property
    def sends_adapter(self) -> bool:
        """Whether pushes bring the adapter alone."""
        return self.use_peft and self.lora_sync == "adapter"

    @property
    def rounds_base(self) -> bool:
        """Whether the learner's base is rounded and the engine's is not."""
        return self.load_in_4bit and self.sends_adapter

    @property
    def probe_tolerance(self) -> float:
        """``weight_sync_tolerance``, or what fits the format of the engine's weights."""
        bits = 0 if self.vllm_quantization is None else 4 if "fp4" in self.vllm_quantization else 8
        bits = 4 if self.rounds_base else bits
        return self.weight_sync_tolerance or TOLERANCES[bits if self.use_vllm or self.rounds_base else 0]

    @property
    def uses_servers(self) -> bool:
        """Whether vLLM samples in servers, outside of the trainer's process."""
        return self.use_vllm and self.vllm_mode == "server"

    @property
    def colocates(self) -> bool:
        """Whether vLLM samples in the trainer's process."""
        return self.use_vllm and self.vllm_mode == "colocate"

    @property
    def server_urls(self) -> list[str]:
        """Servers that run already; empty: the trainer starts its own."""
        return [*filter(None, [self.vllm_server_base_url]), *self.vllm_server_urls]

    @property
    def slots(self) -> int:
        """Sequences that all engines of a process decode at once."""
        servers = len(self.server_urls) or self.vllm_num_servers
        return self.vllm_max_num_seqs * (servers if self.uses_servers else 1)

    def check_in_process(self) -> None:
        """
        Raises:
            ConfigError: an engine in the trainer's process to which weights cannot be pushed.
        """
        if self.vllm_tensor_parallel_size > 1:
            raise ConfigError(
                f"vllm_tensor_parallel_size: {self.vllm_tensor_parallel_size} needs servers to be trained with: "
                "weights do not reach the other processes of an engine in the trainer's; write vllm_mode: server, or 1"
            )

    def weight_backend(self, on_cpu: bool) -> str:
        """Name of the weight transfer as vLLM knows it."""
        chosen = self.vllm_weight_transfer
        if chosen == "auto":
            chosen = "file" if on_cpu or self.sends_adapter else "nccl"
        return "igrpo_file" if chosen == "file" else chosen
