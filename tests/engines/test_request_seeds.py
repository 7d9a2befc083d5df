"""On a GPU each request has a seed of its own, which vLLM's own code spreads over its completions; on the CPU none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.engine.parallel_sampling import ParentRequest

from igrpo.config.train_config import TrainConfig
from igrpo.engines import Request, Sampling
from igrpo.engines.vllm_engine import VLLMEngine

CONFIG = TrainConfig(model_name_or_path="m", dataset_name="d", output_dir="o")


class Asked(VLLMEngine):
    """The engine on a GPU, as far as what it asks of vLLM."""

    def __init__(self, on_gpu: bool, seed: int = 42):
        self.device = on_gpu
        super().__init__("m", CONFIG, 64, [2], seed)
        self._source = lambda: ()

    def _start(self) -> None:
        self.on_cpu = not self.device
        self.params = {}
        self.llm, self.version = None, 0
        self.engine = SimpleNamespace(
            add_request=lambda name, prompt, params, lora_request: self.params.__setitem__(name, params),
            engine_core=SimpleNamespace(shutdown=lambda: None),
        )

    def _set_environment(self) -> None:
        pass

    def _push(self, source, version: int) -> int:
        self.version = version
        return 1

    def ask(self, name: str, n: int = 4) -> None:
        self.submit(Request(name, (5, 6), n, Sampling(1.0, 8)))

    def seeds(self) -> dict[str, list[int]]:
        """Of each completion, by vLLM's own class for several completions of a prompt."""
        made = {}
        for name, params in self.params.items():
            parent = ParentRequest(SimpleNamespace(request_id=name, external_req_id=name, params=params))
            made[self._running[name][0].request_id] = [parent.get_child_info(i)[1].seed for i in range(params.n)]
        return made


def asked(names: str, seed: int = 42, step: int = 7) -> dict[str, list[int]]:
    engine = Asked(on_gpu=True, seed=seed)
    engine.seed(step)
    for name in names:
        engine.ask(name)
    return engine.seeds()


def test_a_request_samples_the_same_whatever_runs_beside_it():
    assert asked("abc") == asked("cab")
    drawn = (asked("abc"), asked("abc", seed=43), asked("abc", step=8))
    seeds = [seed for one in drawn for some in one.values() for seed in some]
    assert len(set(seeds)) == 3 * 3 * 4 and all(0 <= s < 2**63 for s in seeds)


def test_requests_that_start_over_keep_their_seeds():
    engine = Asked(on_gpu=True)
    engine.seed(7)
    engine.ask("a")
    before = engine.seeds()
    engine.seed(8)  # drafts of the next step were asked for under the seed before
    torch.cuda.empty_cache()
    engine.version = 3
    engine._mend(RuntimeError("died"))
    assert engine.seeds() == before
    assert [sent_at for *_, sent_at in engine._running.values()] == [3] == [engine.version]


@pytest.mark.parametrize("on_gpu", [True, False])
def test_the_learners_random_numbers_are_left_alone_on_a_gpu(on_gpu):
    engine, drawn = Asked(on_gpu), torch.get_rng_state()
    engine.seed(7)
    assert torch.equal(torch.get_rng_state(), drawn) is on_gpu
    engine.ask("a")
    assert [params.seed is None for params in engine.params.values()] == [not on_gpu]
    torch.set_rng_state(drawn)
