"""iGRPO in one file, with nothing but torch, transformers and `igrpo_kernels`.

Per prompt: sample N drafts, keep the best by reward, sample G refinements of prompt + best draft, train on those. The
tasks are sums, so that a reward needs no data. Sampling is Hugging Face's, which is slow; `igrpo train` has vLLM.

    python examples/plain_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 20
"""

import argparse
import random
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from igrpo_kernels import GRPOLossConfig, linear_grpo_loss

DRAFT = "\n\nAn earlier draft, which may be wrong:\n{draft}\nGive a better answer."


def reward(text: str, answer: int) -> float:
    """1 for the right number at the end, 0.1 for any number."""
    numbers = re.findall(r"-?\d+", text)
    return 0.0 if not numbers else 1.0 if int(numbers[-1]) == answer else 0.1


def padded(rows: list[list[int]], pad: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, L) and mask (B, L)."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


class Policy:
    """A model with its tokenizer: prompts, samples, hidden states."""

    def __init__(self, name: str, temperature: float, max_new_tokens: int):
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.pad = self.tokenizer.pad_token_id or 0
        self.end = self.tokenizer.eos_token_id

    def prompt(self, question: str, draft: list[int] | None = None) -> list[int]:
        if draft is not None:
            question += DRAFT.format(draft=self.tokenizer.decode(draft, skip_special_tokens=True))
        turns = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]]) -> list[list[int]]:
        ids, mask = padded(prompts, self.pad, "left")
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0,
            max_new_tokens=self.max_new_tokens, pad_token_id=self.pad,
        )[:, ids.shape[1] :]  # fmt: skip
        rows = out.tolist()
        return [row[: row.index(self.end) + 1] if self.end in row else row for row in rows]

    def hidden(self, prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, ...]:
        """Hidden states (B, T, H) whose row t predicts completion token t, with ids and mask (B, T)."""
        left, left_mask = padded(prompts, self.pad, "left")
        ids, mask = padded(completions, self.pad, "right")
        states = self.model.base_model(
            input_ids=torch.cat([left, ids], 1), attention_mask=torch.cat([left_mask, mask], 1), use_cache=False
        ).last_hidden_state
        return states[:, -ids.shape[1] - 1 : -1], ids, mask


def rollout(policy: Policy, tasks: list[tuple[str, int]], n: int, g: int) -> tuple[list, list, torch.Tensor, float]:
    """q' and refinements of P prompts (P·G rows), their rewards (P, G), and the mean reward of the drafts."""
    drafts = policy.sample([policy.prompt(q) for q, _ in tasks for _ in range(n)])
    scores = [reward(policy.tokenizer.decode(d), tasks[i // n][1]) for i, d in enumerate(drafts)]
    best = [max(range(p * n, (p + 1) * n), key=scores.__getitem__) for p in range(len(tasks))]  # first of the best
    prompts = [policy.prompt(q, drafts[b]) for (q, _), b in zip(tasks, best, strict=True) for _ in range(g)]
    refinements = policy.sample(prompts)
    rewards = [reward(policy.tokenizer.decode(r), tasks[i // g][1]) for i, r in enumerate(refinements)]
    return prompts, refinements, torch.tensor(rewards).view(-1, g), sum(scores) / len(scores)


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    for name, default in (("steps", 20), ("prompts", 4), ("drafts", 4), ("group", 4), ("max_new_tokens", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    numbers = random.Random(0)
    policy = Policy(args.model, temperature=0.7, max_new_tokens=args.max_new_tokens)
    optimizer = torch.optim.AdamW(policy.model.parameters(), args.learning_rate, weight_decay=0.0)
    config, log = GRPOLossConfig(loss_type="grpo", temperature=policy.temperature), []
    for step in range(args.steps):
        pairs = [(numbers.randrange(10), numbers.randrange(10)) for _ in range(args.prompts)]
        tasks = [(f"What is {a} + {b}? Answer with the number.", a + b) for a, b in pairs]
        prompts, refinements, rewards, draft_reward = rollout(policy, tasks, args.drafts, args.group)
        spread = rewards.std(dim=1, keepdim=True)
        advantages = torch.where(spread > 0, (rewards - rewards.mean(1, keepdim=True)) / spread, 0.0).flatten()
        head = policy.model.get_output_embeddings()
        hidden, ids, mask = policy.hidden(prompts, refinements)
        # one update per batch: the policy that sampled is the policy that is trained, so no old log-probabilities
        out = linear_grpo_loss(hidden, head.weight, ids, advantages, completion_mask=mask, config=config)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(
            {"draft": draft_reward, "refinement": float(rewards.mean()), "entropy": float(out.metrics["entropy"])}
        )
        print(f"step {step + 1}: " + "  ".join(f"{k} {v:.3f}" for k, v in log[-1].items()), flush=True)
    return log


if __name__ == "__main__":
    main()
