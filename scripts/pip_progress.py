"""Runs pip with one line of progress, and turns its failures into one sentence. Standard library only."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EVERY = 30.0
"""Seconds between lines where the output is no terminal."""
WHEEL = re.compile(
    r"^ *(?:Downloading|Using cached|Processing) (?:\S*/)?([^\s/]+?)(?<!\.metadata)(?: \((.*?)\))?$", re.MULTILINE
)
"""Name and size of a package that pip fetched, but not of one whose requirements it only read."""


class PipFailed(Exception):
    """One sentence."""

    def __init__(self, sentence: str, *, not_found: bool = False, unreachable: bool = False):
        super().__init__(sentence)
        self.not_found = not_found
        """The indexes answered, and none has it."""
        self.unreachable = unreachable


def run_pip(venv: Path, what: str, *words: str | Path, environment: dict[str, str] | None = None) -> None:
    """``pip install --no-deps WORDS`` in ``venv``; its output goes to ``venv/setup.log``.

    Raises:
        PipFailed: pip did not end well.
    """
    command = [venv / "bin" / "python", "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install",
               "--no-deps", *words]  # fmt: skip
    log = venv / "setup.log"
    before = log.stat().st_size if log.is_file() else 0
    with tempfile.TemporaryDirectory(dir=venv, prefix="pip-") as scratch:  # /tmp may be small
        # A machine's own constraints, or its wish for --user, can only break a list that is pinned whole.
        settings = {"PIP_CONSTRAINT": os.devnull, "PIP_USER": "0", "PIP_QUIET": "0", "PIP_PROGRESS_BAR": "off",
                    "TMPDIR": scratch}  # fmt: skip
        if "SSL_CERT_FILE" in os.environ:  # of a network with a certificate of its own; pip alone would not look at it
            settings["PIP_CERT"] = os.environ.get("PIP_CERT", os.environ["SSL_CERT_FILE"])
        everything = {**os.environ, **settings, **(environment or {})}
        with log.open("ab") as output:
            pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=everything)
        try:
            watch(pip, what, venv, log, before, lines_of(words))
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    if pip.returncode:
        raise failure(what, read(log, before), venv)


def lines_of(words: tuple[str | Path, ...]) -> int:
    """How many packages are asked for."""
    if "-r" not in words:
        return 1
    text = Path(words[words.index("-r") + 1]).read_text(encoding="utf-8")
    return sum(bool(line) and not line.startswith("#") for line in text.splitlines())


def watch(pip: subprocess.Popen, what: str, venv: Path, log: Path, before: int, total: int) -> None:
    """One line that is written over on a terminal, and elsewhere a new line every ``EVERY`` seconds."""
    terminal, start = sys.stdout.isatty(), time.monotonic()
    said = start
    there = installed(venv)
    while pip.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now - said < (0.5 if terminal else EVERY):
            continue
        said = now
        line = f"  {round(now - start):3d} s  {what}: {stage(read(log, before), installed(venv) - there, total)}"
        print(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}" if terminal else line,
              end="" if terminal else "\n", flush=True)  # fmt: skip
    if terminal:
        print("\r\x1b[K", end="", flush=True)


def installed(venv: Path) -> int:
    return sum(1 for _ in venv.glob("lib/python3*/site-packages/*.dist-info"))


def read(log: Path, before: int) -> str:
    with log.open("rb") as handle:
        handle.seek(before)
        return handle.read().decode(errors="replace")


def stage(text: str, done: int, total: int) -> str:
    """What pip is at, from what it has printed so far."""
    if "Installing collected packages" in text:
        return f"{done} of {total} installed" if total > 1 else "installing"
    wheels = WHEEL.findall(text)
    if wheels and total > 1:
        name, size = wheels[-1]
        return f"{len(wheels)} of {total} fetched, now {name.partition('-')[0]}{f' ({size})' if size else ''}"
    if total > 1:
        return f"{text.count('Collecting ')} of {total} looked up"
    return f"fetching {wheels[-1][1]}" if wheels and wheels[-1][1] else "at work"


def failure(what: str, text: str, venv: Path) -> PipFailed:
    """The sentence for what pip printed."""
    if "No space left on device" in text or "Disk quota exceeded" in text or shutil.disk_usage(venv).free < 10**8:
        return PipFailed(f"the disk of {venv.parent} is full; free some room and run make again")
    if "cannot be built." in text:
        return PipFailed(f"the C++ cannot be compiled ({venv.name}/setup.log has the compiler's words); name another "
                         "compiler with CXX, or go without it, slower, with IGRPO_SKIP_EXT=1")  # fmt: skip
    asked = re.search(r"No matching distribution found for (\S+)", text)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return PipFailed("the package index has a certificate that pip does not trust; name your network's own with "
                         "PIP_CERT=/path/to/file.pem", unreachable=True)  # fmt: skip
    if "Retrying (Retry(" in text or "Could not fetch URL" in text:
        return PipFailed("no package index can be reached; check the network, or name one with PIP_INDEX_URL",
                         unreachable=True)  # fmt: skip
    if asked:
        python = f"Python {sys.version_info[0]}.{sys.version_info[1]} on {os.uname().machine}"
        return PipFailed(f"the package index has no {asked.group(1)} for {python}; name one that has it with "
                         "PIP_EXTRA_INDEX_URL", not_found=True)  # fmt: skip
    errors = re.findall(r"^\s*(?:ERROR|error): (.+)$", text, re.MULTILINE)
    return PipFailed(f"pip could not install {what} ({errors[-1] if errors else 'it said nothing'}); its words are in "
                     f"{venv.name}/setup.log; mend that and run make again")  # fmt: skip
