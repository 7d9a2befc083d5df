"""``igrpo train`` whose engine sleeps as it would on a GPU, and lines that tell who did what in which order: vLLM's CPU
build stops and starts its scheduler too, only memory it gives back none."""

import sys

TOLD = "who: "


def tell(owner: type, name: str, who: str) -> None:
    original = getattr(owner, name)

    def call(self, *args, **named):
        print(TOLD + who.format(*args, **named), flush=True)
        return original(self, *args, **named)

    setattr(owner, name, call)


def start(self) -> None:
    begin(self)
    self._sleeps = True


if __name__ == "__main__":
    from vllm import LLM

    from igrpo import train
    from igrpo.engines.vllm_engine import VLLMEngine
    from igrpo.learner.learner import Learner

    begin, VLLMEngine._start = VLLMEngine._start, start
    for method in ("train_on", "score", "save", "load"):
        tell(Learner, method, f"learner {method}")
    tell(LLM, "sleep", "sleep {level}")
    tell(LLM, "wake_up", "wake {tags[0]}")
    tell(LLM, "collective_rpc", "{0}")
    tell(VLLMEngine, "submit", "engine submit")
    tell(VLLMEngine, "score", "engine score")
    sys.exit(train.main())
