"use strict";
// Model text enters the page only through textContent: it can never become markup.
(() => {
  const groups = JSON.parse(document.getElementById("completions-data").textContent);
  const byId = (id) => document.getElementById(id);
  const list = byId("groups"), detail = byId("group"), count = byId("shown");
  const filters = { run: byId("f-run"), tag: byId("f-tag"), from: byId("f-from"), to: byId("f-to"), text: byId("f-text") };
  if (!list) return;

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (x, digits = 2) => (x === null || x === undefined ? "–" : String(+x.toFixed(digits)).replace("-", "−"));
  const signed = (x) => (x > 0 ? "+" : "") + number(x);
  const searchable = groups.map((g) =>
    [g.prompt, g.solution, ...g.drafts.map((d) => d.text), ...g.refinements.map((r) => r.text)].join("\n").toLowerCase());

  let shown = [], selected = -1;

  const matches = (g, i) => {
    const from = filters.from.value, to = filters.to.value, text = filters.text.value.trim().toLowerCase();
    return (!filters.run.value || g.run === filters.run.value) && (!filters.tag.value || g.tags.includes(filters.tag.value)) &&
      (from === "" || g.step >= +from) && (to === "" || g.step <= +to) && (!text || searchable[i].includes(text));
  };

  const refresh = () => {
    const before = groups[shown[selected]];
    shown = groups.map((_, i) => i).filter((i) => matches(groups[i], i));
    list.replaceChildren(...shown.map((i, at) => row(groups[i], at)));
    count.textContent = `${shown.length} of ${groups.length} groups`;
    const kept = shown.findIndex((i) => groups[i] === before);
    select(shown.length ? Math.max(kept, 0) : -1, false);
  };

  const row = (g, at) => {
    const item = make("li");
    item.id = `g${at}`;
    item.setAttribute("role", "option");
    const head = make("div", "head");
    head.append(make("span", "", `step ${g.step}` + (filters.run.options.length > 2 ? ` · ${g.run}` : "")));
    const rewards = g.refinements.map((r) => r.reward ?? 0);
    const top = Math.max(...rewards);
    head.append(make("span", "dots", rewards.map((r) => (r === top && r > Math.min(...rewards) ? "●" : "○")).join("")));
    item.append(head, make("div", "text", g.prompt));
    item.addEventListener("click", () => select(at, false));
    return item;
  };

  const select = (at, scroll = true) => {
    list.children[selected]?.setAttribute("aria-selected", "false");
    selected = at;
    const item = list.children[at];
    if (!item) {
      list.removeAttribute("aria-activedescendant");
      detail.replaceChildren(make("p", "quiet", "No group fits these filters."));
      return;
    }
    item.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", item.id);
    if (scroll) item.scrollIntoView({ block: "nearest" });
    show(groups[shown[at]]);
  };

  const meta = (s, first) => {
    const line = make("div", "meta");
    line.append(first);
    const reward = make("span", "", "reward ");
    reward.append(make("b", "", number(s.reward)));
    line.append(reward);
    for (const [name, value] of Object.entries(s.rewards)) line.append(make("span", "", `${name} ${number(value)}`));
    if (s.tokens !== null) line.append(make("span", "", `${s.tokens} tokens${s.cut ? ", cut" : ""}`));
    return line;
  };

  const card = (s, title, chosen, body) => {
    const box = make("div", chosen ? "box chosen" : "box");
    const text = make("pre", "fold");
    text.tabIndex = 0;
    text.append(...body);
    box.append(meta(s, make("span", chosen ? "badge" : "", title)), text);
    return box;
  };

  // The refinement with what it added marked, and what it dropped from the draft struck out where it stood.
  const changed = (draft, refinement, spans) => {
    const a = Array.from(draft), b = Array.from(refinement), parts = [];
    let at = 0;
    for (const [a0, a1, b0, b1] of spans) {
      parts.push(b.slice(at, b0).join(""));
      if (a1 > a0) parts.push(make("del", "", a.slice(a0, a1).join("")));
      if (b1 > b0) parts.push(make("ins", "", b.slice(b0, b1).join("")));
      at = b1;
    }
    return [...parts, b.slice(at).join("")];
  };

  const heading = (text, small) => {
    const node = make("h3", "", text + " ");
    node.append(make("small", "", small));
    return node;
  };

  const show = (g) => {
    const parts = [];
    const question = make("div", "box");
    question.append(make("pre", "fold", g.prompt));
    parts.push(heading("Prompt", `step ${g.step}, row ${g.row}, reference answer: ${g.solution}`), question);
    if (g.drafts.length) {
      const cards = make("div", "cards");
      g.drafts.forEach((d, i) => cards.append(card(d, i === g.chosen ? `draft ${i + 1}, chosen` : `draft ${i + 1}`, i === g.chosen, [d.text])));
      parts.push(heading(`${g.drafts.length} drafts`, g.chosen === null ? "none shown in stage 2" : "the chosen one is shown in stage 2"), cards);
    }
    const cards = make("div", "cards");
    g.refinements.forEach((r, i) => {
      const body = r.changes ? changed(g.drafts[g.chosen].text, r.text, r.changes) : [r.text];
      const title = `${g.drafts.length ? "refinement" : "completion"} ${i + 1}`;
      const box = card(r, title, false, body);
      const advantage = make("span", "", "advantage ");
      advantage.append(make("b", "", r.advantage === null ? "–" : signed(r.advantage)));
      box.firstChild.children[1].after(advantage);
      cards.append(box);
    });
    const kind = g.drafts.length ? "refinements" : "completions";
    parts.push(heading(`${g.refinements.length} ${kind}`, g.tags.join(", ")), cards);
    detail.replaceChildren(...parts);
  };

  for (const name of new Set(groups.map((g) => g.run))) filters.run.append(new Option(name, name));
  for (const name of [...new Set(groups.flatMap((g) => g.tags))].sort()) filters.tag.append(new Option(name, name));
  filters.run.parentElement.hidden = filters.run.options.length < 3;
  for (const control of Object.values(filters)) control.addEventListener("input", refresh);
  byId("f-removed").addEventListener("input", (e) => detail.classList.toggle("hide-removed", !e.target.checked));
  byId("f-clear").addEventListener("click", () => {
    for (const control of Object.values(filters)) control.value = "";
    refresh();
  });

  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(e.target.tagName);
    if (e.key === "Escape" && typing) return list.focus();
    if (typing) return;
    const inList = e.target === list;
    const to = { j: 1, k: -1, ...(inList && { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }) }[e.key];
    if (to) select(Math.min(Math.max(selected + to, 0), shown.length - 1));
    else if (e.key === "/") filters.text.focus();
    else if (e.key === "d") byId("f-removed").click();
    else return;
    e.preventDefault();
  });
  refresh();
})();
