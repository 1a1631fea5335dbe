"use strict";
// Draws what the page holds: <figure data-chart='{"kind": ...}'>, and <div data-choice='[{"name": ..., "charts": [...]}]'>
// with a list to choose from. Each chart is as wide as the page leaves it room, and is drawn anew when that changes.
// The fields of each kind stand in qtool/report/charts.py. Text reaches the page as text, never as markup.
(() => {
  const NARROWEST = 200; // pixels that a chart is drawn for; the page's style shrinks it where there are fewer
  const COLORS = 8; // --c0 to --c7; series beyond them are dashed
  const short = (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? d3.format(".3~e") : d3.format(".4~g"))(value);
  const color = (n) => `var(--c${n % COLORS})`;
  const scale = (isLog, label) => ({ type: isLog ? "log" : "linear", label, labelArrow: "none", labelAnchor: "center", tickFormat: short });

  function element(tag, text, parent) {
    const made = document.createElement(tag);
    made.textContent = text ?? "";
    parent?.append(made);
    return made;
  }

  // Names with the color of their lines, above the drawing.
  function legend(names, caption) {
    names.forEach((name, n) => {
      const item = element("span", "", caption);
      element("i", "", item).style.borderTop = `3px ${n >= COLORS ? "dashed" : "solid"} ${color(n)}`;
      item.append(name);
    });
  }

  const kinds = {
    lines({ x, y, log, curves }, width, caption) {
      const names = Object.keys(curves);
      const points = names.flatMap((name, n) => curves[name].map(([at, value]) => ({ at, value, name, n })));
      legend(names, caption);
      const marks = names.map((name, n) =>
        Plot.line(points.filter((point) => point.n === n), { x: "at", y: "value", stroke: color(n), strokeDasharray: n >= COLORS ? "5 4" : null }));
      return Plot.plot({
        width, height: 290, marginLeft: 64, marginRight: 12, marginBottom: 40,
        x: { ...scale(false, x), tickFormat: (at) => (Number.isInteger(at) ? String(at) : ""), ticks: Math.min(16, width / 40, d3.max(points, (point) => point.at) || 1) },
        y: { ...scale(log, null), grid: true, nice: true, ticks: 6 },
        marks: [
          ...marks,
          Plot.dot(points, { x: "at", y: "value", fill: (point) => color(point.n), r: 2.5 }),
          Plot.tip(points, Plot.pointer({ x: "at", y: "value", title: ({ at, name, value }) => `${x} ${at}, ${name}\n${short(value)}` })),
        ],
      });
    },

    // Blocks from left to right where there is room for that, else from top to bottom.
    heat({ x, values, log, reverse, categories }, width) {
      const isWide = width >= 600;
      const cells = values.map(([block, row, value]) => ({ block, row, value, shown: categories ? categories[value] : short(value) }));
      const blocks = [...new Set(cells.map((cell) => cell.block))];
      const rows = [...new Set(cells.map((cell) => cell.row))];
      const longest = d3.max(rows, (row) => row.length);
      const along = { domain: blocks, label: x, labelArrow: "none", tickFormat: (block) => (blocks.indexOf(block) % Math.ceil(blocks.length / 24) ? "" : String(block)), type: "band", padding: 0.04 };
      const across = { domain: rows, label: null, type: "band", padding: 0.04 };
      const margin = Math.min(200, 7 * longest + 12);
      const place = isWide ? { x: "block", y: "row" } : { x: "row", y: "block" };
      const [low, high] = d3.extent(cells, (cell) => cell.value);
      const isLog = log && low < high;
      const middle = isLog ? Math.sqrt(low * high) : (low + high) / 2;
      const room = (width - (isWide ? margin + 8 : margin * 0.5 + 40)) / (isWide ? blocks : rows).length;
      // Dark cells, of the lower half of the colors or, in reverse, of the upper one, bear light text.
      const ink = ({ value }) => (categories || (reverse ? value > middle : value < middle) ? "white" : "black");
      const fill = categories
        ? { type: "ordinal", domain: categories.map((_, n) => n), range: categories.map((_, n) => color(n)), tickFormat: (n) => categories[n], legend: true }
        : { type: isLog ? "log" : "linear", scheme: "viridis", reverse, legend: low < high, tickFormat: short, label: null, width: Math.min(width, 320), marginLeft: 24, marginRight: 24, ticks: [low, middle, high] };
      return Plot.plot({
        width,
        height: isWide ? 26 * rows.length + 44 : Math.max(90, Math.min(26, 900 / blocks.length) * blocks.length) + margin,
        marginLeft: isWide ? margin : 40, marginRight: isWide ? 8 : margin * 0.5, marginTop: isWide ? 8 : margin * 0.8, marginBottom: isWide ? 36 : 8,
        x: isWide ? { ...along, labelAnchor: "center" } : { ...across, axis: "top", tickRotate: -55 },
        y: isWide ? across : { ...along, label: null },
        color: fill,
        marks: [
          Plot.cell(cells, { ...place, fill: "value" }),
          room >= 40 && !categories ? Plot.text(cells, { ...place, text: ({ value }) => d3.format(".2~r")(value), fill: ink, fontSize: 10 }) : null,
          Plot.tip(cells, Plot.pointer({ ...place, title: ({ block, row, shown }) => `${x} ${block}, ${row}\n${shown}` })),
        ],
      });
    },

    // A row for each label; of several series those of one label stand below each other in it, and the caption names them.
    intervals({ unit, rows }, width, caption) {
      const labels = [...new Set(rows.map((row) => row.label))];
      const hasSeries = rows.some((row) => row.series !== undefined);
      const series = hasSeries ? [...new Set(rows.map((row) => row.series))] : labels;
      if (hasSeries) legend(series, caption);
      const margin = Math.min(width / 2, 7 * d3.max(labels, (label) => label.length) + 16);
      const ends = rows.map((row) => ({ ...row, low: row.value - row.spread, high: row.value + row.spread }));
      const of = (name) => ends.filter((row) => (hasSeries ? row.series : row.label) === name);
      const below = (n) => (hasSeries ? 9 * (n - (series.length - 1) / 2) : 0);
      const [low, high] = [d3.min(ends, (row) => row.low), d3.max(ends, (row) => row.high)];
      const beside = Math.abs(low) / 10 || 1; // where all values are one: an axis without length has no place for it
      return Plot.plot({
        width, height: (hasSeries ? 9 * series.length + 15 : 30) * labels.length + 52, marginLeft: margin, marginRight: 24, marginTop: 4, marginBottom: 40,
        x: { ...scale(false, unit), grid: true, ticks: Math.max(2, Math.min(8, width / 120)), ...(low < high ? { nice: true } : { domain: [low - beside, high + beside] }) },
        y: { domain: labels, label: null, type: "band" },
        marks: [
          Plot.axisY({ label: null, lineWidth: (margin - 10) / 12, textOverflow: "ellipsis-middle" }), // in units of the font's 12 pixels
          ...series.map((name, n) => Plot.ruleY(of(name).filter((row) => row.spread), { y: "label", x1: "low", x2: "high", stroke: color(n), strokeWidth: 3, dy: below(n) })),
          ...series.map((name, n) => Plot.dot(of(name), { y: "label", x: "value", fill: color(n), r: hasSeries ? 3.5 : 4.5, dy: below(n) })),
          Plot.tip(ends, Plot.pointer({ y: "label", x: "value", title: ({ label, series: name, value, spread }) => `${name ? `${label}, ${name}` : label}\n${short(value)}${spread ? ` ± ${short(spread)}` : ""}` })),
        ],
      });
    },

    // Counts over bins, of one series or several, with the levels of a grid as lines over them.
    bins({ x, edges, log, counts, levels }, width, caption) {
      const names = Object.keys(counts);
      const bins = names.flatMap((name, n) => {
        const total = d3.sum(counts[name]) || 1;
        return counts[name].map((count, at) => ({ from: edges[at], to: edges[at + 1], share: count / total, name, n }));
      });
      legend(levels?.length ? [...names, "the grid's levels"] : names, caption);
      // Rare large magnitudes are what such a chart is for: all of them are shown, and of the small ones 99.8 %.
      const below = new Map(d3.groups(bins, (bin) => bin.n).map(([n, of]) => [n, d3.cumsum(of, (bin) => bin.share)]));
      const first = log ? d3.min(names, (_, n) => below.get(n).findIndex((share) => share > 0.002)) : 0;
      const last = log ? d3.max(bins, (bin) => (bin.share > 0 ? edges.indexOf(bin.to) : 0)) : edges.length;
      const shown = bins.filter((bin) => edges.indexOf(bin.from) >= first && edges.indexOf(bin.to) <= last);
      return Plot.plot({
        width, height: 230, marginLeft: 52, marginRight: 12, marginBottom: 40,
        x: { ...scale(log, x), ticks: Math.max(3, Math.min(10, width / 80)) },
        y: { ...scale(false, null), type: log ? "sqrt" : "linear", percent: true, grid: true, ticks: 4, tickFormat: (share) => `${short(share)} %` },
        marks: [
          ...names.map((_, n) => Plot.rectY(shown.filter((bin) => bin.n === n), { x1: "from", x2: "to", y: "share", fill: color(n), fillOpacity: 0.5, inset: 0 })),
          Plot.ruleX(levels ?? [], { stroke: color(names.length), strokeWidth: 1.5, strokeOpacity: 0.75 }),
          Plot.ruleY([0], { stroke: "var(--line)" }),
          Plot.tip(shown, Plot.pointerX({ x: (bin) => (log ? Math.sqrt(bin.from * bin.to) : (bin.from + bin.to) / 2), y: "share", title: ({ from, to, share, name }) => `${name}\n${short(from)} to ${short(to)}\n${short(100 * share)} %` })),
        ],
      });
    },

    // Points bear their number, and the caption the names of a dozen: names beside points would cover each other.
    scatter({ x, y, log, points }, width, caption) {
      const n = (point) => points.indexOf(point);
      const ink = (point) => color(n(point));
      legend(points.length > 12 ? [] : points.map(({ name }, at) => `${at + 1} ${name}`), caption);
      const front = d3.sort(points.filter((point) => point.front), (point) => point.x);
      const place = { x: "x", y: "y" };
      const low = (point) => (log ? Math.max(point.y - point.spread, point.y / 10) : point.y - point.spread);
      const said = ({ name, x: at, y: value, spread, front: isBest }) =>
        `${name}${isBest ? ", on the Pareto front" : ""}\n${x}: ${short(at)}\n${y}: ${short(value)}${spread ? ` ± ${short(spread)}` : ""}`;
      return Plot.plot({
        width, height: 320, marginLeft: 64, marginRight: 24, marginTop: 28, marginBottom: 44, inset: 18, // for the numbers beside points
        x: { ...scale(false, x), grid: true, nice: true, ticks: Math.max(3, Math.min(10, width / 90)) },
        y: { ...scale(log, null), grid: true, nice: true, ticks: 6 },
        marks: [
          Plot.line(front, { ...place, stroke: "var(--soft)", strokeDasharray: "5 4", curve: "step-after" }),
          Plot.ruleX(points.filter((point) => point.spread), { x: "x", y1: low, y2: (point) => point.y + point.spread, stroke: ink, strokeOpacity: 0.6 }),
          Plot.dot(points, { ...place, r: (point) => (point.front ? 6 : 4.5), fill: (point) => (point.front ? ink(point) : "var(--card)"), stroke: ink, strokeWidth: 2 }),
          ...d3.groups(points, n).map(([at, of]) => Plot.text(of, { ...place, text: [String(at + 1)], dx: at % 2 ? -13 : 13, dy: -9, fontSize: 11, fill: "currentColor" })),
          Plot.tip(points, Plot.pointer({ ...place, title: said })),
        ],
      });
    },
  };

  function show(figure, chart) {
    let drawn = 0;
    const draw = () => {
      const { paddingLeft, paddingRight } = getComputedStyle(figure);
      const room = Math.floor(figure.clientWidth - parseFloat(paddingLeft) - parseFloat(paddingRight));
      const width = Math.max(room, NARROWEST);
      if (!(room > 0) || width === drawn) return; // of a figure that has left the page it is no number
      drawn = width;
      const caption = document.createElement("figcaption");
      element("b", chart.title, caption);
      if (chart.note) element("span", chart.note, caption).className = "soft";
      figure.replaceChildren(caption);
      figure.append(kinds[chart.kind](chart, width, caption));
    };
    draw();
    new ResizeObserver(draw).observe(figure);
  }

  function offer(place) {
    const choices = JSON.parse(place.dataset.choice);
    const label = element("label", `${place.dataset.label} `, place);
    const list = element("select", "", label);
    choices.forEach(({ name }, n) => { element("option", name, list).value = n; });
    const shown = element("div", "", place);
    shown.className = "pair";
    const change = () => {
      shown.replaceChildren();
      choices[list.value].charts.forEach((chart) => show(element("figure", "", shown), chart));
    };
    list.addEventListener("change", change);
    change();
  }

  document.querySelectorAll("figure[data-chart]").forEach((figure) => show(figure, JSON.parse(figure.dataset.chart)));
  document.querySelectorAll("[data-choice]").forEach(offer);
})();
