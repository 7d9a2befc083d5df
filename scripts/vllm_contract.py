"""Reads vLLM's Python sources and says what of them `igrpo/engines` uses is not there. Nothing is installed or run.

    pip download --no-deps --only-binary :all: vllm==0.33.0 -d wheels
    python scripts/vllm_contract.py wheels/*.whl               a wheel, or a folder that holds vllm/

Checked: every name that `igrpo/engines` imports from vllm, the arguments it passes, the methods, fields and settings it
uses, command-line flags and environment variables of its servers, the endpoints, and the fields of their messages. One
line per kind and version; exit status 1 if something is missing.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from igrpo.engines.config import Quantization  # noqa: E402

TRANSFER = "vllm.distributed.weight_transfer"
MEMBERS = {
    "vllm.LLM": (
        "collective_rpc kwargs", "apply_model func", "reset_prefix_cache reset_running_requests", "llm_engine",
    ),
    "vllm.v1.engine.llm_engine.LLMEngine": (
        "add_request request_id prompt params", "step", "abort_request request_ids", "engine_core",
    ),
    "vllm.v1.engine.core_client.EngineCoreClient": ("shutdown",),
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": ("reload_weights weights_iterator",),
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": ("reload_weights weights_iterator",),
    "vllm.outputs.RequestOutput": (
        "request_id", "prompt_token_ids", "prompt_logprobs", "outputs", "finished", "num_cached_tokens",
    ),
    "vllm.outputs.CompletionOutput": ("index", "token_ids", "logprobs", "finish_reason"),
    "vllm.sampling_params.SamplingParams": ("top_p", "top_k", "min_p"),
    "vllm.logprobs.Logprob": ("logprob",),
    "vllm.sampling_params.RequestOutputKind": ("FINAL_ONLY",),
    "vllm.model_executor.models.utils.WeightsMapper": ("apply_list values",),
    f"{TRANSFER}.base.WeightTransferEngine": (
        "init_transfer_engine init_info", "start_weight_update", "receive_weights update_info", "finish_weight_update",
        "shutdown", "model", "model_config",
    ),
    f"{TRANSFER}.base.TrainerWeightTransferEngine": ("send_weights", "shutdown"),
    f"{TRANSFER}.base.ParamMeta": ("name", "dtype", "shape"),
    f"{TRANSFER}.base.WeightSource": ("metadata",),
    f"{TRANSFER}.clients.HTTPVLLMWeightSyncClient": (
        "_post path json", "init_weight_transfer_engine init_info", "start_weight_update", "update_weights update_info",
        "finish_weight_update weight_version",
    ),
    f"{TRANSFER}.WeightTransferEngineFactory": ("register_engine",),
    f"{TRANSFER}.factory.WeightTransferTrainerFactory": ("trainer_init client source",),
    f"{TRANSFER}.nccl_engine.NCCLTrainerInitInfo": ("master_address", "master_port", "world_size", "rank"),
    f"{TRANSFER}.ipc_engine.IPCTrainerInitInfo": ("rank",),
    f"{TRANSFER}.base.WeightTransferUpdateRequest": ("update_info",),
}  # fmt: skip
"""Class -> its members: a field or property, or a method with the arguments it is given."""
SLEEP = {
    "vllm.LLM": ("sleep level", "wake_up tags"),
    "vllm.device_allocator.cumem.CuMemAllocator": ("get_instance", "release_pools"),
    "vllm.v1.worker.gpu_worker.Worker": ("sleep level", "wake_up tags", "_sleep_saved_buffers"),
}
ADAPTERS = {
    "vllm.v1.engine.llm_engine.LLMEngine": ("add_request lora_request", "add_lora lora_request"),
    "vllm.lora.request.LoRARequest": ("lora_name", "lora_int_id", "lora_path", "load_inplace"),
    "vllm.lora.lora_model.LoRAModel": ("loras",), "vllm.lora.lora_weights.LoRALayerWeights": ("lora_a", "lora_b"),
    "vllm.lora.model_manager.LoRAModelManager": ("get_adapter adapter_id",),
    "vllm.lora.worker_manager.WorkerLoRAManager": ("_adapter_manager",),
    "vllm.v1.worker.gpu_worker.Worker": ("add_lora lora_request",),
}  # fmt: skip
ADAPTER = {"r": 8, "target_modules": ["q_proj"]}
MASKS = {
    "vllm.config.model.ModelConfig": ("return_sampling_mask",), "vllm.outputs.CompletionOutput": ("sampling_mask",),
    "vllm.engine.arg_utils.EngineArgs": ("return_sampling_mask",), "vllm.outputs.SamplingMask": ("token_ids",),
}  # fmt: skip
"""The same, for training with top_p or min_p and no top_k: a vLLM without is refused there (``engines/masks.py``)."""
VERSIONS = {
    "vllm.LLM": ("update_weight_version new_version",), "vllm.outputs.CompletionOutput": ("weight_versions",),
    "vllm.outputs.WeightVersionSpan": ("version", "start", "end"),
}  # fmt: skip
"""Which weights tokens are of; without it they count as of those that their request was sent under."""
EXPERTS = {
    "vllm.engine.arg_utils.EngineArgs": ("enable_return_routed_experts",),
    "vllm.outputs.CompletionOutput": ("routed_experts",),
}
"""For `router_replay` only; `WORDS` has the order of their axes."""
FUNCTIONS = {
    "vllm.model_executor.model_loader.reload.initialize_layerwise_reload": ("model",),
    "vllm.model_executor.model_loader.reload.finalize_layerwise_reload": ("model", "model_config"),
}
GROUPS = {
    "members": MEMBERS, "sleep": SLEEP, "adapters": ADAPTERS, "sampling masks": MASKS, "weight versions": VERSIONS,
    "chosen experts": EXPERTS,
}  # fmt: skip
WORDS = {
    "sleep": ("vllm/v1/worker/gpu_worker.py", ('tag="weights"', 'tag="kv_cache"')),
    "members": (
        "vllm/model_executor/layers/quantization/__init__.py", tuple(f'"{name}"' for name in get_args(Quantization))
    ),
    "chosen experts": ("vllm/outputs.py", ("routed_experts: np.ndarray | None = None  # [seq_len,layer_num,topk]",)),
}  # fmt: skip
"""Kind -> a file and what it must hold: the parts in which vLLM's memory wakes; formats of weights; axes."""
ENDPOINTS = {
    "/collective_rpc": ("method", "kwargs", "results"), "/reset_prefix_cache": ("reset_running_requests",),
    "/pause": ("mode", "keep"), "/finish_weight_update": ("weight_version",), "/update_weights": ("update_info",),
    "/update_weight_version": ("new_version",), "/weight_info": ("weight_version",), "/get_world_size": ("world_size",),
    "/abort_requests": (), "/resume": (), "/health": (), "/v1/models": (), "/v1/completions": (), "/metrics": (),
    "/init_weight_transfer_engine": (), "/start_weight_update": (),
    "/v1/load_lora_adapter": ("lora_name", "lora_path"),
}  # fmt: skip
"""Path -> words of its request or answer, which the file that serves it must hold."""
ANSWERS = {
    "CompletionResponse": ("choices", "usage"), "UsageInfo": ("prompt_tokens_details",),
    "CompletionResponseChoice": (
        "index", "finish_reason", "logprobs", "token_ids", "prompt_token_ids", "prompt_logprobs",
    ),
    "CompletionLogProbs": ("token_logprobs",), "PromptTokenUsageInfo": ("cached_tokens",),
    "ModelCard": ("id", "max_model_len"), "ModelList": ("data",),
}  # fmt: skip
NOTICED_BY = {
    "sampling masks": "tests/engines/test_masks.py::test_what_vllm_says_it_kept",
    "weight versions": "tests/engines/test_engines.py::test_requests_that_run_go_on_under_new_weights",
    "chosen experts": "tests/learner/test_experts.py::test_vllms_experts_are_read_row_by_row",
    "imported names": "tests/engines/test_engines.py::test_several_servers_form_one_group_for_a_direct_transfer",
    "arguments of calls": "tests/engines/test_engines.py::test_a_push_replaces_every_weight_and_version",
    "members": "tests/engines/test_engines.py::test_a_push_replaces_every_weight_and_version",
    "sleep": "tests/engines/test_engines.py::test_an_engine_sleeps_when_nothing_runs_and_a_push_wakes_it",
    "adapters": "tests/engines/test_sync.py::test_an_adapter_travels_alone_beside_one_base",
    "flags": "tests/engines/test_servers.py::test_servers_share_the_requests_and_sample_from_what_was_pushed",
    "environment": "tests/engines/test_servers.py::test_servers_share_the_requests_and_sample_from_what_was_pushed",
    "endpoints": "tests/engines/test_servers.py::test_servers_share_the_requests_and_sample_from_what_was_pushed",
    "messages": "tests/engines/test_servers.py::test_servers_share_the_requests_and_sample_from_what_was_pushed",
}
"""Kind -> the first of our tests that would fail, with that vLLM installed."""


class Sources:
    """vLLM's files in a wheel or a folder."""

    def __init__(self, place: Path):
        self.place = place
        self._zip = None if place.is_dir() else zipfile.ZipFile(place)

    @cached_property
    def files(self) -> frozenset[str]:
        if self._zip:
            return frozenset(name for name in self._zip.namelist() if name.endswith(".py"))
        return frozenset(str(p.relative_to(self.place)) for p in (self.place / "vllm").rglob("*.py"))

    @cache  # noqa: B019 (as long as the script)
    def text(self, file: str) -> str:
        return (self._zip.read(file) if self._zip else (self.place / file).read_bytes()).decode()

    @cache  # noqa: B019
    def tree(self, module: str) -> tuple[str, ast.Module | None]:
        """The module's own name where a package stands for its ``__init__``, and what it holds."""
        base = module.replace(".", "/")
        for file, package in ((f"{base}.py", False), (f"{base}/__init__.py", True)):
            if file in self.files:
                return (f"{module}." if package else module), ast.parse(self.text(file))
        return module, None

    def find(self, name: str, depth: int = 8) -> tuple[str, ast.AST] | None:
        """(module, definition) of a dotted name, through re-exports."""
        module, _, own = name.rpartition(".")
        place, tree = self.tree(module)
        if tree is None or depth == 0:
            return (module, ast.Module([], [])) if self.tree(name)[1] else None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == own:
                return module, node
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == own for a in node.names):
                original = next(a.name for a in node.names if (a.asname or a.name) == own)
                package = place.split(".")[: -node.level] if node.level else []
                return self.find(".".join([*package, *filter(None, [node.module, original])]), depth - 1)
            if isinstance(node, ast.Dict):  # vllm/__init__.py loads by a table: "LLM": ".entrypoints.llm:LLM"
                for key, value in zip(node.keys, node.values, strict=True):
                    if _text(key) == own and (target := _text(value)) and ":" in target:
                        return self.find(module + target.replace(":", "."), depth - 1)
            if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == own for t in node.targets):
                return module, node
        return (name, ast.Module([], [])) if self.tree(name)[1] else None

    def members(self, name: str) -> dict[str, ast.AST]:
        """Fields, properties and methods of a class, inherited ones included; attributes set in ``__init__`` too."""
        found = self.find(name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return {}
        module, node = found
        made: dict[str, ast.AST] = {}
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and base.id != node.name:
                made |= self.members(f"{module}.{base.id}")
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                made[part.name] = part
            elif isinstance(part, ast.AnnAssign | ast.Assign):
                for target in [part.target] if isinstance(part, ast.AnnAssign) else part.targets:
                    label = getattr(target, "id", None) or getattr(target, "attr", None)
                    if label:
                        made.setdefault(label, part)
        return made


def _text(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _arguments(node: ast.AST) -> set[str] | None:
    """Names that a function takes; None where it takes any."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    given = node.args
    return None if given.kwarg else {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}


def imported() -> dict[str, set[str]]:
    """Dotted name of vllm -> the keywords that igrpo/engines passes to it."""
    names: dict[str, set[str]] = {}
    for path in sorted((ROOT / "igrpo" / "engines").rglob("*.py")):
        tree, here = ast.parse(path.read_text(encoding="utf-8")), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                here |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in here:
                names.setdefault(here[node.func.id], set()).update(k.arg for k in node.keywords if k.arg)
        names |= {name: names.get(name, set()) for name in here.values()}
    return names


def engine_options() -> set[str]:
    """What ``VLLMEngine`` starts vLLM with, on a CPU and on GPUs."""
    from igrpo.engines.arguments import adapter_arguments
    from igrpo.engines.layout import launched_with_others
    from igrpo.engines.vllm_engine import VLLMEngine

    engine = VLLMEngine.__new__(VLLMEngine)
    engine.config, engine.path, engine.max_model_length, engine._rank_seed = _config(), "m", 64, 0
    engine.masks = False  # of which `MASKS` asks
    engine._sleeps = True
    options: set[str] = set()
    for engine.on_cpu in (True, False):
        options |= set(engine._options())
    return options | set(adapter_arguments(ADAPTER)) | {"distributed_executor_backend"} | set(launched_with_others())


def server_words() -> tuple[set[str], set[str]]:
    """Flags and environment variables of the servers."""
    from igrpo.engines.servers.launch import server_command, server_environment

    flags, variables, alone = set(), set(), _config(use_peft=True, lora_sync="adapter")
    for on_cpu in (True, False):
        words = server_command(_config(trust_remote_code=True, model_revision="r"), "m", 64, 1, 0, on_cpu, ADAPTER)
        flags |= {word[2:].replace("-", "_") for word in words if word.startswith("--")}
        variables |= {v for v in server_environment(alone, "s" * 40, on_cpu) if v.startswith("VLLM_")}
    return flags, variables


def _config(**settings: object) -> SimpleNamespace:
    from igrpo.config.train_config import TrainConfig

    return TrainConfig(model_name_or_path="m", dataset_name="d", bf16=True, vllm_quantization="fp8", **settings)  # type: ignore[arg-type]


def missing(sources: Sources) -> Iterator[tuple[str, str]]:
    """(kind, what is not there)."""
    for name, keywords in imported().items():
        found = sources.find(name)
        if found is None:
            yield "imported names", name
        elif name != "vllm.LLM" and isinstance(found[1], ast.ClassDef):
            members = sources.members(name)
            taken = _arguments(members["__init__"]) if "__init__" in members else set()
            for keyword in sorted(keywords - set(members) - (taken or set())):
                if taken is not None:
                    yield "arguments of calls", f"{name}({keyword}=)"
    settings = set(sources.members("vllm.engine.arg_utils.EngineArgs"))
    started = settings | (_arguments(sources.members("vllm.LLM").get("__init__", ast.Module([], []))) or set())
    for option in sorted(engine_options() - started):
        yield "arguments of calls", f"LLM({option}=)"
    yield from _missing_members(sources)
    yield from _missing_in_servers(sources, settings)


def _missing_members(sources: Sources) -> Iterator[tuple[str, str]]:
    for kind, owner, wanted in ((kind, *entry) for kind, group in GROUPS.items() for entry in group.items()):
        members = sources.members(owner)
        for text in wanted:
            name, *arguments = text.split()
            if name not in members:
                yield kind, f"{owner}.{name}"
                continue
            taken = _arguments(members[name])
            for argument in [] if taken is None else sorted(set(arguments) - taken):
                yield kind, f"{owner}.{name}({argument}=)"
    source = sources.members(f"{TRANSFER}.base.WeightSource")
    if not {"iter_full", "__iter__"} & set(source):
        yield "members", f"{TRANSFER}.base.WeightSource.iter_full or .__iter__"
    for kind, (file, words) in WORDS.items():
        yield from ((kind, f"{file}: {word}") for word in words if word not in sources.text(file))
    for name, wanted in FUNCTIONS.items():
        found = sources.find(name)
        taken = set() if found is None else _arguments(found[1])
        for argument in [] if taken is None else [a for a in wanted if a not in taken]:
            yield "members", f"{name}({argument})"


def _missing_in_servers(sources: Sources, settings: set[str]) -> Iterator[tuple[str, str]]:
    fronts = [file for file in sorted(sources.files) if file.startswith("vllm/entrypoints/")]
    flags, variables = server_words()
    known = settings | {
        name for file in fronts if "cli_args" in file for cls in ast.walk(ast.parse(sources.text(file)))
        if isinstance(cls, ast.ClassDef) for name in sources.members(file[:-3].replace("/", ".") + f".{cls.name}")
    }  # fmt: skip
    for flag in sorted(flags):
        if flag not in known and flag.removeprefix("no_") not in known:
            yield "flags", f"--{flag.replace('_', '-')}"
    stated = sources.text("vllm/envs.py")
    for variable in sorted(v for v in variables if f'"{v}"' not in stated):
        yield "environment", variable
    for path, words in ENDPOINTS.items():
        served = [sources.text(f) for f in fronts if f'"{path}"' in sources.text(f)]
        if not served:
            yield "endpoints", path
        for word in words if served else ():
            if not any(word in text for text in served):
                yield "messages", f"{path}: {word}"
    body = _completion_fields()
    yield from _missing_fields(sources, fronts, {**ANSWERS, "CompletionRequest": tuple(sorted(body))})
    if not any("vllm:generation_tokens" in sources.text(f) for f in sources.files if f.startswith("vllm/v1/metrics/")):
        yield "messages", "/metrics: vllm:generation_tokens"


def _missing_fields(
    sources: Sources, files: list[str], wanted: dict[str, tuple[str, ...]]
) -> Iterator[tuple[str, str]]:
    for owner, fields in wanted.items():
        places = [f for f in files if f"class {owner}(" in sources.text(f)]
        members = [sources.members(f"{f[:-3].replace('/', '.')}.{owner}") for f in places]
        for field in fields:
            if not any(field in made for made in members):
                yield "messages", f"{owner}.{field}"


def _completion_fields() -> set[str]:
    """Keys of the bodies that ``Client`` sends to /v1/completions."""
    tree = ast.parse((ROOT / "igrpo/engines/servers/client.py").read_text(encoding="utf-8"))
    bodies = [
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        and any(getattr(t, "id", None) == "body" for t in node.targets)
    ]  # fmt: skip
    return {name for body in bodies for key in body.keys if (name := _text(key))}


def main(places: list[str]) -> int:
    if not places:
        sys.exit(__doc__)
    status = 0
    for place in places:
        found = list(missing(Sources(Path(place))))
        status |= bool(found)
        print(f"{Path(place).name}: " + ("everything is there" if not found else f"{len(found)} missing"))
        for kind, what in found:
            print(f"  {kind}: {what}  (first noticed by {NOTICED_BY[kind]})")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
