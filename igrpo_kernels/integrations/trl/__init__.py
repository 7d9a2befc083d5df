"""TRL: `GRPOTrainer` with this package's loss, and with iGRPO's two stages on top.

    FusedGRPOTrainer   log-probabilities and loss straight from hidden states; logits never exist
    IGRPOTrainer       the same, and Stage 1 before every generation: N drafts per prompt, the best one is shown

Both are plain subclasses that override methods of the trainer; nothing of TRL is patched. The loss TRL would compute is
kept exactly (tests/integrations/test_trl.py compares ten training steps of every loss type). What these kernels do not
cover takes TRL's own path, and says so once in the log: image inputs, the router loss of mixture-of-experts models,
the adaptive entropy controller, `top_entropy_quantile` on several processes.
"""

import trl

SUPPORTED_VERSIONS = ("1.14", "1.15", "1.16")
"""TRL releases whose trainer these classes are tested with; its private methods change between releases."""


def check_version(version: str) -> None:
    """ImportError with one sentence for a TRL release that these classes do not know."""
    if ".".join(version.split(".")[:2]) not in SUPPORTED_VERSIONS:
        raise ImportError(
            f"igrpo_kernels.integrations.trl works with TRL {SUPPORTED_VERSIONS[0]} to {SUPPORTED_VERSIONS[-1]}, found "
            f"{version}: install one of these, or call igrpo_kernels.linear_grpo_loss in your own trainer"
        )


check_version(trl.__version__)

from igrpo_kernels.integrations.trl.fused import FusedGRPOTrainer  # noqa: E402
from igrpo_kernels.integrations.trl.two_stage import DEFAULT_DRAFT_TEMPLATE, IGRPOTrainer  # noqa: E402

__all__ = ["DEFAULT_DRAFT_TEMPLATE", "SUPPORTED_VERSIONS", "FusedGRPOTrainer", "IGRPOTrainer", "check_version"]
