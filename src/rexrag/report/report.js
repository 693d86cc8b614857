"use strict";
// Everything shown here comes from the JSON block and is set as text: no markup is ever made from data.
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// el("p", {class: "x", onclick: f}, "text", node): children that are strings become text nodes.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}

const minus = (text) => (/[1-9]/.test(text) ? text.replace("-", "\u2212") : text.replace("-", ""));
const fixed = (value, digits = 2) => (value === null || value === undefined ? "\u2013" : minus(value.toFixed(digits)));
const signed = (value) => (value > 0 ? "+" : "") + fixed(value);

// ---- charts

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A copy in which colours named by CSS variable have their value of the moment, light or dark.
function painted(value, key = "") {
  if (Array.isArray(value)) return value.map((item) => painted(item, key));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, painted(item, name)]));
  return /color$/.test(key) && typeof value === "string" && value.startsWith("--") ? css(value) : value;
}

function layoutOf(chart, node, traces) {
  const last = Math.max(...traces.map((trace) => trace.x.at(-1)));
  const font = {family: css("--sans"), size: 12, color: css("--soft")};
  const axis = {gridcolor: css("--rule"), zerolinecolor: css("--rule"), linecolor: css("--rule"), automargin: true};
  const layout = {
    font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "x unified",
    margin: {l: 52, r: 8, t: 10, b: 42}, height: node.clientHeight, showlegend: true,
    legend: {orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: {...font, color: css("--text")}},
    hoverlabel: {bgcolor: css("--card"), bordercolor: css("--rule"), font: {...font, color: css("--text")}},
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  };
  for (const [name, own] of Object.entries(chart.layout)) {
    const title = {...own.title, standoff: 6, font: {...font}};
    layout[name] = {...axis, zeroline: false, ...own, title};
    if (own.title.text === "step" && last <= 10) layout[name].dtick = 1;
  }
  return layout;
}

const CONFIG = {displayModeBar: false};
// A plot follows its card, which also changes where the window does not (a scroll bar, a print).
const follow = new ResizeObserver((seen) => {
  for (const {target} of seen) if (target.querySelector(".main-svg")) Plotly.Plots.resize(target);
});

function draw(chart, place) {
  const node = byId(`chart-${place}`);
  const arm = byId("arm") ? byId("arm").value : Object.keys(chart.views)[0];
  const shared = "" in chart.views;
  const traces = chart.views[shared ? "" : arm] || [];
  const heading = node.closest("figure").querySelector(".of-arm");
  if (heading) heading.textContent = byId("arm") ? `\u00b7 ${arm}` : "";
  Plotly.purge(node);
  node.replaceChildren();
  if (traces.length) Plotly.newPlot(node, painted(traces), layoutOf(chart, node, traces), CONFIG);
  else node.append(el("p", {class: "quiet"}, "This algorithm recorded none of it."));
}

const drawAll = () => DATA.charts.forEach(draw);
drawAll();
DATA.charts.forEach((_, place) => follow.observe(byId(`chart-${place}`)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
if (byId("arm")) byId("arm").addEventListener("change", drawAll);

// ---- rollouts

const list = byId("list");
const detail = byId("detail");
const filters = byId("filters");
if (!list) return;

const rollouts = DATA.rollouts;
const right = (r) => r.outcome === "recovered" || r.outcome.startsWith("right");
const MARKS = {recovered: "\u2717\u2192\u2713", "right probe": "\u2713", "wrong probe": "\u2717", right: "\u2713", wrong: "\u2717"};
const SPOKEN = {recovered: "dead end recovered", "right probe": "right", "wrong probe": "still wrong", right: "right", wrong: "wrong"};

function haystack(r) {
  if (!r.haystack) {
    const parts = [...r.shared, ...r.rest, ...(r.parent ? r.parent.rest : [])].map((s) => s.text);
    r.haystack = [r.question, r.answer || "", ...r.gold, ...parts].join("\n").toLowerCase();
  }
  return r.haystack;
}

function inSteps(step, text) {
  const range = text.match(/^\s*(\d+)\s*(?:[-\u2013]\s*(\d+))?\s*$/);
  return !range || (step >= Number(range[1]) && step <= Number(range[2] || range[1]));
}

function matching() {
  const want = Object.fromEntries(new FormData(filters));
  const words = want.text.toLowerCase().split(/\s+/).filter(Boolean);
  const tests = {
    probe: (r) => r.probe, base: (r) => !r.probe,
    recovered: (r) => r.outcome === "recovered", right, wrong: (r) => !right(r),
  };
  return rollouts.filter((r) =>
    (!want.kind || tests[want.kind](r)) && (!want.answer || tests[want.answer](r)) &&
    (!want.run || String(r.run) === want.run) && inSteps(r.step, want.step) &&
    words.every((word) => haystack(r).includes(word)));
}

function entry(r) {
  const kind = el("span", {class: `chip ${r.probe ? "cue" : ""}`}, r.probe ? "probe" : "base");
  const mark = el("span", {class: `mark ${right(r) ? "good" : "bad"}`, "aria-hidden": "true"}, MARKS[r.outcome]);
  const spoken = el("span", {class: "sr"}, `, ${SPOKEN[r.outcome]}, `);
  const top = el("span", {class: "row"}, mark, spoken, kind, el("span", {class: "quiet"}, `step ${r.step}`));
  const button = el("button", {type: "button", tabindex: "-1"}, top, el("span", {class: "ask"}, r.question));
  button.addEventListener("click", () => {
    select(button, r);
    if (matchMedia("(max-width: 56rem)").matches) detail.scrollIntoView();
  });
  button.addEventListener("focus", () => select(button, r));
  return el("li", {}, button);
}

let current = null;
function select(button, r) {
  if (current === button) return;
  if (current) { current.removeAttribute("aria-current"); current.tabIndex = -1; }
  current = button;
  button.setAttribute("aria-current", "true");
  button.tabIndex = 0;
  show(r);
}

function refresh() {
  const found = matching();
  list.replaceChildren(...found.map(entry));
  byId("count").textContent = `${found.length} of ${rollouts.length}`;
  current = null;
  list.scrollTop = 0;
  if (found.length) select(list.querySelector("button"), found[0]);
  else detail.replaceChildren(el("p", {class: "quiet"}, "No rollout matches these filters."));
}

list.addEventListener("keydown", (event) => {
  const buttons = [...list.querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement);
  const to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1}[event.key];
  if (to === undefined || !buttons[to]) return;
  event.preventDefault();
  buttons[to].focus();
});

// ---- one rollout: what it shares with its parent, then the parent's dead end beside the probe's branch

const TAG = /(<\/?(?:think|search|answer|information)>)/;
const TITLE = /doc \d+ ?\(title: ?(?:"([^"\n]*)" ?|([^)\n]*))\)/gi; // of text whose runs of spaces are one

function prose(segment, struck) {
  const parts = segment.text.trim().split(TAG).map((part) => (TAG.test(part) ? el("span", {class: "markup"}, part) : part));
  if (segment.more) parts.push(el("em", {class: "quiet"}, ` \u2026 ${segment.more} more characters are not on this page`));
  return el(struck ? "del" : "div", {class: "text"}, ...parts);
}

function figures(segment) {
  const parts = [];
  if (segment.logp !== null) parts.push(`log-prob ${fixed(segment.logp)}`);
  if (segment.weight !== null) parts.push(`weight ${fixed(segment.weight, 3)}`);
  return el("span", {class: "num"}, parts.join(" \u00b7 "));
}

function piece(segment, struck = false) {
  const tag = el("span", {class: `tag ${segment.origin}`}, segment.origin);
  const box = `seg ${segment.origin}`;
  if (segment.origin !== "evidence")
    return el("div", {class: box}, el("div", {class: "row"}, tag, figures(segment)), prose(segment, struck));
  const titles = [...segment.text.replace(/[^\S\n]+/g, " ").matchAll(TITLE)].map((found) => (found[1] || found[2] || "").trim());
  return el("details", {class: box},
    el("summary", {}, tag, " ", titles.join(" \u00b7 ") || "no title"), prose(segment, false));
}

function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", {class: "facts"}, ...shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

function verdict(answer, good, label) {
  const said = answer === null ? "no answer" : answer;
  return el("p", {class: "verdict"}, `${label}: `, el(good ? "ins" : "del", {}, said), " ",
    el("span", {class: `nowrap ${good ? "good" : "bad"}`}, good ? "\u2713 right" : "\u2717 wrong"));
}

function branches(r) {
  const dead = r.parent
    ? [el("h4", {}, "Parent: the dead end"), ...r.parent.rest.map((s) => piece(s, true)),
       verdict(r.parent.answer, r.outcome === "right probe", "Parent's answer"),
       facts([["reward", fixed(r.parent.reward)], ["advantage", signed(r.parent.advantage)]])]
    : [el("h4", {}, "Parent: the dead end"), el("p", {class: "quiet"}, "The parent was not recorded.")];
  const probe = [el("h4", {}, "Probe: cue and continuation"), ...r.rest.map((s) => piece(s)),
    verdict(r.answer, right(r), "Probe's answer")];
  return [
    el("h4", {}, `Shared with the parent${r.cut === null ? "" : `: ${r.cut} tokens`}`), ...r.shared.map((s) => piece(s)),
    el("div", {class: "fork"}, el("div", {class: "dead"}, ...dead), el("div", {class: "probe"}, ...probe)),
  ];
}

function show(r) {
  const kind = r.probe ? (r.kept ? "probe, kept" : "probe, filtered out") : "base rollout";
  detail.replaceChildren(
    el("h3", {}, r.question),
    el("p", {class: "gold"}, "Gold: ", el("b", {}, r.gold.join(" \u00b7 ") || "\u2013")),
    facts([
      ["kind", kind], ["run", DATA.runs.length > 1 ? DATA.runs[r.run] : ""], ["step", String(r.step)],
      ["hops", r.hops ? String(r.hops) : ""], ["reward", fixed(r.reward)], ["advantage", signed(r.advantage)],
      ["cue score", r.probe && r.score !== null ? fixed(r.score) : ""],
      ["mean weight", r.weight === null ? "" : fixed(r.weight, 3)], ["stopped by", r.stop],
    ]),
    ...(r.probe ? branches(r) : [...r.rest.map((s) => piece(s)), verdict(r.answer, right(r), "Answer")]));
  detail.scrollTop = 0;
}

filters.addEventListener("input", refresh);
filters.addEventListener("submit", (event) => event.preventDefault());
refresh();
})();
