"""Reading and comparing answers, on made-up cases, on hostile text and on every row of the benchmark files."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from random import Random

import pytest

from igrpo.data.sources import load_problems
from igrpo.rewards.functions import (
    accuracy,
)
from igrpo.rewards.functions import format as format_reward
from igrpo.rewards.grading.passages import extract_answer, last_boxed, without_answer

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark files are not at ../shared/data")


def score(completion: str, reference: str) -> float | None:
    return accuracy([completion], solution=[reference])[0]


# --- what counts as the answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer> <answer> 2 </answer> 3", "2"),
        (r"<answer>so \boxed{5}</answer>", "5"),
        (r"<think>\boxed{1}<answer>1</answer></think> \boxed{\frac{1}{2}} or 7", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        ("8 * 9 = 72\n#### 72\nbye", "72"),
        ("The answer is 5. No: the answer is **72**. I hope it is correct.", "72**"),
        ("**Final Answer:** $x^2$ as shown", "x^2"),
        ("Answer:\n72", "72"),
        ("The answer is 3.5 because 7/2 = 3.5", "3.5"),
        ("first 17, then 25 apples", "25"),
        ("we get 4 and $x = 72$.", "x = 72"),
        ("<think>72</think>", "72"),
        (r"\frac{1}{2} \sqrt{3}", r"\frac{1}{2} \sqrt{3}"),
        ("1 + 2", "1 + 2"),
        ("no idea", None),
        ("", None),
    ],
)
def test_one_passage_counts(completion, answer):
    assert extract_answer(completion) == answer


def test_without_markers_a_reference_in_words_is_compared_with_the_last_lines():
    assert extract_answer("thinking\n\n1 0\n0 1\n\n", words=True, lines=2) == "1 0\n0 1"
    assert extract_answer("thinking\nEvelyn", words=True) == "Evelyn"


@pytest.mark.parametrize(
    ("completion", "shown"),
    [
        ("<think>2 + 3 = 5</think><answer>5</answer>", "<think>2 + 3 = "),
        ("<think>15 apples, 5.5 less</think><answer>5</answer>", "<think>15 apples, 5.5 less</think>"),
        (r"It is 72: \boxed{72}", "It is "),
        ("5 + 0 is 5.\nThe answer is 5.", "5 + 0 is "),
        ("#### 8", "#### "),
        ("No idea.", "No idea."),
        ("", ""),
    ],
)
def test_a_completion_without_its_conclusion(completion, shown):
    assert without_answer(completion) == shown


def test_an_overlong_answer_is_none():
    assert extract_answer(f"<answer>{'7' * 2001}</answer>") is None
    assert last_boxed(r"\boxed{" + "7" * 2001 + "}") is None


RIGHT = {
    "72": ["72", r"\boxed{72}", "#### 72", "The answer is $72.", "<answer>72 apples</answer>", r"\boxed{072}", "72%",
           "<answer>The answer is 72.</answer>", "<answer>x = 72</answer>", "<answer>48 + 24 = 72</answer>",
           r"\boxed{72\text{ dollars}}", "<think>73</think> it is 72", "71 or 72", "<answer>about $72 a day</answer>"],
    "1,234": [r"\boxed{1234}", r"\boxed{1{,}234}", r"\boxed{1\,234}", r"\boxed{1,\!234}", "Costs $1,234.00 in total"],
    "He earns 3 * 4 = <<3*4=12>>12 a day.\n#### 12": [r"\boxed{12}", "<answer>12.0</answer>"],
    r"So the mass is $m=\boxed{4.5e33}$ g.": [r"\boxed{4.5 \times 10^{33}}", "<answer>4.5 x 10^33 g</answer>"],
    "100000": [r"\boxed{10^5}"],
    "0.5": [r"\boxed{\frac12}", "<answer>1/2</answer>", r"\boxed{.5}"],
    r"\frac{14}{3}": [r"\boxed{14/3}", r"\boxed{4\frac{2}{3}}", "<answer>4 2/3</answer>"],
    r"\frac{1}{3}": [r"\boxed{0.3333}"],
    r"50\%": [r"\boxed{50}", r"\boxed{0.5}"],
    "90": [r"\boxed{90^\circ}", "<answer>90°</answer>"],
    "864": [r"\boxed{864 \text{ in}^2}", "<answer>864 cm^2</answer>", "<answer>864 m</answer>"],
    "-3": ["<answer>−3</answer>", "so 5-8=-3", r"\boxed{- 3}"],
    "52_8": [r"\boxed{52_{8}}", r"\boxed{52}"],
    r"3\sqrt{13}": [r"\boxed{\sqrt{117}}", "<answer>3*sqrt(13)</answer>", "<answer>3√13</answer>"],
    r"\frac{\pi}{2}": ["<answer>pi/2</answer>", "<answer>π/2</answer>"],
    "x^3+3x-6": ["x^3 + 3x - 6", r"\boxed{3x+x^3-6}", "<answer>x**3 + 3*x - 6</answer>"],
    "1,-2": [r"\boxed{-2, 1}"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"\boxed{(3,\frac{\pi}{2})}"],
    r"x \in [-2,7]": [r"\boxed{[-2,7]}"],
    "y = 2x + 3": [r"\boxed{2x+3}", r"\boxed{y=3+2x}"],
    "5x - 7y + 4 = 0": [r"\boxed{-5x+7y-4=0}"],
    r"1 \pm \sqrt{19}": [r"\boxed{1+\sqrt{19}, 1-\sqrt{19}}"],
    r"\begin{pmatrix} -2 \\ -14 \end{pmatrix}": [r"\boxed{\begin{bmatrix}-2\\-14\end{bmatrix}}"],
    r"\text{Evelyn}": ["<answer>evelyn</answer>", "The answer is Evelyn.", "Evelyn"],
    r"\text{(C)}": [r"\boxed{C}", r"\boxed{\textbf{(C)}}"],
    "0 1\n1 0": ["reason\n\n0 1\n1 0"],
}  # fmt: skip

WRONG = {
    "72": ["<answer>72 or 73</answer>", "<answer>71, 72, 73</answer>", r"\boxed{72 \text{ or } 73}", "72 71", "7 72",
           r"\boxed{72} \boxed{73}", "<answer>72</answer><answer>5</answer>", "<answer>7</answer> 72", "", "It is 72x.",
           r"\boxed{48+24}", r"\boxed{\frac{144}{2}}", "<answer>144/2</answer>", r"\boxed{70 2}", r"\boxed{\infty}",
           r"\boxed{[71,73]}", r"\boxed{71<x<73}", r"\boxed{72\pm 1}", r"\boxed{\{71,72,73\}}", "<answer>72x</answer>",
           "<think>maybe 72</think>it is 73"],
    "7": ["3 + 4","What is 3 + 4? 3 + 4", r"\boxed{3+4}", "<answer>3 + 4</answer>"],
    "2": ["<answer>x^2</answer>", "<answer>2x</answer>"],
    "3": ["<answer>-3</answer>", "<answer>2-3</answer>"],
    "3e-8": ["<answer>0</answer>"],
    "1000000": ["<answer>1000001</answer>"],
    r"\frac{1}{3}": [r"\boxed{0.33}"],
    "52_8": [r"\boxed{42}", r"\boxed{52_9}"],
    "x^3+3x-6": [r"\boxed{x^3+3x+6}", r"\boxed{\text{no}}"],
    "1,-2": [r"\boxed{1}"],
    "(6,31,-1)": [r"\boxed{(31, 6, -1)}"],
    "(3,4]": [r"\boxed{[3,4]}"],
    "east": ["<answer>seat</answer>"],
    "True": ["<answer>rTue</answer>"],
    "1 2 3 4": ["<answer>10</answer>"],
    "2021-03-04": ["<answer>2014</answer>"],
    r"\text{Evelyn}": ["<answer>Evelyn or Carla</answer>"],
}  # fmt: skip


def cases(table):
    pairs = [(reference, text) for reference, texts in table.items() for text in texts]
    return [pytest.param(*pair, id=" <- ".join(pair)) for pair in pairs]


@pytest.mark.parametrize(("reference", "completion"), cases(RIGHT))
def test_right_answers(reference, completion):
    assert score(completion, reference) == 1.0


@pytest.mark.parametrize(("reference", "completion"), cases(WRONG))
def test_wrong_answers_and_attempts_to_hedge(reference, completion):
    assert score(completion, reference) == 0.0


def test_an_unreadable_reference_is_not_judged():
    assert score("72", "  ") is None
    assert score(r"\boxed{72}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}") is None, "math-verify cannot parse it"
    assert score(r"\boxed{\frac{1}{3} E_{1}+\frac{2}{3}E_{2}}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}") == 1.0


def test_messages_are_read_like_text():
    messages = [[{"role": "assistant", "content": r"\boxed{4}"}], [{"role": "assistant", "content": None}], []]
    assert accuracy(messages, solution=["4", "4", "4"]) == [1.0, 0.0, 0.0]
    assert format_reward([[{"role": "assistant", "content": "<think>a</think><answer>b</answer>"}]]) == [1.0]


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}", "python tower": "<answer>9**9**9**9</answer>",
    "power": r"\boxed{10^{1000000000}}", "factorial": r"\boxed{100000000!}",
    "sum": r"\boxed{\sum_{k=1}^{1000000000} \frac{1}{k^2}}", "binomial": r"\boxed{\binom{10000000}{5000000}}",
    "nested": r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}", "null": "\\boxed{\0}", "digits": "1" * 1_000_000,
    "open boxes": "\\boxed{" * 150_000, "tags": "<answer>" * 100_000, "answers": "answer is " * 100_000,
    "dollars": "$" * 1_000_001, "nulls": "\0" * 1_000_000, "hashes": "#" * 800_000, "numbers": "7 " * 500_000,
    "fractions": "\\frac{" * 200_000, "blanks": "x" + " " * 1_000_000 + "y",
    "tower over 1": r"\boxed{\frac{9^{9^{9^9}}}{1}}", "product": r"\boxed{9 \cdot 9^{9 \cdot 9^{9}}}",
    "factorials": r"\boxed{9!!!!!!}", "root": r"\boxed{\sqrt{9^{9^{99}}}}",
    "sum of powers": r"\boxed{1 + 9^{99999999} + x}", "root as power": r"\boxed{9^{\sqrt{9^{40}}}}",
    "braces": r"\boxed{{{{{9}}}^{{{{99999999}}}}}}", "matrix": r"\boxed{\begin{pmatrix} 9^{9^{9}} \\ 2 \end{pmatrix}}",
    "exponential": r"\boxed{e^{e^{e^{e^{9}}}}}", "binomial power": r"\boxed{(x+1)^{99999}}",
    "exponent": "<answer>1e" + "9" * 1900 + "</answer>",
    "powers of powers": r"\boxed{((((x+1)^{50})^{50})^{50})^{50}}",
    "many powers": r"\boxed{" + "9^{999} \\cdot " * 90 + "1}",
    "fractions in fractions": r"\boxed{" + r"\frac{1}{" * 150 + "9" + "}" * 150 + "}",
    "commas": "<answer>" + "7," * 900 + "7</answer>", "signs": "<answer>" + "-" * 1900 + "7</answer>",
    "relations": "<answer>" + "7<" * 900 + "7</answer>", "stars": "<answer>" + "*a " * 600 + "</answer>",
    "equals": "<answer>" + "7=" * 900 + "</answer>", "words": "<answer>" + "or " * 600 + "</answer>",
    "bars": "<answer>" + "|" * 1900 + "</answer>", "logarithm": r"\boxed{\log_{1}{5}}",
    "nothing to divide": r"\boxed{\frac{1}{0}}", "sines": r"\boxed{" + r"\sin " * 300 + "1}",
    "tangent": r"\boxed{\tan(10^{400})}", "roots": r"\boxed{" + r"\sqrt{" * 200 + "2" + "}" * 200 + "}",
    "plus minus": r"\boxed{" + r"\pm 1 " * 300 + "}", "subscripts": r"\boxed{" + "x_" * 600 + "1}",
    "emphasis": "<answer>" + "**a" * 600 + "</answer>", "superscripts": "<answer>" + "9\u2079" * 900 + "</answer>",
    "blanks in the answer": "<answer>" + " 1" * 900 + "</answer>", "unit": f"<answer>72 {'a' * 1900}#</answer>",
    "bare tower": "<answer>" + "2^" * 600 + "</answer>", "units": "<answer>5 " + r"\text{a} " * 200 + "x</answer>",
}  # fmt: skip


@pytest.mark.parametrize("reference", ["72", "x^2", r"\text{Evelyn}"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_wrong_and_quick(name, reference):
    started = time.monotonic()
    assert score(HOSTILE[name], reference) == 0.0
    assert time.monotonic() - started < 3.0  # normally milliseconds; a shared machine may be slow


def test_references_longer_than_pythons_integers_are_judged(tmp_path):
    digits = "7" * 5000
    (tmp_path / "rows.jsonl").write_text(
        f'{{"prompt": "a", "solution": {digits}}}\n{{"prompt": "a", "solution": "{digits}"}}'
    )
    for problem in load_problems(str(tmp_path / "rows.jsonl")):
        texts = [
            rf"\boxed{{{digits}}}",
            rf"\boxed{{{digits}.0}}",
            rf"\boxed{{{digits[:-1]}8}}",
            "7",
            r"\boxed{10^{4999}}",
        ]
        assert accuracy(texts, solution=[problem.solution] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"2x_{\text{min}}", r"2x_{\text{max}}"),
        (r"3v_{\text{B}}", r"3v_{\text{A}}"),
        (r"v_{1,\text{out}}", r"v_{1,\text{in}}"),
        (r"2^{\text{a}}", r"2^{\text{b}}"),
        (r"\frac{2}{\text{a}}", r"\frac{2}{\text{b}}"),
        (r"2\sin\text{A}", r"2\sin\text{B}"),
        (r"3\mathbf{i}+2\mathbf{j}", r"3\mathbf{i}+2\mathbf{k}"),
    ],
)
def test_an_index_an_operand_and_a_vector_are_no_units(one, other):
    assert score(f"<answer>{one}</answer>", other) != 1.0 == score(f"<answer>{one}</answer>", one)


@pytest.mark.parametrize("reference", ["72", "1, -2", "1+2i", r"\pm", "x^2+1", "="])
@pytest.mark.parametrize(
    "text", ["==", r"\approx, ", "=,=", r"\pm \pm\pm", "x = , y = ", ", ,", r"\{\}", "()", "(,)", "[,]", "<", "="]
)
def test_signs_without_values_are_no_error(reference, text):
    assert score(f"<answer>{text}</answer>", reference) in (0.0, None, float(text.strip() == reference))


PIECES = re.findall(
    r"\S+",
    r"72 $ \ { } ^ _ = ( ) [ ] a ab \frac \boxed{ \text{ #### <answer> </answer> </think> , . - + % \( \) \[ \] * ** / "
    r"1,234 1.5 e5 \times10^ \sqrt \! \left \right pi sin x ' √ ² ° − \begin{pmatrix} & \\ \end{pmatrix} | ! \pm",
)


@pytest.mark.parametrize("reference", ["72", "x^3+3x-6", "(3,4]", r"\text{Evelyn}"])
def test_random_notation_neither_crashes_nor_stalls(reference):
    for i in range(60):
        random = Random(i)
        pieces = [random.choice(PIECES) for _ in range(random.choice([4, 10, 60]))]  # few kinds repeat, many mix
        text = "".join(random.choice(pieces) + random.choice(["", " "]) for _ in range(random.choice([5, 50, 400])))
        started = time.process_time()
        assert score(f"<answer>{text[:1900]}</answer>", reference) in (0.0, 1.0)
        assert time.process_time() - started < 3.0, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na < b\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("well <think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> bye", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think>a<think></think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, expected):
    assert format_reward([text]) == [expected]


# --- every row of the benchmark files


def benchmark(name: str) -> list[tuple[str, str]]:
    """(cell that the data set calls its solution, the bare answer in it)"""
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    if name.startswith("gsm8k"):
        return [(row["answer"], row["answer"].split("####")[1].strip()) for row in rows]
    if name.startswith("minerva"):
        return [(row["solution"], last_boxed(row["solution"])) for row in rows]
    return [(str(row["answer"]), str(row["answer"])) for row in rows]


FILES = {"gsm8k/train": 7473, "gsm8k/test": 1319, "math500/test": 500, "minerva_math/test": 272, "aime24/test": 30,
         "amc23/test": 40}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_every_reference_answers_itself(name):
    rows = benchmark(f"{name}.jsonl")
    assert len(rows) == FILES[name]
    for form in (r"So 17 and \boxed{%s}.", "<think>5</think><answer>%s</answer>", "3\n#### %s", "So the answer is %s."):
        scores = accuracy([form % answer for _, answer in rows], solution=[cell for cell, _ in rows])
        failed = [answer for (_, answer), value in zip(rows, scores, strict=True) if value != 1.0]
        assert len(failed) <= 0.005 * len(rows), failed


@needs_data
def test_worked_solutions_answer_their_question():
    for name in ("math500/test", "aime24/test"):
        rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        scores = accuracy([row["solution"] for row in rows], solution=[row["answer"] for row in rows])
        assert scores.count(1.0) >= 0.995 * len(rows)
    cells = [cell for cell, _ in benchmark("gsm8k/test.jsonl")]
    assert set(accuracy(cells, solution=cells)) == {1.0}


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_the_next_rows_answer_is_wrong(name):
    rows = benchmark(f"{name}.jsonl")
    if name.startswith(("minerva", "math500")):
        rows = rows[::5]  # a few formulas take a second to tell apart
    others = [answer for _, answer in rows[1:] + rows[:1]]
    scores = accuracy([rf"\boxed{{{answer}}}" for answer in others], solution=[cell for cell, _ in rows])
    pairs = [(own, other) for (_, own), other in zip(rows, others, strict=True)]
    credited = [pair for pair, value in zip(pairs, scores, strict=True) if value == 1.0 and pair[0] != pair[1]]
    assert len(credited) <= 0.005 * len(rows), credited


@needs_data
def test_only_a_handful_of_references_cannot_be_parsed():
    cells = [cell for cell, _ in benchmark("minerva_math/test.jsonl")]
    assert accuracy([r"\boxed{100000!}"] * len(cells), solution=cells).count(None) == 4


def test_references_stay_parsed_however_many_answers_come():
    from igrpo.rewards.grading import answers

    answers._parse_reference.cache_clear()
    for i in range(4):
        answers._parse_formula.cache_clear()  # as many other answers would
        score(rf"\boxed{{x^2 + {i}}}", "x^2+1000")
    assert answers._parse_reference.cache_info().misses == 1
