"""The style sheet and the script of a report; without the script everything is shown as well."""

from __future__ import annotations

COLOURS = 8  # number of the colours c0, c1, ... below; further curves begin again

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2128; --soft: #5b6573; --rule: #e3e7ec;
  --axis: #8d97a5; --shade: rgba(20, 30, 50, .06);
  --c0: #2563c9; --c1: #d4580b; --c2: #0d8a63; --c3: #9a3fb8;
  --c4: #b8860b; --c5: #0e8ba5; --c6: #c4314b; --c7: #5f6b7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #101317; --card: #181c22; --text: #e4e8ee; --soft: #98a3b2; --rule: #2a3039;
    --axis: #6b7685; --shade: rgba(255, 255, 255, .05);
    --c0: #6ea8ff; --c1: #ff9a57; --c2: #45cf9f; --c3: #d58bf0;
    --c4: #e5b93c; --c5: #4fc6de; --c6: #ff7d92; --c7: #a9b4c2;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 6px 0; }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; }
.tiles { display: grid; gap: 12px; margin: 20px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 180px), 1fr)); }
.tiles div, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tiles div { padding: 12px 14px; }
.tiles dt { color: var(--soft); font-size: 13px; }
.tiles dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); }
.charts { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); }
.card { padding: 14px 16px 12px; min-width: 0; position: relative; }
.card + .card { margin-top: 16px; }
.charts .card { margin-top: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 2px; padding: 0;
  list-style: none; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 18px; height: 0; margin-right: 6px;
  border-top: 2.5px solid; vertical-align: 3px; }
.legend i.faint { opacity: .4; border-top-width: 5px; }
.legend i.dashed { border-top-style: dashed; }
.legend li { overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--axis); fill: none; }
svg .mark { stroke: var(--axis); stroke-dasharray: 2 4; }
svg .cursor { stroke: var(--axis); pointer-events: none; }
svg .curve { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg .faint { stroke-width: .9; opacity: .38; }
svg .dashed { stroke-dasharray: 5 3; }
svg circle { fill: currentColor; }
.readout { position: absolute; z-index: 1; pointer-events: none; padding: 6px 9px; font-size: 13px;
  background: var(--card); border: 1px solid var(--axis); border-radius: 6px; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); }
thead th { color: var(--text); font-weight: 600; }
tr.differs td { font-weight: 600; }
tr.differs th { color: var(--text); }
tr:last-child th, tr:last-child td { border-bottom: 0; }
details { margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--shade); border-radius: 6px; padding: 10px 12px; margin: 8px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
.grids { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; }
figure img { display: block; width: 100%; max-width: 620px; height: auto; border-radius: 4px; }
figcaption { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
.stepper input { width: 100%; max-width: 620px; accent-color: var(--c0); margin: 4px 0 2px; }
""" + "\n".join(f".c{k} {{ color: var(--c{k}); }}" for k in range(COLOURS))

SCRIPT = """
// A chart tells the values at the pointer. They are read back from the drawn points.
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [x0, x1] = svg.dataset.x.split(" ").map(Number);
  const [y0, y1] = svg.dataset.y.split(" ").map(Number);
  const log = svg.dataset.log === "1", percent = svg.dataset.percent === "1";
  const axis = svg.querySelector("path.axis").getBBox();
  const curves = [...svg.querySelectorAll("polyline[data-label]")].map(line => ({
    label: line.dataset.label, colour: getComputedStyle(line).color,
    points: line.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number)),
  }));
  const value = y => {
    const share = 1 - (y - axis.y) / axis.height;
    const v = log ? y0 * (y1 / y0) ** share : y0 + (y1 - y0) * share;
    return percent ? (100 * v).toPrecision(3) + "%" : String(Number(v.toPrecision(4)));
  };
  const card = svg.closest(".card");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  const box = document.createElement("div");
  box.className = "readout";
  const hide = () => { cursor.remove(); box.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY)
      .matrixTransform(svg.getScreenCTM().inverse()).x;
    if (at < axis.x || at > axis.x + axis.width) return hide();
    cursor.setAttribute("d", `M${at} ${axis.y}v${axis.height}`);
    svg.append(cursor);
    const step = x0 + (x1 - x0) * (at - axis.x) / axis.width;
    box.replaceChildren(`near step ${Math.round(step)}`);
    for (const { label, colour, points } of curves) {
      const nearest = points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      const row = document.createElement("div"), name = document.createElement("span");
      name.style.color = colour;
      name.textContent = `${label}: `;
      row.append(name, value(nearest[1]));
      box.append(row);
    }
    card.append(box);
    const frame = card.getBoundingClientRect(), inside = event.clientX - frame.left;
    const left = inside > frame.width / 2 ? inside - box.offsetWidth - 14 : inside + 14;
    box.style.left = `${Math.max(0, left)}px`;
    box.style.top = `${event.clientY - frame.top + 12}px`;
  });
}
// The grids of a run are shown one at a time, by a slider over their steps.
for (const section of document.querySelectorAll(".over-time")) {
  const figures = [...section.querySelectorAll("figure")];
  if (figures.length < 2) continue;
  const slider = Object.assign(document.createElement("input"), {
    type: "range", min: 0, max: figures.length - 1, value: figures.length - 1,
  });
  slider.setAttribute("aria-label", "sample grid by step");
  const show = () => {
    figures.forEach((figure, k) => { figure.hidden = k !== Number(slider.value); });
  };
  slider.addEventListener("input", show);
  const holder = document.createElement("div");
  holder.className = "stepper";
  holder.append(slider);
  section.prepend(holder);
  section.classList.remove("grids");
  show();
}
"""
