"""What reaches a terminal: our own warnings in any case, and nobody's text as commands to the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST = 4000
"""Characters of one message."""
LEVELS = {"igrpo": logging.INFO, "igrpo_kernels": logging.WARNING}


def printable(text: object, limit: int = LONGEST, lines: bool = False) -> str:
    r"""The text on one line, with escapes in place of what a terminal would obey or could not show: control characters,
    carriage returns, marks that turn the direction of writing, lone surrogates.

    Args:
        limit: characters; what is longer loses its middle.
        lines: ends of lines stay.

    Example: ``printable("a\x1b[2Jb\r\n")`` is ``"a\\x1b[2Jb\\r\\n"``
    """
    text = str(text)
    if len(text) > limit:
        text = f"{text[: limit - limit // 4]} … {len(text) - limit} characters … {text[len(text) - limit // 4 :]}"
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def print_error(error: object, hint: str = "", lines: bool = False) -> None:
    """``error: …``, as every command ends that cannot do what it was asked for, and a line on what to do next."""
    print(f"error: {printable(error, lines=lines)}", file=sys.stderr)
    if hint:
        print(printable(hint), file=sys.stderr)
    sys.stderr.flush()


class Warnings(logging.Handler):
    """Shows messages of this package, and keeps the warnings among them until they are taken.

    They go to the ``sys.stderr`` of the moment: the live view puts one in its place that does not tear the picture.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.prefix = f"rank {rank}: " if rank else ""
        self._texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = printable(self.format(record), lines=True)
        if record.levelno >= logging.WARNING:
            self._texts.append(f"{self.prefix}{text}")
        try:
            print(f"{self.prefix}{level}{text}", file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads it any more: a warning must not end what it warns of
            self.handleError(record)

    def take(self) -> list[str]:
        """Warnings since the last call."""
        texts, self._texts = self._texts, []
        return texts


@contextmanager
def shown_warnings() -> Iterator[Warnings]:
    """While it lasts, messages of this package reach the terminal, whatever levels and handlers other libraries give
    the root logger; those of every process do, with its rank. So do Python warnings that the losses give."""
    shown = Warnings(int(os.environ.get("RANK", "0")))
    before, show = {}, warnings.showwarning

    def show_ours_as_messages(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
        if "igrpo_kernels" in Path(filename).parts:
            logging.getLogger("igrpo_kernels").warning("%s", message)
        else:
            show(message, category, filename, *rest)

    warnings.showwarning = show_ours_as_messages
    for name, level in LEVELS.items():
        logger = logging.getLogger(name)
        before[name] = logger.level, logger.propagate
        logger.addHandler(shown)
        logger.setLevel(level)
        logger.propagate = False  # or a library that configures the root logger says everything twice
    try:
        yield shown
    finally:
        warnings.showwarning = show
        for name, (level, propagate) in before.items():
            logger = logging.getLogger(name)
            logger.removeHandler(shown)
            logger.setLevel(level)
            logger.propagate = propagate


def quiet_libraries() -> None:
    """Loading bars and notices of other libraries would bury ours; whoever sets these variables keeps their say."""
    for name, value in {
        "ACCELERATE_LOG_LEVEL": "ERROR",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
