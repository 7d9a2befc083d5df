"""Which form of micro-batch leaves a model what it is: packed, padded, or every sequence alone.

The learner reads sequences in a row with an attention of its own and meets the vocabulary only in the fused loss.
Before the first step its log-probabilities of made-up sequences are held against the model's own, taken from its whole
logits for one sequence at a time, and a packed kernel is run backward. The first form that passes is used; where none
does, another model would be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch

from igrpo.data_types import TrainingSample
from igrpo.learner.packed_attention import KERNELS, register_kernel, use_packed_attention, why_not_packable
from igrpo.learner.packing import Bin, prefix_groups
from igrpo.models.rotary import varies_with_length
from igrpo.settings import ConfigError
from igrpo_kernels.model_logits import text_config

EXACT, ROUNDED = {"cpu": 5e-4, "cuda": 0.02}, 0.1
"""Mean gap in nats per token that is no more than rounding: in float32, which a GPU may multiply as TF32, and in
bfloat16."""
_SHORT = 5
"""What windows are cut to for the check, so that a few tokens show whether they are kept."""


class Form(Enum):
    PACKED = "packed"
    PADDED = "padded"
    ALONE = "one by one"
    OWN = "by the model itself"
    """One by one, from whole logits: the truth."""


LogProbs = Callable[[Bin, Form], torch.Tensor]
"""(n,) of the samples' completion tokens at temperature 1."""


def find_form(
    models: Sequence[Any],
    log_probs: LogProbs,
    kernels: Sequence[str],
    context: int | None,
    tolerance: float,
    say: Callable[[str], None],
    agree: Callable[[str | None], str | None],
) -> Form:
    """Sets the models' attention and returns the form, with one line where it is not packed.

    Args:
        models: the policy's, and others of the same kind.
        kernels: of packed attention, the wanted one first.
        context: the engine's, in tokens; None: not known.
        tolerance: one of ``EXACT``, or ``ROUNDED``.
        agree: what any process found wrong, from what this one did: all must take the same form.

    Raises:
        ConfigError: no form has the model's own log-probabilities, or it reads the tokens it should predict.
    """
    model, asked = models[0], models[0].config._attn_implementation
    name = type(model).__name__

    def off_by(compute: Callable[[], torch.Tensor], attention: str) -> str | None:
        """What is wrong with the log-probabilities that ``compute`` makes with an attention; None if nothing is."""
        return agree(_off_by(compute, attention))

    def _off_by(compute: Callable[[], torch.Tensor], attention: str) -> str | None:
        try:
            for one in models:
                if attention in KERNELS:
                    use_packed_attention(one, attention, tried=True)
                else:
                    one.set_attn_implementation(attention)
            return _gap(compute(), own, ROUNDED if rounds(models[0].config._attn_implementation) else tolerance)
        except Exception as error:  # whatever a kernel or a model's own code raises: there is another way
            return str(error).strip().partition("\n")[0] or type(error).__name__
        finally:
            if attention in KERNELS:  # whichever form is taken in the end: through a tried one no gradient comes
                register_kernel(attention)

    with _short_windows(models):
        samples = _samples(model, context)
        together, apart = (tuple(prefix_groups(samples, shared)) for shared in (True, False))
        own = _truth(models, samples, log_probs, tolerance)
        varies = varies_with_length(model, context)
        reason = "its rotary factors are those of the longest sequence" if varies else why_not_packable(model)
        for kernel in kernels if reason is None else ():
            reason = off_by(lambda: log_probs(together, Form.PACKED), kernel)
            if reason is None:
                return Form.PACKED
            say(f"packed attention does without {kernel}: {reason}")
        for attention in dict.fromkeys((asked, "eager")):  # only eager caps scores, where a model does
            if not varies and off_by(lambda: log_probs(apart, Form.PADDED), attention) is None:
                say(f"micro-batches are padded, not packed: {name} cannot be packed, {reason}")
                return Form.PADDED
            wrong = off_by(lambda: _one_by_one(log_probs, apart, Form.ALONE), attention)
            if wrong is None:
                say(f"micro-batches hold one sequence each: {name} can be neither packed nor padded, {reason}")
                return Form.ALONE
    raise ConfigError(
        f"model_name_or_path: {name} does more between its hidden states and its logits than the fused loss knows "
        f"({wrong}); choose another model"
    )


def rounds(attention: str) -> bool:
    """Whether a kernel is checked in training's dtype: it reads 16 bits only, or is compiled for one dtype."""
    return attention.startswith(("flash", "flex")) or attention in (
        KERNELS["flex_attention"],
        KERNELS["flash_attention_2"],
    )


def _truth(
    models: Sequence[Any], samples: Sequence[TrainingSample], log_probs: LogProbs, tolerance: float
) -> torch.Tensor:
    """(n,) with transformers' plain attention, which leaves nothing out.

    Raises:
        ConfigError: a token's log-probability changes with what follows it.
    """
    asked = models[0].config._attn_implementation
    models[0].set_attn_implementation("eager")
    own = _one_by_one(log_probs, tuple(prefix_groups(samples, shared=False)), Form.OWN)
    last = samples[-1]
    half = len(last.completion_ids) // 2
    begun = TrainingSample(last.prompt_ids, last.completion_ids[:half], last.sampling_logprobs[:half], 0.0)
    alone = log_probs(tuple(prefix_groups([begun])), Form.OWN)
    models[0].set_attn_implementation(asked)
    if _gap(alone, own[-len(last.completion_ids) :][:half], tolerance) is not None:
        raise ConfigError(
            f"model_name_or_path: {type(models[0]).__name__} reads the tokens that it should predict; take a causal "
            "language model, or write is_decoder: true in its config.json where it has that key"
        )
    return own


def _gap(found: torch.Tensor, own: torch.Tensor, tolerance: float) -> str | None:
    gap = float((found - own).abs().mean())
    return None if gap <= tolerance else f"its log-probabilities are off by {gap:.2g} nats"


def _one_by_one(log_probs: LogProbs, groups: Bin, form: Form) -> torch.Tensor:
    return torch.cat([log_probs((group,), form) for group in groups])


def _samples(model: Any, context: int | None) -> list[TrainingSample]:
    """Two prompts with two completions each, all lengths different; nothing in them is the padding token."""
    text = text_config(model.config)
    ids = [i for i in range(3, min(text.vocab_size, 1003)) if i != getattr(text, "pad_token_id", None)] or [0]
    room = min(context or 1024, getattr(text, "max_position_embeddings", None) or 1024)
    prompts, completions = ((3, 19), (4, 13)) if room >= 32 else ((2, 3), (2, 4))
    drawn = torch.Generator().manual_seed(0)

    def some(count: int) -> tuple[int, ...]:
        return tuple(ids[int(i)] for i in torch.randint(len(ids), (count,), generator=drawn))

    made = []
    for prompt in map(some, prompts):
        made += [TrainingSample(prompt, some(c), (0.0,) * c, 0.0) for c in completions]
    return made


@contextmanager
def _short_windows(models: Sequence[Any]) -> Iterator[None]:
    """Sliding windows and chunks of a few tokens, in configs and modules alike."""
    owners: dict[int, Any] = {}
    for model in models:
        for module in model.modules():
            owners |= {id(one): one for one in (module, getattr(module, "config", None)) if one is not None}
    cut = [
        (owner, name, value)
        for owner in owners.values()
        for name in ("sliding_window", "attention_chunk_size")
        if isinstance(value := vars(owner).get(name), int) and value > _SHORT
    ]
    try:
        for owner, name, _ in cut:
            setattr(owner, name, _SHORT)
        yield
    finally:
        for owner, name, value in cut:
            setattr(owner, name, value)
