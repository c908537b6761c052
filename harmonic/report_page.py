"""The report's one script and its style sheet."""

SCRIPT = """
const players = [...document.querySelectorAll("audio")];
for (const player of players) {
  const head = player.closest(".card").querySelector(".playhead");
  const move = () => {
    head.style.left = 100 * player.currentTime / player.duration + "%";
    if (!player.paused) requestAnimationFrame(move);
  };
  player.addEventListener("play", () => {
    for (const other of players) if (other !== player) other.pause();
    head.style.opacity = 1;
    move();
  });
  player.addEventListener("seeked", move);
}
"""

STYLE = """
:root { color-scheme: light dark; --page: #faf9f7; --card: #fff; --ink: #1c1c1e; --soft: #65656b;
  --line: #e5e2dc; --accent: #0b6e69; --warm: #b8501c; --given: #a3a3a9; --track: #efede8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131315; --card: #1b1b1e; --ink: #ececee; --soft: #9c9ca4;
    --line: #2e2e33; --accent: #55c7bf; --warm: #f0965a; --given: #6c6c74; --track: #26262a; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font-variant-numeric: tabular-nums;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
main { max-width: 1080px; margin: 0 auto; padding: 56px 24px 96px; }
section { margin-top: 64px; }
h1 { margin: 0; font-size: 40px; line-height: 1.15; letter-spacing: -0.02em; }
h2 { margin: 0 0 16px; font-size: 22px; letter-spacing: -0.01em; }
h3 { margin: 0; font-size: 16px; }
h3 small, .fine, .unit, .legend, .origin, .eyebrow, .axis { color: var(--soft); font-weight: 400; }
.eyebrow { margin: 0 0 6px; font-size: 13px; letter-spacing: 0.04em; }
.lead { max-width: 44em; margin: 16px 0 0; font-size: 19px; line-height: 1.5; }
.fine { max-width: 52em; margin: 8px 0 0; font-size: 14px; }

.outcome { margin-top: 40px; }
.tiles { display: grid; grid-template-columns: repeat(4, auto); justify-content: space-between;
  gap: 24px; margin: 0; }
.tiles dt { color: var(--soft); font-size: 14px; }
.tiles dd { margin: 0; font-size: 34px; font-weight: 300; line-height: 1.2; }
.tiles div:first-child dd { color: var(--accent); font-weight: 600; }
.bars { display: grid; grid-template-columns: auto 1fr; gap: 10px 20px; align-items: center;
  margin: 28px 0 20px; font-size: 14px; overflow-wrap: normal; }
.bars svg { display: block; fill: var(--given); }
.bars svg:first-of-type { fill: var(--accent); }
.bars .track { fill: var(--track); }

.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 16px; font-size: 14px; }
.legend span::before { content: ""; display: inline-block; width: 18px; margin-right: 7px;
  vertical-align: middle; border-top: 2px solid var(--accent); }
.legend .k-raw::before { opacity: 0.4; }
.legend .k-dot::before { width: 8px; height: 8px; border: 0; border-radius: 50%;
  background: var(--warm); }
.legend .k-base::before { border-top: 1px dashed var(--soft); }
.unit { margin: 0 0 6px; font-size: 12px; }
.unit.right { margin: 30px 0 0; text-align: right; }
.chart { position: relative; height: 320px; margin-left: 34px; }
.chart svg { display: block; width: 100%; height: 100%; fill: none; }
.chart svg * { vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.grid { stroke: var(--line); }
.base { stroke: var(--soft); stroke-dasharray: 4 4; }
.raw { stroke: var(--accent); opacity: 0.4; }
.smooth { stroke: var(--accent); stroke-width: 2.25; }
.dot { stroke: var(--warm); stroke-width: 8; stroke-linecap: round; }
.chart span { position: absolute; color: var(--soft); font-size: 12px; line-height: 16px;
  white-space: nowrap; }
.chart .y { right: 100%; margin: -8px 8px 0 0; }
.chart .x { top: 100%; margin-top: 8px; transform: translateX(-50%); }
.chart .x.end { transform: translateX(-75%); }
.chart .name { right: 0; margin-top: -19px; }
.chart .name.below { margin-top: 3px; }

.groups { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr));
  gap: 40px 28px; margin-top: 28px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr));
  gap: 20px; margin-top: 14px; }
.card { min-width: 0; margin: 0; padding: 14px; border: 1px solid var(--line); border-radius: 12px;
  background: var(--card); }
figcaption { font-size: 14px; }
figcaption span { display: block; color: var(--soft); }
audio { display: block; width: 100%; height: 40px; margin: 10px 0 12px; }
.views { position: relative; overflow: hidden; }
.views svg { display: block; width: 100%; height: 56px; }
.views img { display: block; width: 100%; height: 88px; margin-top: 6px; border-radius: 4px; }
.made, .given { stroke-width: 0.5; vector-effect: non-scaling-stroke; }
.made { fill: var(--accent); stroke: var(--accent); }
.given { fill: var(--given); stroke: var(--given); }
.mark, .playhead { position: absolute; top: 0; bottom: 0; margin-left: -1px;
  box-shadow: 0 0 0 1px var(--card); background: var(--card); }
.mark { border-left: 2px dashed var(--warm); }
.playhead { border-left: 2px solid var(--ink); opacity: 0; }
.axis { position: relative; display: flex; justify-content: space-between; margin-top: 4px;
  font-size: 12px; }
.axis b { position: absolute; padding: 0 4px; transform: translateX(-50%);
  background: var(--card); color: var(--warm); font-weight: 400; white-space: nowrap; }
.origin { margin: 6px 0 0; font-size: 12px; }
.beside { margin: 10px 0 12px; font-size: 14px; }
.beside a { color: var(--accent); }
.lead.small { margin-top: 0; font-size: 17px; }
.pairs-of { margin-top: 36px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 20px;
  margin-top: 14px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; border: 1px solid var(--line); border-radius: 12px;
  background: var(--card); }
.pair .card { border: 0; }

.tables { columns: 2 380px; column-gap: 48px; }
.tables .table { margin-bottom: 36px; }
.table { overflow-x: auto; break-inside: avoid; }
.below { max-width: 640px; margin-top: 28px; }
.below.wide { max-width: none; }
table { width: 100%; border-collapse: collapse; font-size: 14px; overflow-wrap: normal; }
caption { padding-bottom: 8px; text-align: left; font-weight: 600; overflow-wrap: anywhere; }
th, td { padding: 7px 0 7px 16px; border-top: 1px solid var(--line); text-align: right;
  font-weight: 400; }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--soft); border-top: 0; }
.ours > * { color: var(--accent); font-weight: 600; }
pre { margin: 0; padding: 14px 16px; border: 1px solid var(--line); border-radius: 8px;
  background: var(--card); font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, monospace;
  white-space: pre-wrap; }
details { margin-top: 16px; }
summary { margin-bottom: 12px; color: var(--soft); font-size: 14px; cursor: pointer; }

@media (max-width: 640px) {
  main { padding: 32px 18px 64px; }
  section { margin-top: 48px; }
  h1 { font-size: 32px; }
  .lead { font-size: 17px; }
  .tiles { grid-template-columns: 1fr 1fr; justify-content: stretch; }
  .chart { height: 260px; }
  .pair { grid-template-columns: 1fr; }
}
"""
