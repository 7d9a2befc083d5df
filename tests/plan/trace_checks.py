"""What the tracer sees of programs whose memory, waits and collectives are known; run by ``test_rehearsal.py``."""

import json
from types import SimpleNamespace

import torch
import torch.distributed as dist

from igrpo.data_types import TrainingSample
from igrpo.learner.batching import Denominators, micro_batch
from igrpo.learner.metrics import Accumulator
from igrpo.learner.packing import PrefixGroup
from igrpo.plan import main
from igrpo.plan.device_trace import DeviceTrace
from igrpo.plan.fake_devices import FakeGPUMode, fake_gpus

MIB = 2**20
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


def run(recipe):
    """Prints a line of JSON, then the rehearsal of ``recipe``."""
    trace, found = DeviceTrace(), {}
    with fake_gpus(4, 80 * 2**30, trace.wait), FakeGPUMode(), trace:
        for check in (allocation, backward, resized, waits, line, collectives):
            found[check.__name__] = check(trace)
    print("FOUND " + json.dumps(found))
    return main([recipe, "--hardware", "8xA100-80G", "--rehearse"])
