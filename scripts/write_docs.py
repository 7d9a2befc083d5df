"""Writes docs/configuration.md and docs/api.md from the source, so that each sentence has one place.

python scripts/write_docs.py            # write
python scripts/write_docs.py --check    # exit code 1 where a page is not up to date
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import igrpo_kernels  # noqa: E402
from igrpo.config.recipe import DROPPED, RENAMED, REQUIRED, field_docs, key_groups  # noqa: E402
from igrpo.config.train_config import TrainConfig  # noqa: E402
from igrpo.settings.kinds import describe_type  # noqa: E402
from igrpo.settings.section import default_of, field_types  # noqa: E402
from igrpo_kernels import GRPOLossConfig, GRPOLossOutput, SamplingMask  # noqa: E402

NOTE = "<!-- Written by scripts/write_docs.py from the source; change it there. -->\n"


def configuration() -> str:
    """Every key of a run: type, default, meaning, in the groups of the source."""
    lines = [
        "# Configuration", "", NOTE,
        "One YAML file, and any key again on the command line: `igrpo train --config recipe.yaml --key value`. Names",
        "are TRL's and open-r1's where they have the key. An unknown key is an error that names the nearest one.", "",
    ]  # fmt: skip
    docs, hints = field_docs(), field_types(TrainConfig)
    fields = {f.name: f for f in dataclasses.fields(TrainConfig)}
    for title, names in key_groups().items():
        lines += [f"## {title.capitalize()}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        for name in names:
            default = "required" if name in REQUIRED else f"`{shown(default_of(fields[name]))}`"
            lines.append(f"| `{name}` | {describe_type(hints[name])} | {default} | {cell(docs[name])} |")
        lines.append("")
    lines += ["## Old names", "", "Accepted with one line of warning.", "", "| written | is now |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in sorted(RENAMED.items())]
    lines += ["", "## Dropped keys", "", "Accepted and ignored, with one line that says why.", ""]
    lines += ["| key | why |", "|---|---|"]
    lines += [f"| `{key}` | {cell(reason)} |" for key, reason in sorted(DROPPED.items())]
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """As YAML has it; long text shortened, since its place is the source."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value).replace("\n", "\\n").replace("|", "\\|")
    return text if len(text) <= 60 else f"{text[:57]}…"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def api() -> str:
    """Every public function with its signature and docstring, every field of the two dataclasses."""
    lines = [
        "# Public API of igrpo_kernels", "", NOTE,
        "Shapes stand beside each argument. " + cell(inspect.getdoc(igrpo_kernels).split("\n\n", 1)[1]),
        "Log-probabilities and entropies are in nats.", "",
    ]  # fmt: skip
    functions = ("grpo_loss", "linear_grpo_loss", "selective_log_softmax", "linear_selective_log_softmax")
    for name in (*functions, "linear_topk_log_softmax"):
        lines += function(getattr(igrpo_kernels, name))
    lines += function(igrpo_kernels.available_impls)
    for cls in (GRPOLossConfig, GRPOLossOutput):
        lines += dataclass_section(cls)
    lines += constructors(SamplingMask)
    lines += [
        "## Equations",
        "",
        "Every implementation computes these; `igrpo_kernels/objective.py` has them beside the",
    ]
    lines += [
        "lines that do. n rows, S sequences; l policy, o old policy, r reference, s sampler log-probabilities.",
        "",
    ]
    lines += equations()
    lines += integrations()
    return "\n".join(lines).rstrip() + "\n"


def function(f: Callable) -> list[str]:
    source = inspect.getsource(f)
    signature = source[: re.search(r"\) -> .*?:\n", source).end()].rstrip()
    return [f"## {f.__name__}", "", "```python", signature, "```", "", "```text", inspect.getdoc(f), "```", ""]


def dataclass_section(cls: type) -> list[str]:
    lines = [f"## {cls.__name__}", "", "```text", inspect.getdoc(cls), "```", ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    body = ast.parse(inspect.getsource(cls)).body[0].body
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for node, following in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            field = fields[node.target.id]
            default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
            kind = cell(ast.unparse(node.annotation))
            lines.append(f"| `{field.name}` | `{kind}` | {default} | {cell(following.value.value)} |")
    return [*lines, ""]


def constructors(cls: type) -> list[str]:
    made = [getattr(cls, name) for name, f in vars(cls).items() if isinstance(f, classmethod)]
    text = [f"{f.__name__}{inspect.signature(f)}\n{textwrap.indent(inspect.getdoc(f), '    ')}" for f in made]
    return [f"## {cls.__name__}", "", "```text", inspect.getdoc(cls), "", *text, "```", ""]


def equations() -> list[str]:
    from igrpo_kernels import losses, objective, reference

    lines = ["```text", inspect.getdoc(objective), "```", ""]
    terms = dict.fromkeys([loss.term.function for loss in losses.LOSSES.values()] + [losses.vespo_phi])
    around = [
        "importance_weight",
        "sampler_ratio",
        "per_token_kl",
        "off_policy_keep",
        "top_entropy_keep",
        "reduce_loss",
    ]
    for f in (*terms, *(getattr(objective, name) for name in around)):
        lines += [f"**{f.__name__}**", "", "```text", inspect.getdoc(f), "```", ""]
    return [*lines, "**Log-probability and entropy**", "", "```text", inspect.getdoc(reference), "```", ""]


def integrations() -> list[str]:
    """Docstrings and signatures of the adapters, read without importing what they adapt."""
    lines = ["## Adapters", ""]
    adapters = [f"igrpo_kernels/integrations/{name}.py" for name in ("trl", "liger", "verl", "openrlhf", "prime_rl")]
    for path in ("igrpo/integrations/trl.py", *adapters):
        source = (ROOT / path).read_text(encoding="utf-8")
        tree = ast.parse(source)
        module = path.removesuffix(".py").replace("/", ".")
        lines += [f"### {module}", "", "```text", ast.get_docstring(tree), "```", ""]
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and (text := ast.get_docstring(node)):
                lines += [f"**{node.name}**", "", *signatures(node, source), "```text", text, "```", ""]
    return lines


def signatures(node: ast.FunctionDef | ast.ClassDef, source: str) -> list[str]:
    """A function's signature as written, shapes beside the arguments; of a class, those of __init__ and forward."""
    functions = [node]
    if isinstance(node, ast.ClassDef):
        functions = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", "forward")]
    found = []
    for f in functions:
        text = "\n".join(source.splitlines()[f.lineno - 1 : f.body[0].lineno - 1]).rstrip()
        found += ["```python", textwrap.dedent(text), "```", ""]
        if f is not node and (doc := ast.get_docstring(f)):
            found += ["```text", doc, "```", ""]
    return found


def algorithm() -> str:
    """The page as it is, with its table of losses written anew."""
    from igrpo_kernels.losses import LOSSES

    table = [
        "| `loss_type` | loss per token | [low, high] | divides by | to accumulate exactly | passes |",
        "|---" * 6 + "|",
    ]
    for name, loss in LOSSES.items():
        equation = cell(inspect.getdoc(loss.term.function).split("\n\n")[0])
        bounds = inspect.getdoc(loss.bounds) if "epsilon" in loss.term.settings else ""
        passes = 1 if loss.term.one_pass else 2
        row = (f"`{name}`", f"`{loss.term.function.__name__}`: {equation}", bounds, loss.reduction.divides_by)
        table.append(f"| {' | '.join(row)} | {loss.reduction.to_accumulate} | {passes} |")
    before, rest = (ROOT / "docs/algorithm.md").read_text(encoding="utf-8").split("<!-- losses", 1)
    mark, rest = rest.split("\n", 1)
    return before + "<!-- losses" + mark + "\n" + "\n".join(table) + "\n<!-- end -->" + rest.split("<!-- end -->", 1)[1]


PAGES = {"docs/configuration.md": configuration, "docs/api.md": api, "docs/algorithm.md": algorithm}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is old")
    check = parser.parse_args(argv).check
    old = []
    for path, page in PAGES.items():
        file, text = ROOT / path, page()
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            old.append(path)
            if not check:
                file.write_text(text, encoding="utf-8")
    print(f"{'not up to date' if check else 'written'}: {', '.join(old) or 'nothing'}")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
