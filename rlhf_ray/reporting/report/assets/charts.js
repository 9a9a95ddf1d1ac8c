"use strict";

const CHART_HEIGHT = 190;
const AXIS_FONT = "11px system-ui, sans-serif";
const AXES = { iteration: "iteration", samples: "completions", seconds: "wall time" };

// There is no iteration, completion or second between two.
const WHOLE = Array.from({ length: 12 }, (_, power) => [1, 2, 5].map((step) => step * 10 ** power)).flat();

const SMOOTHING = [
  ["0", "none"],
  ["0.6", "light"],
  ["0.9", "strong"],
];

// The section of curves; it is drawn again when a choice, the theme or the visible runs change.
class Curves {
  constructor(data, state) {
    this.data = data;
    this.state = state;
    this.plots = [];
    this.grid = element("div", { id: "charts" });
    this.observer = new ResizeObserver((entries) => entries.forEach(({ target }) => this.fit(target)));
    const axes = Object.entries(AXES).filter(([name]) => data.runs.some((run) => run.x[name]));
    this.axis = state.get("x", "iteration", axes.map(([name]) => name));
    this.smoothing = state.get("smooth", "0", SMOOTHING.map(([value]) => value));
    const choose = (field, key) => (value) => {
      this[field] = value;
      state.set(key, value);
      this.draw();
    };
    this.root = element(
      "section",
      { id: "curves" },
      element("h2", { text: "Curves" }),
      element(
        "div",
        { class: "controls" },
        labeled("over", select(axes, this.axis, choose("axis", "x"))),
        labeled("smoothing", select(SMOOTHING, this.smoothing, choose("smoothing", "smooth"))),
        element("span", { class: "hint mouse", text: "Drag across a chart to zoom, double-click to see all of it." }),
      ),
      this.grid,
    );
    if (data.missing.length) {
      const whose = data.runs.length > 1 ? "any of these runs" : "this run";
      this.root.append(element("p", { class: "hint", text: `Not recorded by ${whose}: ${data.missing.join(", ")}.` }));
    }
  }

  draw(visible = this.visible) {
    this.visible = visible;
    this.observer.disconnect();
    this.plots.forEach(({ plot }) => plot.destroy());
    this.plots = [];
    this.grid.replaceChildren();
    const options = { axis: this.axis, smoothing: Number(this.smoothing), alone: this.data.runs.length === 1 };
    for (const chart of chartsFor(this.data.charts, visible)) {
      const contents = chartSeries(chart, visible, options);
      if (contents) this.plots.push(this.add(chart, contents));
    }
    if (!this.plots.length) this.grid.append(element("p", { class: "note", text: "There is nothing to draw." }));
  }

  add(chart, contents) {
    const readings = contents.series.map((one) => (one.faint ? null : reading(one)));
    const place = element("span", { class: "place" });
    const frame = element("div", { class: "plot", role: "img", "aria-label": described(chart, contents) });
    this.grid.append(
      element(
        "figure",
        { class: "chart" },
        element(
          "figcaption",
          {},
          element("strong", { text: chart.title }),
          element("span", { class: "unit", text: chart.unit }),
          place,
        ),
        element("div", { class: "legend" }, ...readings.filter((one) => one !== null)),
        frame,
        meaning(chart),
      ),
    );
    const show = (plot) => {
      const index = plot.cursor.idx ?? null;
      const at = index ?? contents.data[0].length - 1;
      place.textContent = index === null ? "" : `${AXES[this.axis]} ${this.formatPlace(contents.data[0][at])}`;
      readings.forEach((one, column) => {
        if (one) one.lastChild.textContent = formatNumber(valueAt(contents.shown[column + 1], at));
      });
    };
    const plot = new uPlot(this.options(chart, contents, frame, show), contents.data, frame);
    show(plot);
    this.observer.observe(frame);
    return { frame, plot };
  }

  options(chart, contents, frame, show) {
    const look = {
      stroke: color("--muted"),
      font: AXIS_FONT,
      grid: { stroke: color("--line"), width: 1 },
      ticks: { stroke: color("--line"), width: 1, size: 4 },
    };
    return {
      width: frame.clientWidth || 320,
      height: CHART_HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: "charts" }, drag: { x: true, y: false }, points: { size: 7 } },
      scales: { x: { time: false }, y: { range: (_, low, high) => yRange(low, high, chart.fromZero) } },
      axes: [
        { ...look, size: 28, gap: 3, space: 60, incrs: WHOLE, values: (_, marks) => marks.map((at) => this.formatPlace(at)) },
        { ...look, size: (_, marks) => axisWidth(marks), gap: 3, values: (_, marks) => marks.map(formatTick) },
      ],
      series: [{}, ...contents.series.map(lineOptions)],
      hooks: { setCursor: [show] },
    };
  }

  formatPlace(value) {
    return this.axis === "seconds" ? formatSeconds(value) : Number(value.toPrecision(6)).toLocaleString("en");
  }

  fit(frame) {
    const found = this.plots.find((one) => one.frame === frame);
    if (found && frame.clientWidth) found.plot.setSize({ width: frame.clientWidth, height: CHART_HEIGHT });
  }
}

function lineOptions(one) {
  const lonely = { show: false, size: 5, fill: one.color, filter: (plot, index) => lonelyPoints(plot.data[index]) };
  const options = { stroke: one.color, width: 1.75, dash: one.dash, spanGaps: one.points, points: lonely };
  if (one.filled) return { ...options, width: 0.5, fill: one.color, points: { show: false } };
  if (one.faint) return { ...options, width: 1, alpha: 0.3, points: { show: false } };
  if (!one.points) return options;
  return { ...options, width: 1, points: { show: true, size: 6, width: 1.5, fill: color("--card"), stroke: one.color } };
}

// A number between two holes is on no line, so only a dot shows it. Places that only other runs know are no holes.
function lonelyPoints(column) {
  const own = [...column.keys()].filter((index) => column[index] !== undefined);
  const hole = (index) => (column[index] ?? null) === null;
  return own.filter((index, place) => !hole(index) && hole(own[place - 1]) && hole(own[place + 1]));
}

function reading(one) {
  const swatch = element("i", { class: one.points ? "dot" : one.filled ? "block" : "stroke" });
  swatch.style.color = one.color;
  if (one.dash.length) swatch.classList.add("dashed");
  return element("span", { class: "reading" }, swatch, element("span", { text: one.label }), element("b"));
}

function meaning(chart) {
  const lines = chart.curves.map((curve) => element("li", {}, element("code", { text: curve.key }), ` ${curve.formula}`));
  return element("details", { class: "meaning" }, element("summary", { text: "what this is" }), element("ul", {}, ...lines));
}

function described(chart, contents) {
  const labels = contents.series.filter((one) => !one.faint).map((one) => one.label);
  return `Chart of ${chart.title} (${chart.unit}): ${labels.join(", ")}`;
}

function yRange(low, high, fromZero) {
  if (low === null || low === undefined || low === Infinity) return [0, 1];
  if (fromZero && low >= 0) return [0, high > 0 ? high * 1.06 : 1];
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - room, high + room];
}

function axisWidth(marks) {
  const longest = Math.max(1, ...(marks ?? []).map((mark) => mark.length));
  return 12 + 6.5 * longest;
}
