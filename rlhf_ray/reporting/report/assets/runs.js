"use strict";

// The head of the page: each run in a card, which also shows or hides it in the charts; then the settings.
class Runs {
  constructor(data, state, onChange) {
    this.data = data;
    this.state = state;
    this.onChange = onChange;
    const hidden = state.get("hide", "").split(",").filter(Boolean).map(Number);
    this.hidden = new Set(data.runs.length > 1 ? hidden : []);
    this.root = element("section", { id: "runs" }, ...data.runs.map((run, index) => this.card(run, index)));
  }

  get visible() {
    return this.data.runs.map((run, index) => ({ run, index })).filter(({ index }) => !this.hidden.has(index));
  }

  card(run, index) {
    return element(
      "article",
      { class: "run" },
      element("header", {}, this.data.runs.length > 1 ? this.toggle(run, index) : null, title(run)),
      element("dl", { class: "figures" }, ...figures(run.results)),
      element(
        "ul",
        { class: "chips" },
        ...run.keySettings.map(([label, value]) =>
          element("li", {}, element("span", { text: `${label} ` }), element("b", { text: value })),
        ),
      ),
      ...run.notes.map((note) => element("p", { class: "note", text: note })),
    );
  }

  toggle(run, index) {
    const box = element("input", { type: "checkbox", "aria-label": `show ${run.name} in the charts` });
    box.checked = !this.hidden.has(index);
    box.addEventListener("change", () => {
      if (box.checked) this.hidden.delete(index);
      else this.hidden.add(index);
      this.state.set("hide", [...this.hidden].join(","));
      this.onChange();
    });
    const swatch = element("i", { class: "swatch", data: { series: index % SERIES_COLORS } });
    return element("label", { class: "toggle" }, box, swatch);
  }
}

function title(run) {
  return element(
    "h1",
    {},
    element("span", { class: "name", text: run.name }),
    run.algorithm ? element("span", { class: "algorithm", text: run.algorithm }) : null,
  );
}

function figures(results) {
  const { iterations, planned, seconds, reward, evaluation } = results;
  const unfinished = planned !== null && iterations < planned;
  const figure = (label, value, more) =>
    element(
      "div",
      {},
      element("dt", { text: label }),
      element("dd", {}, element("b", { text: value }), more ? element("small", { text: more }) : null),
    );
  const course = ({ first, best, bestAt }) =>
    first === null ? "" : `from ${formatNumber(first)}, best ${formatNumber(best)} at ${bestAt}`;
  return [
    figure(
      "iterations",
      unfinished ? `${iterations} of ${planned}` : String(iterations),
      unfinished ? "still going, or stopped" : seconds === null || seconds === undefined ? "" : `in ${formatSeconds(seconds)}`,
    ),
    figure("reward", formatNumber(reward.last), course(reward)),
    ...evaluation.map((one) => figure(`evaluation ${one.name}`, formatNumber(one.last), course(one))),
  ];
}

function settingsSection(data) {
  const summary = (run) =>
    data.runs.length > 1 ? `all settings of ${run.name}` : `all ${run.settings.length} settings`;
  const ofRun = (run) =>
    element(
      "details",
      { class: "settings" },
      element("summary", { text: summary(run) }),
      element("div", { class: "scroll" }, settingsTable(run)),
    );
  const known = data.runs.filter((run) => run.settings.length);
  return known.length ? element("section", {}, element("h2", { text: "Settings" }), ...known.map(ofRun)) : null;
}

function settingsTable(run) {
  const row = ([name, value]) => element("tr", {}, element("th", { scope: "row", text: name }), element("td", { text: value }));
  return element("table", {}, element("tbody", {}, ...run.settings.map(row)));
}

// What differs between runs comes before their curves: it is the reason to look at them side by side.
function differencesSection(data) {
  if (data.runs.length < 2) return null;
  const unknown = data.runs.filter((run) => !run.settings.length).map((run) => run.name);
  const notes = [];
  if (unknown.length) notes.push(`Without settings, so not compared: ${unknown.join(", ")}.`);
  if (data.runs.length - unknown.length >= 2 && !data.differences.length) notes.push("The settings are the same.");
  return element(
    "section",
    { id: "differences" },
    element("h2", { text: "Differing settings" }),
    data.differences.length ? element("div", { class: "scroll" }, differencesTable(data)) : null,
    ...notes.map((text) => element("p", { class: "note", text })),
  );
}

function differencesTable(data) {
  const head = (run, index) =>
    element("th", { scope: "col" }, element("i", { class: "swatch", data: { series: index % SERIES_COLORS } }), run.name);
  const row = ([name, values]) =>
    element(
      "tr",
      {},
      element("th", { scope: "row", text: name }),
      ...values.map((value) => element("td", { text: value === "" ? NO_NUMBER : value })),
    );
  return element(
    "table",
    {},
    element("thead", {}, element("tr", {}, element("td"), ...data.runs.map(head))),
    element("tbody", {}, ...data.differences.map(row)),
  );
}
