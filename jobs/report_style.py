"""The report's style sheet: system fonts, tabular figures, light and dark by the reader's preference."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1d2125; --soft: #5d6670; --faint: #8d959e; --line: #e3e4e1;
  --accent: #2456c4; --accent-soft: #2456c433; --second: #b8601b; --good: #1c7a45; --bad: #b3261e; --warn: #9a6700;
  --code: #f3f3f0; --reference: #6a6f76; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #a2abb4; --faint: #757e87; --line: #30363c;
  --accent: #7fa9ff; --accent-soft: #7fa9ff40; --second: #f0a060; --good: #5fcf8f; --bad: #ff8a80; --warn: #e3b341;
  --code: #15181b; --reference: #9aa2aa; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1220px; margin: 0 auto; padding: 36px 28px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 14px; letter-spacing: -0.01em; }
h2 small { font-weight: 400; font-size: 14px; color: var(--soft); margin-left: 8px; letter-spacing: 0; }
p { margin: 6px 0; } .soft { color: var(--soft); } .eyebrow { color: var(--faint); font-size: 13px; margin: 0 0 4px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 14px; }
.badge { font-size: 13px; font-weight: 600; padding: 3px 11px; border-radius: 99px; border: 1px solid currentColor; }
.badge.good { color: var(--good); } .badge.bad { color: var(--bad); } .badge.warn { color: var(--warn); }
.facts { display: flex; flex-wrap: wrap; margin: 22px 0 0; overflow: hidden; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; } .facts + .facts { margin-top: 12px; }
.fact { flex: 1 1 150px; padding: 13px 16px 11px; box-shadow: 0 0 0 0.5px var(--line); }
.facts + .facts .fact { flex-basis: 250px; }
.fact b { display: block; font-size: 22px; font-weight: 600; letter-spacing: -0.01em; line-height: 1.25;
  font-variant-numeric: tabular-nums; white-space: nowrap; } .fact b small { font-size: 13px; font-weight: 400;
  color: var(--soft); letter-spacing: 0; margin-left: 5px; }
.fact span { color: var(--soft); font-size: 13px; }
.fact i { color: var(--faint); font-style: normal; font-size: 12px; display: block; min-height: 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.notice { border-left: 3px solid var(--warn); } .notice.bad { border-color: var(--bad); }
.notice pre { margin: 8px 0 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px 8px; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 8px; align-items: baseline; font-size: 14px; }
.chart .unit { color: var(--faint); font-size: 12.5px; } .legend { margin-left: auto; display: flex; gap: 12px; }
.key { font-size: 12px; color: var(--soft); } .key::before { content: ""; display: inline-block; width: 14px;
  height: 0;
  border-top: 2.5px solid var(--accent); margin-right: 5px; vertical-align: 3px; }
.key.raw::before { border-color: var(--accent-soft); } .key.second::before { border-color: var(--second); }
.key.mark::before { border-top-style: dashed; border-color: var(--warn); border-width: 1.5px; }
.chart svg { display: block; width: 100%; height: auto; margin-top: 4px; }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--faint); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums; }
.label { fill: var(--faint); font-size: 11.5px; }
.line { fill: none; stroke: var(--accent); stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }
.line.raw { stroke: var(--accent-soft); stroke-width: 1.1; } .line.second { stroke: var(--second); }
.dot { fill: var(--accent); } .dot.second { fill: var(--second); }
.mark line { stroke: var(--warn); stroke-width: 1.2; stroke-dasharray: 4 3; } .mark path { fill: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 12.5px; padding: 0 12px 7px 0;
  white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: bottom; }
td { padding: 5px 12px 5px 0; vertical-align: top; } td.r, th.r { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; } td.nowrap { white-space: nowrap; }
table.plain td.r, table.plain th.r { width: 1%; padding-right: 26px; }
table.plain tr + tr td { border-top: 1px solid var(--line); }
.evaluation tr.metric td { border-top: 1px solid var(--line); padding-top: 9px; font-weight: 600; }
.evaluation tr.metric td.light { font-weight: 400; }
.evaluation tr.base td { color: var(--soft); padding-top: 1px; padding-bottom: 3px; }
.evaluation tr.base + tr.metric td, .evaluation tr.metric + tr.metric td { padding-top: 10px; }
.evaluation tr.corpus td { border-top: 1px solid var(--line); padding: 20px 0 6px; font-size: 15px; }
.evaluation tbody:first-of-type tr.corpus td { border-top: 0; padding-top: 10px; }
.evaluation tr.corpus + tr.metric td { border-top: 0; padding-top: 2px; }
.unit { color: var(--faint); font-weight: 400; }
.good, .evaluation tr td.good { color: var(--good); }
.bad, .evaluation tr td.bad { color: var(--bad); }
.strip { width: 132px; height: 15px; display: block; margin-top: 3px; } .strip .rail { stroke: var(--line); }
.strip .whisker { stroke: var(--accent); stroke-width: 2; } .strip circle { fill: var(--accent); }
.strip.base .whisker { stroke: var(--reference); stroke-width: 1.4; } .strip.base circle { fill: var(--reference); }
pre, code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--code); border-radius: 6px; padding: 10px 12px; margin: 0; overflow: auto; max-height: 260px;
  white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
pre.end { display: flex; flex-direction: column-reverse; }
.sample { margin-bottom: 14px; } .sample > p { margin: 0 0 10px; font-size: 13.5px; }
.sample .parts { display: grid; grid-template-columns: 1.25fr 1fr 1fr; gap: 14px; }
.sample .parts > div { min-width: 0; } .sample h4 { margin: 0 0 5px; font-size: 12.5px; font-weight: 500;
  color: var(--soft); }
.sample .output pre { box-shadow: inset 3px 0 0 var(--accent); }
@media (max-width: 800px) { .sample .parts { grid-template-columns: 1fr; } main { padding: 20px 14px; } }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 14px;
  align-items: start; }
.two h3 { font-size: 14px; margin: 0 0 10px; } .two td:first-child { color: var(--soft); width: 38%; }
.two td { overflow-wrap: anywhere; }
.words { display: flex; flex-wrap: wrap; gap: 6px 1px; font-size: 13px; margin: 4px 0 14px; }
.words span { white-space: pre; padding: 1px 2px; border-radius: 3px 3px 0 0; border-bottom: 4px solid transparent; }
.maps { display: flex; flex-wrap: wrap; gap: 16px 26px; align-items: flex-start; }
.maps figure { margin: 0; max-width: 100%; overflow-x: auto; } .maps figcaption { font-size: 12.5px;
  color: var(--soft); margin-bottom: 4px; }
.maps rect { fill: var(--accent); } .maps rect.frame { fill: none; stroke: var(--line); }
.maps text { fill: var(--soft); font-size: 9px; }
details { margin-top: 14px; } summary { cursor: pointer; font-size: 14px; color: var(--soft); }
details:first-child { margin-top: 0; } details .scroll { margin-top: 12px; }
details pre { max-height: none; margin-top: 10px; } summary:focus-visible { outline: 2px solid var(--accent); }
footer { margin-top: 44px; color: var(--faint); font-size: 13px; }
@media print { body { background: #fff; } .card, .chart, .sample { break-inside: avoid; } }
"""
