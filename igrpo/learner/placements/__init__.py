"""The placements, a file each. Which one a run has is said to ``accelerate launch``."""

from igrpo.learner.placement import Placement
from igrpo.learner.placements.fsdp2 import Fsdp2
from igrpo.learner.placements.whole import Whole
from igrpo.learner.placements.zero3 import Zero3


def launched(processes: int) -> type[Placement]:
    """The placement that this run was launched with.

    Raises:
        ConfigError: with settings that cannot work.
    """
    kind = next((kind for kind in (Zero3, Fsdp2) if kind.asked_for()), Whole)
    return Whole if kind is Fsdp2 and processes == 1 else kind
