"""Weights on their way to an engine: checksums, and reading them back from the engine's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

FILE_BACKEND = "igrpo_file"
"""Name under which vLLM's servers know ``vllm_worker.FileWeightTransferEngine``."""


def checksum(tensor: torch.Tensor) -> str:
    """Hash of the tensor's bytes; shape and dtype are compared beside it."""
    import xxhash

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_hexdigest(flat.numpy())


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the elements in fp64, left on its device: tells an optimiser step, not a flipped bit."""
    return tensor.detach().sum(dtype=torch.float64)


def twins(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that the engine keeps as they were sent, under the names that they were sent with: embedding, norms,
    plain layers. vLLM's names may have another prefix, which the model's own mapper knows.

    Merged, sharded or repacked layers (qkv, gate-up, tensor parallelism, the CPU's linear layers) have no twin, and
    square matrices are taken for none: GPT-2's are turned round. An embedding may have rows of padding behind those
    that were sent; they are cut off.
    """
    mapper, own = getattr(model, "hf_to_vllm_mapper", None), dict(model.named_parameters())
    for name, sent in shapes.items():
        known = next(iter(mapper.apply_list([name])), "") if mapper else name
        if known.split(".")[-2:] != name.split(".")[-2:] or known not in own or len(set(sent)) < len(sent):
            continue
        parameter = own[known]
        if parameter.dim() == len(sent) and len(parameter) >= sent[0] and parameter.shape[1:] == sent[1:]:
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
