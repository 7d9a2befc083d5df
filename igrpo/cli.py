"""One command for everything: ``igrpo VERB …``, also as ``python -m igrpo VERB …`` and ``python -m igrpo.VERB …``."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence

from igrpo.settings import EXIT_BAD_CONFIG, EXIT_INTERRUPTED, did_you_mean

# Verb -> what it does. Each is a module igrpo.VERB or igrpo.VERB.command with main(argv) -> exit code, imported only
# when it is asked for: `igrpo report` must not wait for torch.
VERBS = {
    "train": "train with iGRPO or GRPO from a recipe",
    "eval": "avg@n and pass@k of a model on benchmarks, on the bare prompt or two-stage",
    "report": "one HTML page with every figure and a completions browser, from one or more runs",
    "doctor": "check this machine for what a run needs",
    "plan": "predict memory, step time and GPU-hours of a recipe on given hardware",
}

HELP = """\
usage: igrpo VERB [options]

{verbs}

examples:
  igrpo doctor
  igrpo train --config recipes/quickstart.yaml
  igrpo train --config recipes/quickstart.yaml --algorithm grpo --output_dir runs/grpo
  igrpo report runs/quickstart runs/grpo -o report.html
  igrpo eval --model runs/quickstart/checkpoint-24 --benchmarks gsm8k --n 8
  igrpo plan recipes/openmath-nemotron-7b.yaml --hardware 16xA100-80G

`igrpo VERB --help` has the options of a verb and more examples. `python -m igrpo.VERB` is the same as `igrpo VERB`.
Exit codes: 0 done; 2 a mistake in the command or the settings; 130 stopped by Ctrl-C; others are the verb's own.
"""

EXIT_PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return _run(words)
        finally:  # also where a verb leaves by SystemExit: what is left to write would fail when nobody catches it
            sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `igrpo train --help | head`: nobody reads on, so there is nothing left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED


def help_text() -> str:
    return HELP.format(verbs="\n".join(f"  {verb:8} {text}" for verb, text in VERBS.items()))


def _run(words: list[str]) -> int:
    if not words:
        print(help_text(), file=sys.stderr)
        return EXIT_BAD_CONFIG
    verb, rest = words[0], words[1:]
    if verb in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if verb == "--version":
        print(f"igrpo {importlib.metadata.version('igrpo')}")
        return 0
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS, f"; verbs: {', '.join(VERBS)}", cutoff=0.5)
        print(f"error: igrpo {verb}: there is no such verb{hint}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    return main_of(verb)(rest)


def main_of(verb: str) -> Callable[[Sequence[str]], int]:
    room = importlib.util.find_spec(f"igrpo.{verb}").submodule_search_locations is not None  # type: ignore[union-attr]
    return importlib.import_module(f"igrpo.{verb}.command" if room else f"igrpo.{verb}").main
