"""What a run keeps in memory, worked out before anything is loaded. Plain arithmetic: importing this needs no torch.

    shape   = model_shape(config_dict)             the fields of a model's ``config.json`` that decide sizes
    machine = this_machine(use_cpu, processes)     what one process may use here, in bytes
    plan    = memory_plan(shape, config, machine, context=4096)
    plan.lines() / plan.fits / plan.advice()       the table, the verdict, and what to change
    largest_context(shape, config, machine)        tokens of one sequence that still fit

Sizes are bytes per process, at the worst moment of a step: two of the learner's, beside the engine or, where that
sleeps, beside what it keeps; and then the moment when it is awake again. Items marked exact follow from the settings.
Activations are an estimate: a count of what autograd keeps in one decoder layer, within 20 % of what a Llama layer was
measured to keep; on GPUs the whole is within 10 % of rehearsals (``rehearsal.py``). So only the exact items refuse a
run; the estimate warns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from igrpo.config.train_config import TrainConfig
from igrpo.machine import Machine
from igrpo.plan.shapes import ModelShape

GIB = 2**30
CHUNK_BYTES = {"cuda": 5 * 2**29, "cpu": 2**27}
"""Of logits that ``igrpo_kernels.linear_grpo_loss`` holds at a time; their gradient takes their place."""
TEACHER_LOGITS = 2**25
"""That ``igrpo_kernels.linear_topk_log_softmax`` holds at a time, in float32 and twice."""
ENGINE = ("engine weights", "KV cache", "sleeping engine")
ASLEEP = GIB
"""What a sleeping engine keeps: CUDA graphs, and what vLLM allocates outside of its pool. A guess."""


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    exact: bool
    note: str


@dataclass(frozen=True)
class MemoryPlan:
    """What lives in one process's memory at the worst moment of a step."""

    items: tuple[Item, ...]
    """Of the worst moment."""
    machine: Machine
    suggestions: tuple[str, ...]
    learning: tuple[Item, ...]
    generating: tuple[Item, ...] = ()
    """While the engine is awake, if it sleeps while the learner works."""

    @property
    def total(self) -> int:
        return _bytes(self.items)

    @property
    def learner(self) -> int:
        """While it works, without the engine."""
        return _bytes(item for item in self.learning if item.name not in ENGINE)

    @property
    def between(self) -> int:
        """Of the learner, beside an engine that is awake."""
        return _bytes(item for item in self.generating or self.learning if item.name not in ENGINE)

    @property
    def certain(self) -> int:
        return max(_bytes(item for item in items if item.exact) for items in (self.learning, self.generating))

    @property
    def fits(self) -> bool:
        """False where even the exact items are more than there is."""
        return self.certain <= self.machine.memory

    @property
    def tight(self) -> bool:
        """Whether the estimate as a whole is more than there is."""
        return self.total > self.machine.memory

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [f"  {i.name:<22} {i.bytes / GIB:8.2f} GiB  {'' if i.exact else '~ '}{i.note}" for i in self.items]
        where = "this GPU" if self.machine.device == "cuda" else "this process's share of the memory"
        return [
            "memory plan, per process:",
            *rows,
            f"  {'together':<22} {self.total / GIB:8.2f} GiB  of {self.machine.memory / GIB:.1f} GiB ({where})",
            *self._phases(),
        ]

    def _phases(self) -> list[str]:
        if not self.generating:
            return []
        learning, generating = f"{_bytes(self.learning) / GIB:.2f} GiB", f"{_bytes(self.generating) / GIB:.2f} GiB"
        now = "learner works" if self.items == self.learning else "engine samples"
        return [f"  while the {now}: the engine sleeps when the learner works ({learning} then, {generating} else)"]

    def advice(self) -> str:
        """What to change, most effective first; for the error and the warning."""
        return "; ".join(self.suggestions) or "use a smaller model"


def memory_plan(
    shape: ModelShape, config: TrainConfig, machine: Machine, *, context: int, sharded: bool = False
) -> MemoryPlan:
    """Learner and engine together, as they live in one process.

    Args:
        context: tokens of the longest sequence, prompt + draft + refinement.
        sharded: FSDP: weights, gradients and optimiser are divided by the number of processes.
    """
    moments = _moments(shape, config, machine, context, sharded)
    worst = max(moments, key=_bytes)
    weights, engine = _weights(shape, config, machine, sharded), _engine(shape, config, machine, context)
    if not (config.engine_sleeps and machine.device == "cuda"):
        items = (*weights, *worst, *engine)
        return MemoryPlan(items, machine, _suggestions(config, machine, sharded), items)
    asleep = Item("sleeping engine", ASLEEP, False, "CUDA graphs, and what vLLM keeps outside of its pool")
    # DDP's buckets are the gradients.
    kept = [item for item in weights if item.name != "gradients" or (machine.processes > 1 and not sharded)]
    learning, generating = (*weights, *worst, asleep), (*kept, *engine)
    items = max(learning, generating, key=_bytes)
    return MemoryPlan(items, machine, _suggestions(config, machine, sharded), learning, generating)


def _bytes(items: Iterable[Item]) -> int:
    return sum(item.bytes for item in items)


def largest_context(shape: ModelShape, config: TrainConfig, machine: Machine, *, sharded: bool = False) -> int:
    """Tokens of one sequence, alone in its micro-batch, that the estimate still fits; 0 if none do."""
    alone = replace(config, token_budget=1)
    low, high = 0, 2**22
    while low < high:
        middle = (low + high + 1) // 2
        fits = not memory_plan(shape, alone, machine, context=middle, sharded=sharded).tight
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def trained_parameters(shape: ModelShape, config: TrainConfig) -> int:
    """All, or with LoRA the two factors of rank r beside every linear layer of the decoder; of models with experts, of
    which peft adapts some and leaves others, as they were counted (``models.with_adapters``)."""
    if not config.use_peft:
        return shape.parameters
    if shape.adapter_parameters is not None:
        return shape.adapter_parameters
    h, i, q, kv = shape.hidden_size, shape.intermediate_size, shape.attention_size, shape.kv_size
    sides = {
        "q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h,
        "gate_proj": h + i, "up_proj": h + i, "down_proj": i + h,
    }  # fmt: skip
    named = {name.rpartition(".")[2] for name in config.lora_target_modules or ["all-linear"]}
    every = not all(name.replace("_", "").isalnum() for name in named)  # all-linear, or an expression
    decoder = sum(side for name, side in sides.items() if every or name in named)
    outside = len(named & {"lm_head", "embed_tokens"}) * (h + shape.vocab_size)
    return config.lora_r * (shape.num_layers * decoder + outside)


def _weights(shape: ModelShape, config: TrainConfig, machine: Machine, sharded: bool) -> list[Item]:
    trained = trained_parameters(shape, config)
    parts = machine.processes if sharded else 1
    split = f", in {parts} shards" if parts > 1 else ""
    if config.use_peft:
        kind, bytes_each = ("bf16", 2) if config.bf16 else ("fp32", 4)
        base = bytes_each * shape.parameters
        if config.load_in_4bit:  # and a scale for each block of 64; embedding, head and experts stay
            # Experts in one tensor are no linear layer.
            outside = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) + shape.expert_parameters
            base = bytes_each * outside + round(0.5625 * (shape.parameters - outside))
            kind = "4 bits"
        items = [Item("base weights", base // parts, True, f"{kind}, frozen{split}")]
        items.append(Item("adapters", 4 * trained // parts, True, f"fp32, {trained / 1e6:.1f} M parameters"))
    else:
        items = [Item("master weights", 4 * trained // parts, True, f"fp32, {trained / 1e6:.1f} M parameters{split}")]
    items.append(Item("gradients", 4 * trained // parts, True, f"fp32{split}"))
    eight_bit = "8bit" in config.optim
    if "paged" in config.optim and machine.device == "cuda":
        items.append(Item("optimiser", 0, True, "paged: in the computer's memory"))
    else:
        note = f"two moments in {'8 bits' if eight_bit else 'fp32'}{split}"
        items.append(Item("optimiser", (2 if eight_bit else 8) * trained // parts, True, note))
    if config.has_reference:
        why = "beta > 0" if config.beta > 0 else "teacher_model_kind: base"
        items.append(Item("reference model", 4 * shape.parameters // parts, True, f"fp32, because {why}{split}"))
    if config.averages_weights:
        items.append(Item("averaged teacher", 4 * trained // parts, True, f"fp32, of what trains{split}"))
    if machine.offloads and sharded:
        return [replace(item, bytes=0, note=f"{item.note}: {item.bytes / GIB:.2f} GiB, on the host") for item in items]
    return items


def _moments(shape: ModelShape, config: TrainConfig, machine: Machine, context: int, sharded: bool) -> list[list[Item]]:
    """What comes on top at the worst moments of a micro-batch: in the loss, when every layer has been computed and
    the head's gradient is made; when the last layer goes backward, computed again where it was checkpointed; and when a
    teacher reads. On a CPU the process keeps what the first has given back, in pieces that the second does not use."""
    tokens = max(context, config.token_budget) if config.token_budget else context * config.per_device_train_batch_size
    sharded = sharded and machine.processes > 1
    layer = activation_bytes_per_token(shape, config.bf16, sharded or config.use_peft)
    # The residual stream is float32 under autocast, whose embedding is; else what the weights are computed in.
    stream = shape.hidden_size * (_width(config) if sharded or config.use_peft else 4)
    again = config.gradient_checkpointing or config.use_peft
    backward = _width(config) * 2 * (shape.intermediate_size + shape.hidden_size) if again else 0
    if config.use_peft:  # what the adapters read, which autocast brings to float32
        layer += (2 if sharded else 6) * shape.intermediate_size
        backward += 12 * shape.kv_size + (0 if sharded else 4 * shape.intermediate_size)
    kept = shape.num_layers * (stream if config.gradient_checkpointing else layer)
    if config.activation_offloading:
        kept = 0 if config.gradient_checkpointing else layer
    backward += layer if config.gradient_checkpointing else 0
    backward += 2 * _width(config) * shape.experts_per_token * shape.hidden_size  # what experts' rows are made of
    head = shape.vocab_size * shape.hidden_size
    frozen = config.use_peft and "lm_head" not in (config.lora_target_modules or ())
    # One chunk's dW is rounded to bf16 at once where the weight is; all logits may take what that saves.
    rounds = 2 * head if config.bf16 and sharded and not frozen and machine.device == "cuda" else 0
    chunk, size = tokens * shape.vocab_size * _width(config), CHUNK_BYTES[machine.device]
    chunk, rounds = (chunk, rounds) if chunk <= size + rounds else (size, 0)
    rows = tokens * 4 * stream
    chunks = "one chunk, then its gradient in place; logits never exist whole"
    outside = "layer inputs, and one layer computed again with its gradients" if config.gradient_checkpointing else (
        "of every layer, and the gradients of one"
    )  # fmt: skip
    loss = [
        Item("compute copy", _copies(shape, config, sharded, in_loss=True), True, _copied(sharded, config)),
        Item(
            "activations", tokens * kept + rows, False, f"{tokens} tokens: in the loss, before any layer goes backward"
        ),
        Item("logits chunk", chunk, False, chunks),
        Item("gradient of the head", 0 if frozen else 4 * head - rounds, True, "fp32 if summed over chunks"),
    ]
    stays = machine.device == "cpu"
    held = 0 if frozen else _width(config) * head if sharded else 4 * head if shape.tied else 0
    last = [
        Item("compute copy", _copies(shape, config, sharded, in_loss=stays), True, _copied(sharded, config)),
        Item("activations", tokens * (kept + backward) + rows * stays, False, f"{tokens} tokens: {outside}"),
        Item("logits chunk", chunk * stays, False, chunks),
        Item("gradient of the head", held, True, "until the embedding has its own"),
    ]
    logits = 8 * min(TEACHER_LOGITS, tokens * shape.vocab_size) if config.distillation_weight else 0
    teacher = [
        Item("compute copy", _copies(shape, config, sharded, in_loss=True), True, _copied(sharded, config)),
        Item("activations", tokens * stream + rows, False, f"{tokens} tokens: one layer's, while a teacher reads"),
        Item("teacher's logits", logits, False, "fp32, a chunk of them twice"),
    ]
    return [[item for item in moment if item.bytes] for moment in (loss, last, teacher)]


def _width(config: TrainConfig) -> int:
    return 2 if config.bf16 else 4


def _copies(shape: ModelShape, config: TrainConfig, sharded: bool, in_loss: bool) -> int:
    """Weights beside the master weights. FSDP keeps the head whole from the first layer to the last gradient, and
    layers as they come: one gathered; in the backward pass also the next one, and this one's float32 gradient on its
    way to its shards. Autocast keeps what it has cast to the end of the forward pass."""
    width = _width(config)
    # peft adds an adapter to all experts of a layer before they are read.
    sums = width * shape.adapted_experts // (shape.num_layers if config.gradient_checkpointing else 1)
    if sharded:
        layers = 1 if in_loss else 2 if config.use_peft else 4
        return width * (shape.vocab_size * shape.hidden_size + layers * shape.layer_parameters) + sums
    if config.use_peft or not config.bf16:
        return sums
    return 2 * (shape.decoder_parameters + shape.vocab_size * shape.hidden_size) if in_loss else (
        2 * shape.layer_parameters
    )  # fmt: skip


def _copied(sharded: bool, config: TrainConfig) -> str:
    return ("bf16" if config.bf16 else "fp32") + (", layers gathered as they run" if sharded else ", cast by autocast")


def activation_bytes_per_token(shape: ModelShape, bf16: bool, sharded: bool = False) -> int:
    """What autograd keeps of one decoder layer: matmul inputs in the compute dtype, norms in float32, the residual
    stream in float32 where autocast computes and in the weights' dtype where FSDP casts them. Of experts also a token's
    row for each, before and after."""
    hidden, inner, q, kv = shape.hidden_size, shape.intermediate_size, shape.attention_size, shape.kv_size
    rows = 2 * (2 if bf16 else 4) * shape.experts_per_token * hidden
    if not bf16:
        return 24 * hidden + 16 * inner + 8 * q + 8 * kv + rows
    return (17 * hidden + 8 * inner + 8 * q if sharded else 24 * hidden + 10 * inner + 4 * q + 8 * kv) + rows


def engine_weight_bytes(shape: ModelShape, config: TrainConfig) -> int:
    """Of one engine. Of the formats, int8 and fp4 concern experts alone; embedding and head stay as they are."""
    rounds = config.use_vllm and "fp8" in (config.vllm_quantization or "")
    return _width(config) * shape.parameters - rounds * shape.decoder_parameters


def _engine(shape: ModelShape, config: TrainConfig, machine: Machine, context: int) -> list[Item]:
    weights = engine_weight_bytes(shape, config)
    if config.uses_servers:
        return []
    if not config.use_vllm:
        cache = config.per_device_train_batch_size * context * shape.kv_bytes_per_token
        return [
            Item("engine weights", weights, True, "Hugging Face generate"),
            Item("KV cache", cache, False, f"{shape.kv_bytes_per_token} bytes per token"),
        ]
    if machine.device == "cpu":
        cache = round(config.vllm_cpu_kvcache_gib * GIB)
        note = f"{cache // shape.kv_bytes_per_token} tokens"
        return [Item("engine weights", weights, True, "vLLM"), Item("KV cache", cache, True, note)]
    weights //= config.vllm_tensor_parallel_size
    share = round(config.vllm_gpu_memory_utilization * machine.memory)
    cache = max(0, share - weights)
    per_token = max(1, shape.kv_bytes_per_token // config.vllm_tensor_parallel_size)
    note = f"{cache // per_token} tokens; vLLM takes {config.vllm_gpu_memory_utilization:.0%} of the GPU"
    return [Item("engine weights", weights, True, "vLLM"), Item("KV cache", cache, True, note)]


def _suggestions(config: TrainConfig, machine: Machine, sharded: bool) -> tuple[str, ...]:
    said = []
    beside = config.colocates and machine.device == "cuda"
    if beside and not config.engine_sleeps:
        keys = f"vllm_enable_sleep_mode: true, {config.lag_key}: 0"
        said.append(f"let the engine sleep while the learner works ({keys})")
    if beside and config.vllm_gpu_memory_utilization > 0.3:
        said.append("lower vllm_gpu_memory_utilization, or let vLLM run elsewhere")
    if not config.gradient_checkpointing:
        said.append("set gradient_checkpointing: true")
    if config.token_budget is None:
        said.append("set token_budget to the longest sequence")
    if machine.processes > 1 and not sharded:
        said.append("shard the model (recipes/accelerate/fsdp2.yaml)")
    if machine.processes == 1 and machine.device == "cuda":
        said.append("use more GPUs with recipes/accelerate/fsdp2.yaml")
    if not config.use_peft:
        said.append("train adapters with use_peft: true")
    if "8bit" not in config.optim:
        said.append("set optim: paged_adamw_8bit" if machine.device == "cuda" else "take a smaller model")
    return tuple(said)
