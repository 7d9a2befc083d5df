"""What the tracer sees of programs whose memory, waits and collectives are known; run by ``test_rehearsal.py``."""

import json
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from transformers import AutoConfig

from igrpo.config.train_config import TrainConfig
from igrpo.data_types import TrainingSample
from igrpo.learner.batching import Denominators, micro_batch
from igrpo.learner.metrics import Accumulator
from igrpo.learner.packing import PrefixGroup
from igrpo.machine import Machine
from igrpo.plan.command import main
from igrpo.plan.device_trace import DeviceTrace
from igrpo.plan.fake_devices import FakeGPUMode, fake_gpus
from igrpo.plan.memory import memory_plan
from igrpo.plan.rehearsal import rehearse
from igrpo.plan.shapes import model_shape
from tests.kernels import linear_on_fake_gpu

MIB = 2**20
WEIGHTS = ("master weights", "base weights", "adapters", "reference model", "averaged teacher")
TAUGHT = {"train_on_drafts": True, "distillation_weight": 1.0, "teacher_model_kind": "ema"}
GPU = torch.device("cuda", 0)


def empty(mebibytes):
    return torch.empty(mebibytes * MIB // 4, device=GPU)


def allocation(trace):
    with trace.phase("allocation") as phase, trace.owned("mine"):
        with trace.owned("kept"):
            kept = empty(2)
        gone = [empty(4)]
        gone.clear()
        empty(1)  # lives for a moment
    del kept
    return {"peak": phase.peak, "held": phase.held, "alive": dict(phase.alive)}


def backward(trace):
    weight = torch.ones(MIB // 4, device=GPU, requires_grad=True)
    with trace.phase("backward") as phase:
        (weight * weight).sum().backward()
    return phase.peak


def resized(trace):
    tensor, sizes = empty(1), []
    for nbytes in (MIB, 0, MIB):
        tensor.untyped_storage().resize_(nbytes)
        sizes.append(trace.current)
    return [size - min(sizes) for size in sizes]


def waits(trace):
    with trace.phase("waits") as phase:
        some = torch.ones(8, device="cpu").to(GPU)
        some.to("cpu", non_blocking=True)
        some.cpu()
        float(some.sum())
        if some[0] > 0:
            raise AssertionError("no value is true")
        some.nonzero()
        some.tolist()
        torch.cuda.synchronize()
    return {what: times for (what, _), times in phase.waits.items()}


def line(trace):
    sample = TrainingSample((1, 2), (3, 4), (0.0, 0.0), 1.0)
    processes = SimpleNamespace(reduce=lambda tensor, reduction: tensor)
    with trace.phase("line") as phase:
        micro_batch((PrefixGroup((1, 2), (sample,)),), Denominators(1.0, 2.0), "dapo").to(GPU)  # no wait
        Accumulator().end_step(torch.zeros((), device=GPU), torch.zeros((), device=GPU), processes)
    return [line for _, line in phase.waits]


def collectives(trace):
    with trace.phase("collectives") as phase:
        dist.all_reduce(empty(1))
        for _ in range(2):
            dist.all_gather_into_tensor(empty(4), empty(1))
    return {name: [traffic.calls, traffic.bytes] for name, traffic in phase.collectives.items()}


CHOSEN = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}


def planned(made):
    """By devices and settings: what ``memory_plan`` says over what the rehearsal finds; what is at most on the GPU
    while the model loads over the weights that it keeps there; how often the host waits in micro-batches."""
    kept, adapters = {"gradient_checkpointing": False}, {"use_peft": True, "lora_r": 2}
    alone = adapters | {"lora_sync": "adapter"}
    cases = ((8, {}), (8, kept), (8, alone), (1, {}), (1, kept), (1, adapters), (16, {"beta": 0.04}))
    cases += ((8, TAUGHT), (8, {"activation_offloading": True}), (8, {"fsdp_offload_params": True}))
    cases += ((8, {"experts": 16}), (1, {"experts": 16}))
    common = {"bf16": True, "token_budget": 8192, "gradient_checkpointing": True}
    ratios, loaded, waited = {}, {}, {}
    for devices, settings in cases:
        offloads = "fsdp_offload_params" in settings  # accelerate's, not the recipe's
        os.environ["FSDP_OFFLOAD_PARAMS"] = str(offloads).lower()
        mixed = {**made.to_dict(), **CHOSEN, "model_type": "qwen3_moe"} if "experts" in settings else None
        shapes = AutoConfig.for_model(**mixed) if mixed else made
        own = {} if offloads or mixed else settings
        config = TrainConfig(model_name_or_path="m", dataset_name="d", **{**common, **own})
        AcceleratorState._reset_state(reset_partial_state=True)
        found = rehearse(shapes, config, devices, 2**34, prompt=100, completion=450, context=8192)
        machine = Machine("cuda", 2**34, devices, offloads)
        plan = memory_plan(model_shape(shapes.to_dict()), config, machine, context=8192, sharded=devices > 1)
        ratios[f"{devices} {settings}"] = plan.learner / found.peak
        if offloads:  # nothing is left there while it waits, and FSDP2 itself waits for its copies
            continue
        ratios[f"{devices} {settings}, waiting"] = plan.between / found.held
        weights = sum(item.bytes for item in plan.items if item.name in WEIGHTS)
        loaded[f"{devices} {settings}"] = found.phases["loading"].peak / weights
        waited[f"{devices} {settings}"] = found.phases["micro-batches"].waits.total()
    del os.environ["FSDP_OFFLOAD_PARAMS"]
    return {"planned": ratios, "loaded": loaded, "waited": waited}


def run(recipe, sizes):
    """Prints a line of JSON, then the rehearsal of ``recipe``."""
    trace, found = DeviceTrace(), {}
    with fake_gpus(4, 80 * 2**30, trace.wait), FakeGPUMode(), trace:
        for check in (allocation, backward, resized, waits, line, collectives):
            found[check.__name__] = check(trace)
        found["linear loss"] = linear_on_fake_gpu.checks(trace)
    found |= planned(AutoConfig.for_model(**sizes))
    print("FOUND " + json.dumps(found))
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([recipe, "--hardware", "8xA100-80G", "--rehearse"])
