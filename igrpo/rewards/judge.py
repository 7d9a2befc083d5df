"""A generative judge: a model behind an OpenAI-compatible endpoint gives each completion a score from 0 to 1.

Its calls wait for a network, not for a processor, so they run in threads of the main process (``workers/pool.py``), as
many at once as ``judge_max_concurrency`` says. The client repeats failed requests, waiting longer each time; a reply is
asked for once and then remembered, on disk too with ``judge_cache``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igrpo.data_types import Message
from igrpo.log_lines import read_lines
from igrpo.rewards.config import RewardConfig
from igrpo.rewards.grading.passages import completion_text
from igrpo.settings import ConfigError, key_from_environment

CHECK_SECONDS = 10.0
_SCORE_LINE = re.compile(
    r"""(?:^|(?<!max)(?<!min)[.!?;]\s+)(?:(?:the|my|final|overall|total)\ )*score\s*
    (?:\((?:(?:from|between)\ )?0(?:\.0)?\s*(?:to|and|-|\u2013|,)\s*1(?:\.0)?\)\s*|\(?out\ of\ 1(?:\.0)?\)?\s*)?
    (?:[:=]|\bis\b)\s*
    (?P<number>\+?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]{1,3})?)
    \s*(?:(?:/|\bout\ of\b)\s*(?P<of>[0-9]+(?:\.[0-9]+)?)|(?P<percent>%|percent))?\s*\.?$""",
    re.VERBOSE | re.IGNORECASE,
)
_DECORATION = re.compile(
    r"\\(?:boxed|text|textbf|mathbf)\s*\{|^\s*(?:[->]|\#+)\s|(?<!\w)[*`$_{}\[\]\"]+|[*`$_{}\[\]\"]+(?!\w)|\\(?=%)"
)
NOT_READ = (
    "Your reply does not end in a score that can be read. Write one line and nothing else: Score: X, X from 0 to 1."
)


class JudgeError(RuntimeError):
    """One completion could not be judged."""


def read_score(reply: str) -> float | None:
    """The score in the last line of a judge's reply, whatever marks it up; None when that line is anything else than
    one number from 0 to 1, also written as 8/10, 80 % or JSON.

    A number that has to be guessed at is none: a sign, a range, a decimal comma, digits that are not ASCII, a second
    number, further words. Lines before the last one may quote what the answer says of itself.

    Example: ``read_score("Right.\\n**Score:** 0.8/1")`` is 0.8, ``read_score("Score: 0-1")`` is None.
    """
    lines = [line for line in reply.splitlines() if line.strip("`*_$-= \t")]
    if not lines:
        return None
    try:
        fields = json.loads(reply.strip().removeprefix("```json").strip("`"))
        line = f"score: {fields['score']}"
    except (ValueError, TypeError, KeyError, RecursionError):
        line = lines[-1]
    found = _SCORE_LINE.search(_DECORATION.sub("", line).strip())
    if found is None:
        return None
    score = float(found["number"])
    whole = 100.0 if found["percent"] else float(found["of"] or 1.0)
    return score / whole if whole and 0.0 <= score / whole <= 1.0 else None


class Judge:
    """Scores one completion at a time; may be called from several threads.

    Raises:
        ConfigError: the openai package is missing, or the key or the cache file cannot be used.
    """

    def __init__(self, config: RewardConfig) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise ConfigError(f"reward_funcs: judge needs the openai package ({error}); pip install openai") from error
        self.config = config
        self._key = key_from_environment(config.judge_api_key_env)
        self.client = OpenAI(
            base_url=config.judge_base_url,
            api_key=self._key or "none",  # servers of one's own often want no key
            timeout=config.judge_timeout,
            max_retries=config.judge_max_retries,
        )
        self._lock = threading.Lock()
        self._known: dict[str, float] = {}
        self._file: Any = None
        if config.judge_cache is not None:
            self._open_cache(Path(config.judge_cache).expanduser())

    def check(self) -> None:
        """Asks the endpoint for its models, so that a wrong address, key or name ends a run before it starts.

        Raises:
            ConfigError: what to change.
        """
        import openai

        url, model = self.config.judge_base_url, self.config.judge_model
        try:
            known = [one.id for one in self.client.with_options(timeout=CHECK_SECONDS, max_retries=1).models.list()]
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise ConfigError(f"judge_base_url: {url} cannot be reached ({reason}); is the server up?") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            env = self.config.judge_api_key_env
            raise ConfigError(f"judge_api_key_env: {url} refuses the key in ${env}; export {env}=…") from error
        except openai.NotFoundError:
            return  # an endpoint without a list of models; the first call will tell
        except openai.APIError as error:
            raise ConfigError(f"judge_base_url: {url} answers {self._safe(error)}") from None
        if model not in known:
            raise ConfigError(f"judge_model: {url} has no {model}; it has {', '.join(known[:5])}")

    def score(
        self, prompt: str | Sequence[Message], solution: str | Sequence[str], completion: str | Sequence[Message]
    ) -> float:
        """0.0 to 1.0.

        Raises:
            JudgeError: the endpoint failed for good, or its reply holds no score.
        TimeoutError: no answer in time, however often it was asked.
        """
        accepted = solution if isinstance(solution, str) else " or ".join(solution)
        text = self._request(prompt, accepted, completion_text(completion))
        key = hashlib.sha256(f"{self.config.judge_model}\0{self.config.judge_max_tokens}\0{text}".encode()).hexdigest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        messages: list[Message] = [{"role": "user", "content": text}]
        reply, cut = self._ask(messages)
        score = None if cut else read_score(reply)
        if score is None and self.config.judge_max_retries:
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": NOT_READ}]
            reply, cut = self._ask(messages)
            score = None if cut else read_score(reply)
        if score is None:
            how = (
                f"was cut after {self.config.judge_max_tokens} tokens" if cut else "ends without 'Score: X' from 0 to 1"
            )
            raise JudgeError(f"the judge's reply {how}: …{reply[-80:]!r}")
        self._remember(key, score, reply)
        return score

    def close(self) -> None:
        self.client.close()
        if self._file is not None:
            self._file.close()

    def _request(self, prompt: str | Sequence[Message], solution: str, completion: str) -> str:
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        values = {"question": question, "solution": solution, "completion": completion}
        # One pass, so that a placeholder's name inside a completion stays what it is; braces of LaTeX are left alone.
        return re.sub(r"\{(question|solution|completion)\}", lambda m: values[m[1]], self.config.judge_prompt)

    def _ask(self, messages: list[Message]) -> tuple[str, bool]:
        """A reply, and whether it was cut at its longest: its last number may then be the beginning of another."""
        import openai

        try:
            answer = self.client.chat.completions.create(
                model=self.config.judge_model or "",
                messages=messages,  # type: ignore[arg-type]
                temperature=0.0,
                max_completion_tokens=self.config.judge_max_tokens,
            )
        except openai.APITimeoutError as error:
            raise TimeoutError(f"no answer from the judge within {self.config.judge_timeout:g} s") from error
        except openai.APIError as error:
            reason = self._safe(error.__cause__ or error)
            raise JudgeError(f"{type(error).__name__} from {self.config.judge_base_url}: {reason}") from None
        return answer.choices[0].message.content or "", answer.choices[0].finish_reason == "length"

    def _safe(self, error: BaseException) -> str:
        """Its text without the key, which an endpoint's answer may repeat."""
        return str(error).replace(self._key, "***") if self._key else str(error)

    def _open_cache(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the length of the run
            last = None
            for last in read_lines(path):
                record = last.record or {}
                if not isinstance(record.get("key"), str) or not isinstance(record.get("reply"), str):
                    continue  # cut by a kill, or no line of ours
                score = read_score(record["reply"])
                if score is not None:  # an older file may hold scores that were misread
                    self._known[record["key"]] = score
            if last is not None and not last.whole:  # or the next line would be part of the one that was cut
                self._file.write("\n")
        except OSError as error:
            raise ConfigError(f"judge_cache: {path} cannot be used ({error})") from error

    def _remember(self, key: str, score: float, reply: str) -> None:
        with self._lock:
            self._known[key] = score
            if self._file is not None:
                self._file.write(json.dumps({"key": key, "score": score, "reply": reply}) + "\n")
                self._file.flush()
