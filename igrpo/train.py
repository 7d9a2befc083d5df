"""iGRPO training: ``python -m igrpo.train --config recipes/quickstart.yaml`` or ``accelerate launch igrpo/train.py …``.

Each step of ``loop`` below:

    groups = run.sample(step)        two-stage GRPO, a coroutine per problem: igrpo/rollout/algorithm.py, one page
    run.train_on(groups, step)       one optimiser step on the groups: igrpo/learner/
    run.push_weights(step)           the engine samples from the new weights, verified: igrpo/engines/sync.py
    run.log, evaluate, save          igrpo/run/, igrpo/eval/sampling.py
"""

from __future__ import annotations

import sys

if __package__ in (None, ""):  # run as a script, this folder would lead the path and hide others' `data` or `models`
    sys.path[0] = sys.path[0].rpartition("igrpo")[0] or "."

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from igrpo.config.recipe import parse_args
from igrpo.config.train_config import TrainConfig
from igrpo.engines.servers.openmp import shared_cores
from igrpo.settings import (
    EXIT_BAD_CONFIG,
    EXIT_DISK_FULL,
    EXIT_ENGINE,
    EXIT_INTERRUPTED,
    EXIT_REWARD,
    EXIT_UPLOAD,
    ConfigError,
)
from igrpo.settings.shared import check_trackers
from igrpo.terminal import Warnings, print_error, quiet_libraries, shown_warnings

if TYPE_CHECKING:
    from igrpo.training_run import TrainingRun

# Everything heavy is imported inside functions: a mistake in a recipe is answered at once.


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a setting that cannot work, 3 the engine failed, 4 no room on the disk or no folder any
    more, 5 a reward function failed on everything, 6 the hub did not take the model, which is whole here, 130 stopped
    after a save, by Ctrl-C or a file."""
    try:
        config = parse_args(sys.argv[1:] if argv is None else argv)
        if config.uses_servers:
            from igrpo.engines.servers.auth import check_access

            check_access(config)
            os.environ.update(shared_cores(os.environ))
        return train(config)
    except ConfigError as error:
        print_error(error)
        return EXIT_BAD_CONFIG


def train(config: TrainConfig) -> int:
    """Trains from beginning to end; the exit codes are those of ``main``.

    Raises:
        ConfigError: before anything is written.
    """
    with shown_warnings() as warnings:  # what is shown of them goes into the metrics, too
        return _train(config, warnings)


def _train(config: TrainConfig, warnings: Warnings) -> int:
    quiet_libraries()
    check_trackers(config.trackers)
    from igrpo.engines import EngineError
    from igrpo.run.output_folder import DiskFullError, concerns, disk_is_full
    from igrpo.training_run import build

    try:
        with build(config) as run:
            run.warnings = warnings
            return loop(run)
    except EngineError as error:  # it did not start
        print_error(error, lines=True)
        return EXIT_ENGINE
    except DiskFullError as error:  # before the first step
        print_error(error)
        return EXIT_DISK_FULL
    except OSError as error:  # from a log; a checkpoint's would be a DiskFullError
        folder = Path(config.output_dir).expanduser()
        if not concerns(error, folder) and not disk_is_full(error, folder):
            raise
        print_error(error, how_to_go_on(folder))
        return EXIT_DISK_FULL


def loop(run: TrainingRun) -> int:
    from igrpo.engines import EngineError
    from igrpo.model_card import UploadError, upload_command
    from igrpo.rewards.workers.tally import RewardError
    from igrpo.rollout.metrics import rollout_metrics
    from igrpo.run.checkpoints import checkpoints
    from igrpo.run.output_folder import DiskFullError

    config, view = run.config, run.view
    stop = StopRequest()
    try:
        with view, stop:
            before = run.evaluate("before training") if run.step == 0 else {}
            while run.step < run.total_steps:
                start = time.perf_counter()
                step = run.step + 1
                groups, stats = run.sample(step)
                view.stage("learner")
                run.check_rewards(f"step {step}")
                metrics = rollout_metrics(groups, stats, config)
                metrics |= run.train_on(groups, step)
                view.stage("weights to the engine")
                metrics |= run.push_weights(step)
                run.step = step
                metrics["step_time"] = time.perf_counter() - start
                run.log(groups, metrics)
                if run.due(config.eval_steps) and step < run.total_steps:
                    run.evaluate(f"after step {step}")
                # The signal may reach processes in different steps, and all of them save together.
                stopping = any(run.learner.gather(stop.requested or run.folder.asked_to_stop()))
                if step == run.total_steps or stopping or run.due(config.save_steps):
                    run.save()
                if stopping:
                    view.say(f"stopped after step {step}; go on with --resume_from_checkpoint last")
                    return EXIT_INTERRUPTED
            run.report(before, run.evaluate("after training"))
        return 0
    except UploadError as error:
        saved = checkpoints(run.folder.path)[-1]
        print_error(error, f"nothing is lost: {upload_command(config, saved)}")
        return EXIT_UPLOAD
    except (EngineError, DiskFullError, RewardError) as error:
        print_error(error, how_to_go_on(run.folder.path), lines=True)
        codes = {EngineError: EXIT_ENGINE, DiskFullError: EXIT_DISK_FULL, RewardError: EXIT_REWARD}
        return next(code for kind, code in codes.items() if isinstance(error, kind))


def how_to_go_on(folder: Path) -> str:
    from igrpo.run.checkpoints import checkpoints

    saved = checkpoints(folder)
    if not saved:
        return "nothing was saved yet (save_steps): start the run again"
    return f"{saved[-1]} is whole; go on with the same command and --resume_from_checkpoint last"


class StopRequest:
    """Ctrl-C (or SIGTERM) once: finish the step, save, leave. Twice: leave now."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step; once more to stop now", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
