"""Our warnings reach a terminal whatever libraries do to logging, and no text reaches it as a command."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import warnings

import pytest

from igrpo.terminal import print_error, printable, shown_warnings
from igrpo_kernels import impls


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 数学, 🎉, ∫x²", "plain, größer, 数学, 🎉, ∫x²"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\tc\x00\x7f\x9b31m\x85", r"a\rb\tc\x00\x7f\x9b31m\x85"),
        ("abc\u202edef\u2066\u200f\u061c", r"abc\u202edef\u2066\u200f\u061c"),
        ("a\u2028b\ufeff\U000e0041\ud800", r"a\u2028b\ufeff\U000e0041\ud800"),
        ("two\nlines", r"two\nlines"),
    ],
)
def test_text_that_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown and printable(text).isprintable()


def test_long_text_keeps_both_ends():
    text = printable("a" * 10_000 + "end", 100)
    assert len(text) < 150 and text.startswith("aaa") and text.endswith("end") and "9903 characters" in text
    assert printable("a\nb\x1b\r\n", lines=True) == "a\nb\\x1b\\r\n"


def test_errors_are_one_line(capsys):
    print_error(ValueError("what\n\x1b[2J"), "and \x1b now")
    assert capsys.readouterr().err == "error: what\\n\\x1b[2J\nand \\x1b now\n"


def test_warnings_are_shown_once_and_kept(capsys):
    logger, kernels = logging.getLogger("igrpo.anything"), logging.getLogger("igrpo_kernels.impls")
    root, level = logging.getLogger(), logging.getLogger().level
    handler = logging.StreamHandler(sys.stderr)
    root.addHandler(handler)  # as a library does that calls logging.warning
    root.setLevel(logging.ERROR)  # as accelerate does with ACCELERATE_LOG_LEVEL=ERROR
    try:
        with shown_warnings() as shown:
            logger.info("a note")
            logger.warning("a \x1b[31mwarning %s", "of ours")
            kernels.warning("slow")
            kernels.info("unimportant")
            warnings.warn_explicit("plain PyTorch", RuntimeWarning, impls.__file__, 1)
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    lines = ["a note", r"warning: a \x1b[31mwarning of ours", "warning: slow", "warning: plain PyTorch"]
    assert capsys.readouterr().err.splitlines() == lines
    assert shown.take() == [r"a \x1b[31mwarning of ours", "slow", "plain PyTorch"] and shown.take() == []
    assert logging.getLogger("igrpo").propagate, "as it was before"


def test_a_warning_that_nobody_can_read_ends_nothing(monkeypatch):
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as closed, shown_warnings() as shown:
        monkeypatch.setattr(sys, "stderr", closed)
        logging.getLogger("igrpo.anything").warning("lost")
        monkeypatch.undo()
        assert shown.take() == ["lost"]
        with contextlib.suppress(BrokenPipeError):
            closed.close()


def test_other_ranks_say_who_they_are():
    code = "import logging; from igrpo.terminal import shown_warnings\nwith shown_warnings(): " \
        "logging.getLogger('igrpo.x').warning('two\\nlines')"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "RANK": "3"}, capture_output=True, text=True)
    assert done.stderr == "rank 3: warning: two\nlines\n"
