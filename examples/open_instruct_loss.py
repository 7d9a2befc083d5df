"""open-instruct and other plain PyTorch loops: packed rows, an advantage per token, one call instead of a dozen lines.

Where `grpo_fast.py` computes log-probabilities, ratio, clipped loss and its mean from the model's logits,

    new_logprobs = log_softmax_and_gather(model(...).logits[:, :-1] / temperature, query_responses[:, 1:])
    ratio = torch.exp(new_logprobs - old_logprobs)
    pg_loss = torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - clip_lower, 1 + clip_higher))
    loss = masked_mean(pg_loss, response_masks)

this takes the hidden states, and the logits are never stored.
"""

import torch

from igrpo_kernels import GRPOLossConfig, GRPOLossOutput, linear_grpo_loss


def loss_of_packed_rows(
    model: torch.nn.Module,
    query_responses: torch.Tensor,  # (B, L), several prompts and responses per row
    attention_masks: torch.Tensor,  # (B, L)
    position_ids: torch.Tensor,  # (B, L)
    response_masks: torch.Tensor,  # (B, L), 1 on response tokens
    old_logprobs: torch.Tensor,  # (B, L - 1)
    advantages: torch.Tensor,  # (B, L), per token
    *,
    clip_lower: float,
    clip_higher: float,
    temperature: float,
    tokens_in_step: float,
) -> GRPOLossOutput:
    """The token mean over the whole step (DAPO); sequences need no boundaries, since nothing here is per sequence."""
    hidden = model.base_model(query_responses, attention_mask=attention_masks, position_ids=position_ids)[0]
    return linear_grpo_loss(
        hidden[:, :-1],
        model.get_output_embeddings().weight,
        query_responses[:, 1:],
        advantages[:, 1:],
        completion_mask=response_masks[:, 1:],
        old_per_token_logps=old_logprobs,
        num_items_in_batch=tokens_in_step,
        config=GRPOLossConfig(loss_type="dapo", epsilon=clip_lower, epsilon_high=clip_higher, temperature=temperature),
    )
