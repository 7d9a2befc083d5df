"""Weights on their way to an engine: checksums, and reading them back from the engine's model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from igrpo.data_types import Runs

FILE_BACKEND = "igrpo_file"
"""Name under which vLLM's servers know ``vllm_worker.FileWeightTransferEngine``."""


PIECE = 2**21
"""Elements whose fingerprint is taken at a time."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor) -> str:
    """Hash of the tensor's bytes; shape and dtype are compared beside it."""
    import xxhash

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(flat.numpy())


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """() int64 of the bits and their places, left on its device, without a copy of a contiguous tensor.

    The sum of the elements' bits as numbers, each times an odd number of its place, modulo 2^64: one element that
    changed, or two of up to 4 bytes that changed places, always change it.
    """
    flat = tensor.detach().reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), PIECE):
        part = bits[start : start + PIECE]
        total += (part * torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=flat.device)).sum()
    return total


class Sent(NamedTuple):
    """What is remembered of a tensor that went to an engine."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: torch.Tensor
    tensor: torch.Tensor | None
    """Itself, if the engine may keep it in another dtype: a router's correction, in a model of bf16."""


def recorded(
    named_tensors: Iterable[tuple[str, torch.Tensor]], sent: dict[str, Sent], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors on their way to an engine of ``dtype``, noted in ``sent``; none of that dtype is kept."""
    for name, tensor in named_tensors:
        noted = Sent(tuple(tensor.shape), tensor.dtype, fingerprint(tensor), None if tensor.dtype == dtype else tensor)
        yield name, tensor
        del tensor
        sent[name] = noted  # after the engine came back for the next one


def differing(model: torch.nn.Module, sent: Mapping[str, Sent]) -> tuple[int, list[str]]:
    """How many of ``twins`` there are, and which of them are not bit for bit what was sent."""
    same = {}
    for name, kept in twins(model, {name: one.shape for name, one in sent.items()}):
        _, dtype, expected, tensor = sent[name]
        if tensor is not None:
            expected = fingerprint(tensor.to(kept.dtype))
        elif kept.dtype != dtype:  # a wider one, which holds the same numbers
            kept = kept.to(dtype)
        same[name] = fingerprint(kept) == expected.to(kept.device)
    equal = torch.stack([*same.values()]).tolist() if same else []
    return len(same), [name for name, one in zip(same, equal, strict=True) if not one]


def twins(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that the engine keeps as they were sent, under the names that they were sent with: embedding, norms,
    plain layers. vLLM's names may have another prefix, which the model's own mapper knows.

    Merged, sharded, repacked or rounded layers (qkv, gate-up, tensor parallelism, the CPU's linear layers, fp8) have no
    twin, and
    square matrices are taken for none: GPT-2's are turned round. An embedding may have rows of padding behind those
    that were sent; they are cut off.
    """
    mapper, own = getattr(model, "hf_to_vllm_mapper", None), dict(model.named_parameters())
    for name, sent in shapes.items():
        known = next(iter(mapper.apply_list([name])), "") if mapper else name
        if known.split(".")[-2:] != name.split(".")[-2:] or known not in own or len(set(sent)) < len(sent):
            continue
        parameter = own[known]
        if (
            parameter.element_size() > 1
            and parameter.dim() == len(sent)
            and len(parameter) >= sent[0]
            and parameter.shape[1:] == sent[1:]
        ):
            yield name, parameter.data[: sent[0]]


def forget_packed_experts(model: torch.nn.Module) -> None:
    """vLLM's CPU backend packs experts when it sets up their kernel, and a reload keeps the kernel that is there: plain
    rows would be read as packed ones. Without a kernel the reload sets up a new one. To be called before it."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if getattr(method, "moe_kernel", None) is not None and next(layer.parameters()).device.type == "cpu":
            method.moe_kernel = None


def repack_tied_head(model: torch.nn.Module) -> None:
    """vLLM's CPU backend multiplies by a repacked copy of the head. A reload renews the copies of layers that get
    tensors of their own; a head tied to the embedding gets none and would go on sampling from the old weights."""
    head = getattr(model, "lm_head", None)
    if head is None or not hasattr(head, "cpu_linear"):
        return
    tied = any(m is not head and getattr(m, "weight", None) is head.weight for m in model.modules())
    if tied:
        head.quant_method.process_weights_after_loading(head)


def runs_of(sample: Any, sent_at: int) -> Runs:
    """Which weights vLLM's output is of; before 0.32 it does not tell, and all tokens count as of ``sent_at``."""
    spans = getattr(sample, "weight_versions", None)
    if spans is None:
        return ((sent_at, len(sample.token_ids)),)
    return tuple((int(span.version), span.end - span.start) for span in spans)
