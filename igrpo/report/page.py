"""The page: figures, tables and the completions browser in one file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from igrpo.report.arms import Arm
from igrpo.report.completions import Sample, as_script_json
from igrpo.report.drawing import ARM_COLOURS
from igrpo.report.tables import Table


@dataclass(frozen=True)
class Drawn:
    """A figure on the page."""

    name: str
    title: str
    text: str
    svg: str
    wide: bool


@dataclass(frozen=True)
class Content:
    """Everything that goes into the page; text is escaped here and nowhere else."""

    arms: Sequence[Arm]
    notes: Sequence[str]
    results: Table
    resources: Table
    settings: Table
    config: str
    """YAML of the first run's settings."""
    sections: Sequence[tuple[str, Sequence[Drawn]]]
    sample: Sample


def render(content: Content) -> str:
    script, style = _asset("page.js"), _asset("page.css")
    sections = [
        ("Results", _table(content.results) + _table(content.resources)),
        *((title, _figures(drawn)) for title, drawn in content.sections if drawn),
        ("Settings", _settings(content)),
        ("Completions", _browser(content.sample)),
    ]
    title = "igrpo: " + ", ".join(arm.label for arm in content.arms)
    body = "".join(f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{html}</section>' for name, html in sections)
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{_header(content)}
<nav aria-label="Sections"><div>{links}</div></nav>
<main>{body}</main>
<script type="application/json" id="completions-data">{as_script_json(content.sample.groups)}</script>
<script>{script}</script>
</body>
</html>
"""


def _policy(script: str) -> str:
    """Nothing is fetched, and only this very script runs: a second wall behind the escaping."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"


def _header(content: Content) -> str:
    runs = [run for arm in content.arms for run in arm.runs]
    first = runs[0].config
    what = ", ".join(str(first[key]) for key in ("model_name_or_path", "dataset_name") if key in first)
    arms = "".join(
        f'<span style="--arm: var(--arm-{i % len(ARM_COLOURS) + 1})">{escape(arm.label)} '
        f'<small class="quiet">{_members(arm)}</small></span>'
        for i, arm in enumerate(content.arms)
    )
    notes = ""
    if content.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in content.notes)
        notes = f'<div class="notes"><h3>Missing or left out</h3><ul>{items}</ul></div>'
    spread = ""
    if any(len(arm.runs) > 1 for arm in content.arms):
        spread = " Runs that differ only in the seed are one line: their mean, with one standard deviation around it."
    return (
        f"<header><h1>Training report</h1><p class='quiet'>{escape(what)} · made {time.strftime('%Y-%m-%d %H:%M')}."
        f"{spread}</p><div class='arms'>{arms}</div>{notes}</header>"
    )


def _members(arm: Arm) -> str:
    names = [run.name for run in arm.runs]
    text = f"{len(names)} seeds: {', '.join(names)}" if len(names) > 1 else names[0]
    return "" if text == arm.label else escape(text)


def _figures(figures: Sequence[Drawn]) -> str:
    cells = [
        f'<figure id="figure-{f.name}"{" class=wide" if f.wide else ""}><figcaption><h3>{escape(f.title)}</h3>'
        f"<p>{escape(f.text)}</p></figcaption>{f.svg}</figure>"
        for f in figures
    ]
    return f'<div class="figures">{"".join(cells)}</div>'


def _table(table: Table, kind: str = "") -> str:
    header, rows = table
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>{body}</table></div>'


def _settings(content: Content) -> str:
    differ = ""
    if len(content.settings[0]) > 2:
        differ = "<h3>What differs</h3>" + _table(content.settings, "settings")
    whole = f"<pre>{escape(content.config)}</pre>" if content.config else "<p>config.yaml is missing.</p>"
    return f"{differ}<details><summary>all settings of the first run</summary>{whole}</details>"


def _browser(sample: Sample) -> str:
    if not sample.groups:
        return "<p class='quiet'>These runs have no completions to show.</p>"
    left_out = ""
    if len(sample.groups) < sample.total:
        left_out = (
            f" {len(sample.groups):,} of {sample.total:,} groups are on this page, evenly spread over the steps; "
            "completions.jsonl in the run folder has all of them."
        )
    return f"""<p class="quiet">Prompt, drafts, the chosen draft, and what was made of it. <ins>Marked</ins>: not in the
chosen draft; <del>struck out</del>: dropped from it.{left_out}</p>
<div class="filters">
<span><label for="f-run">run</label> <select id="f-run"><option value="">all</option></select></span>
<span><label for="f-tag">outcome</label> <select id="f-tag"><option value="">any</option></select></span>
<span><label for="f-from">steps</label> <input type="number" id="f-from" min="0" aria-label="first step">
<label for="f-to">to</label> <input type="number" id="f-to" min="0" aria-label="last step"></span>
<input type="search" id="f-text" placeholder="search prompts and texts" aria-label="search prompts and texts">
<span><input type="checkbox" id="f-removed" checked> <label for="f-removed">show dropped text</label></span>
<button id="f-clear" type="button">clear</button>
</div>
<p class="quiet"><span id="shown" role="status"></span>. Keys: <kbd>j</kbd> <kbd>k</kbd> next and previous group,
<kbd>/</kbd> search, <kbd>Esc</kbd> back to the list, <kbd>d</kbd> dropped text. ● best reward of its group.</p>
<div class="browser">
<ul class="list" id="groups" role="listbox" tabindex="0" aria-label="groups"></ul>
<div class="detail" id="group" aria-live="polite"></div>
</div>"""


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _asset(name: str) -> Any:
    return resources.files("igrpo.report").joinpath(name).read_text(encoding="utf-8")
