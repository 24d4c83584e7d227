"""The style sheet of report.html, for light and dark ground."""

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --ground: #f6f7f9; --card: #fff; --rule: #e3e7ec; --axis: #9aa5b1;
  --s0: #2563a8; --s1: #c2410c; --s2: #4d7c0f; --fine: #2e7d32; --warn: #b45309; --warn-ground: #fff6e6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa5b3; --ground: #14181e; --card: #1d232b;
  --rule: #2d3640; --axis: #5b6675; --s0: #74b0f4; --s1: #fb9660; --s2: #a3d55d; --fine: #81c784; --warn: #f6b357;
  --warn-ground: #33280f; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--ground);
  margin: 0 auto; max-width: 82rem; padding: 1.5rem clamp(.75rem, 3vw, 2rem) 3rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; display: flex; justify-content: space-between; gap: 1rem; }
output { font-variant-numeric: tabular-nums; font-weight: 600; white-space: nowrap; }
.state { color: var(--soft); margin: .2rem 0 .6rem; }
progress { width: 100%; height: .5rem; accent-color: var(--s0); }
.findings { list-style: none; margin: 1.2rem 0 0; padding: 0; display: grid; gap: .4rem; }
.findings li { background: var(--card); border: 1px solid var(--rule); border-left: 4px solid var(--fine);
  border-radius: 6px; padding: .45rem .8rem; }
.findings b { color: var(--fine); display: inline-block; width: 1rem; }
.findings .warning { border-left-color: var(--warn); background: var(--warn-ground); }
.findings .warning b { color: var(--warn); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.charts figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .9rem 1rem; }
figure { margin: 0; }
figcaption, .reading { color: var(--soft); font-size: .85rem; }
.reading { max-width: 75ch; margin: 0 0 .8rem; }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0 0 .3rem; font-size: .8rem; }
.legend span::before { content: ""; display: inline-block; width: .9rem; height: .2rem; border-radius: 1px;
  background: var(--own); margin-right: .35rem; vertical-align: middle; }
.legend .s0 { --own: var(--s0); } .legend .s1 { --own: var(--s1); } .legend .s2 { --own: var(--s2); }
svg { display: block; width: 100%; height: auto; margin-bottom: .4rem; }
svg .s0 { --own: var(--s0); } svg .s1 { --own: var(--s1); } svg .s2 { --own: var(--s2); }
svg .line { fill: none; stroke: var(--own); stroke-width: 1.8; stroke-linejoin: round; }
svg .band { fill: var(--own); opacity: .18; }
svg .dot { fill: var(--own); }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--axis); }
svg .reference { stroke: var(--axis); stroke-dasharray: 4 3; }
svg .tick { fill: var(--soft); font-size: 10.5px; }
.pictures { display: grid; gap: 1rem; }
.pictures.neighbours { grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)); }
.pictures img { display: block; max-width: 100%; height: auto; border-radius: 6px; border: 1px solid var(--rule); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""
