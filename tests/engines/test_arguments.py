"""Arguments that pass through to vLLM, and those that may not."""

from __future__ import annotations

import pytest

from igrpo.config.train_config import TrainConfig
from igrpo.engines.arguments import KEYS, OWN
from igrpo.engines.servers.launch import server_command
from igrpo.settings import ConfigError


def config(**settings) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", dataset_name="d", **settings)


def test_a_server_gets_them_as_words():
    given = {
        "max_num_batched_tokens": 512, "enable_chunked_prefill": False, "async_scheduling": True,
        "kv_cache_dtype": "fp8", "compilation_config": {"level": 0}, "cudagraph_capture_sizes": [1, 8],
        "block_size": None,
    }  # fmt: skip
    quantized = config(vllm_engine_args=given, vllm_quantization="fp8")
    words = server_command(quantized, "m", 64, 1, 0, on_cpu=False)
    assert words[-11:] == [
        "--max-num-batched-tokens", "512", "--no-enable-chunked-prefill", "--async-scheduling",
        "--kv-cache-dtype", "fp8", "--compilation-config", '{"level": 0}', "--cudagraph-capture-sizes", "1", "8",
    ]  # fmt: skip
    assert words[words.index("--quantization") + 1] == "fp8"
    adapter = {"r": 9, "target_modules": ["layers.0.q_proj", "layers.1.q_proj", "embed_tokens"]}
    words = server_command(quantized, "m", 64, 1, 0, on_cpu=False, adapter=adapter)
    assert words[-8:] == [
        "--enable-lora", "--max-lora-rank", "16", "--max-loras", "1", "--lora-target-modules", "embed_tokens", "q_proj"
    ]  # fmt: skip


NAMED = (
    "nnodes", "data_parallel_rank", "headless", "prefill_context_parallel_size", "decode_context_parallel_size",
    "enable_expert_parallel", "served_model_name", "config", "uds", "ssl_keyfile", "logprobs_mode", "load_format",
)  # fmt: skip


@pytest.mark.parametrize(
    "short", ["max_model", "max_num_s", "enable_pref", "logprobs", "load_f", "served", "no_enable_p"]
)
def test_no_argument_comes_in_under_a_shorter_name(short):
    """A server's command line would take it for the long one."""
    with pytest.raises(ConfigError, match=rf"^vllm_engine_args: .*{short.removeprefix('no_')}"):
        config(vllm_engine_args={short: 1})


@pytest.mark.parametrize(
    "name", [*KEYS, *OWN, *NAMED, "no_enable_prefix_caching", "logprobs-mode", "--dtype", "a b", ""]
)
def test_what_the_loop_relies_on_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=r"^vllm_engine_args: ") as refused:
        config(vllm_engine_args={name: "x"})
    assert (KEYS.get(name) or name.strip()) in str(refused.value) and "\n" not in str(refused.value)


def test_a_format_wants_bf16_and_widens_the_tolerance():
    with pytest.raises(ConfigError, match=r"^vllm_quantization: .*write bf16: true, or null"):
        config(vllm_quantization="fp8", bf16=False)
    with pytest.raises(ConfigError, match=r"^vllm_quantization: .*fp8_per_block"):
        config(vllm_quantization="int2")
    widths = [config(vllm_quantization=name).probe_tolerance for name in (None, "fp8", "mxfp8", "nvfp4_per_token")]
    assert widths == [0.2, 0.5, 0.5, 1.0]
    assert config(vllm_quantization="fp8", weight_sync_tolerance=0.1).probe_tolerance == 0.1
