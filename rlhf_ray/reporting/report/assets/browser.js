"use strict";

const ROWS_A_PAGE = 16;

const lowest = (value) => value ?? -Infinity;
const known = (values) => (values ?? []).filter((value) => value !== null);
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const meanOf = (values) => mean(known(values));

// Why a trajectory is truncated.
const CUTS = { length: "cut at the limit", turns: "no turns left", environment: "cut by the environment" };

const ORDERS = {
  table: ["as sampled", null],
  best: ["highest reward", (row) => -lowest(row.reward)],
  worst: ["lowest reward", (row) => lowest(row.reward)],
  above: ["most above its group", (row, group) => -lowest(aboveGroup(row, group))],
  below: ["most below its group", (row, group) => lowest(aboveGroup(row, group))],
  longest: ["longest", (row) => -lowest(row.tokens)],
  shortest: ["shortest", (row) => lowest(row.tokens)],
  surprising: ["least probable on average", (row) => lowest(meanOf(row.logprobs))],
  advantage: ["highest mean advantage", (row) => -lowest(meanOf(row.advantages))],
};

// The section of sampled completions.
class Browser {
  constructor(data, state) {
    this.runs = data.runs.map((run, index) => ({ run, index })).filter(({ run }) => run.tables.length);
    this.state = state;
    this.tooltip = element("div", { id: "tooltip", role: "tooltip", hidden: true });
    this.controls = element("div", { class: "controls" });
    this.list = element("div", { id: "completions" });
    this.root = element(
      "section",
      { id: "browser" },
      element("h2", { text: "Completions" }),
      this.controls,
      this.list,
      this.tooltip,
    );
    if (!this.runs.length) {
      this.list.append(element("p", { class: "note", text: "This page holds no completions." }));
      return;
    }
    this.filterBox = element("input", { type: "search", placeholder: "text in prompt or completion" });
    this.filterBox.value = state.get("filter", "");
    this.filterBox.addEventListener("input", () => this.choose("filter", this.filterBox.value));
    this.list.addEventListener("pointerover", (event) => this.point(event));
    this.list.addEventListener("pointerdown", (event) => this.point(event));
    // A finger leaves as soon as it is lifted: what it asked for stays until it asks for something else.
    this.list.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && this.point(null));
    document.addEventListener("pointerdown", (event) => this.list.contains(event.target) || this.point(null));
    this.draw();
  }

  choose(name, value) {
    this.state.set(name, value);
    if (name !== "page") this.state.set("page", null);
    this.draw();
  }

  read() {
    const numbers = this.runs.map(({ index }) => String(index));
    const runNumber = this.state.get("run", numbers[0], numbers);
    const { run } = this.runs.find(({ index }) => String(index) === runNumber);
    const steps = run.tables.map((table) => String(table.step));
    const step = this.state.get("step", steps.at(-1), steps);
    const table = run.tables.find((one) => String(one.step) === step);
    const colorings = coloringsOf(table);
    const names = ["none", ...colorings.map(([name]) => name)];
    const orders = Object.keys(ORDERS).filter((name) => this.canOrder(name, table));
    return {
      runNumber,
      run,
      step,
      table,
      colorings,
      coloring: this.state.get("color", names[1] ?? "none", names),
      orders,
      order: this.state.get("sort", "table", orders),
      filter: this.state.get("filter", "").toLowerCase(),
    };
  }

  canOrder(name, table) {
    if (name === "surprising") return table.rows.some((row) => row.logprobs);
    return name !== "advantage" || table.rows.some((row) => row.advantages);
  }

  draw() {
    const view = this.read();
    const coloring = COLORINGS[view.coloring] ?? null;
    const scale = coloring ? scaleOf(coloring, view.table) : null;
    const rows = this.rows(view);
    const pages = Math.max(1, Math.ceil(rows.length / ROWS_A_PAGE));
    const page = Math.min(pages, Math.max(1, Number.parseInt(this.state.get("page", "1"), 10) || 1));
    const shown = rows.slice((page - 1) * ROWS_A_PAGE, page * ROWS_A_PAGE);
    this.drawControls(view, scale);
    this.shown = shown;
    this.point(null);
    this.list.replaceChildren(
      this.pager(page, pages, rows.length, view),
      ...groupElements(shown, view.table, coloring, scale),
    );
    if (pages > 1) this.list.append(this.pager(page, pages, rows.length, view));
  }

  rows({ table, order, filter }) {
    const groupOf = (row) => table.groups[row.group];
    const texts = (row) => [row.texts ? row.texts.join("") : row.text, ...groupOf(row).prompt.map(({ text }) => text)];
    const found = table.rows.filter((row) => !filter || texts(row).some((text) => text.toLowerCase().includes(filter)));
    const key = ORDERS[order][1];
    return key ? [...found].sort((one, other) => key(one, groupOf(one)) - key(other, groupOf(other))) : found;
  }

  drawControls(view, scale) {
    const runs = this.runs.map(({ run, index }) => [String(index), run.name]);
    const steps = view.run.tables.map(({ step }) => [String(step), String(step)]);
    const colorings = [...view.colorings.map(([name, { label }]) => [name, label]), ["none", "nothing"]];
    const orders = view.orders.map((name) => [name, ORDERS[name][0]]);
    const chooser = (name, options, chosen) => select(options, chosen, (value) => this.choose(name, value));
    const filter = this.filterBox.parentNode ?? labeled("filter", this.filterBox);
    const others = [
      runs.length > 1 ? labeled("run", chooser("run", runs, view.runNumber)) : null,
      labeled("iteration", chooser("step", steps, view.step)),
      labeled("order", chooser("sort", orders, view.order)),
      labeled("color by", chooser("color", colorings, view.coloring)),
    ].filter((one) => one !== null);
    // The box keeps its place in the document, or it would lose the reader's cursor at each letter.
    for (const old of [...this.controls.children]) if (old !== filter) old.remove();
    if (!filter.isConnected || filter.parentNode !== this.controls) this.controls.append(filter);
    filter.before(...others);
    if (scale) this.controls.append(scaleLegend(scale));
  }

  pager(page, pages, count, { table, filter }) {
    const first = (page - 1) * ROWS_A_PAGE + 1;
    const last = Math.min(count, page * ROWS_A_PAGE);
    const of = filter ? `${count} that match` : `${count} here`;
    const all = table.total > table.rows.length ? `, ${table.total} in the file` : "";
    const text = count ? `${first}\u2013${last} of ${of}${all}` : "No completion here has this text.";
    const turn = (label, to) =>
      element("button", {
        type: "button",
        text: label,
        disabled: to < 1 || to > pages,
        on: { click: () => this.choose("page", String(to)) },
      });
    return element(
      "nav",
      { class: "pager", "aria-label": "pages of completions" },
      turn("previous", page - 1),
      element("span", { text }),
      turn("next", page + 1),
    );
  }

  point(event) {
    const span = event?.target.closest(".token") ?? null;
    const card = span?.closest(".row") ?? null;
    this.tooltip.hidden = !card;
    if (!card) return;
    const row = this.shown[Number(card.dataset.place)];
    const facts = tokenFacts(row, Number(span.dataset.token));
    this.tooltip.replaceChildren(...facts.map((fact) => appendVisible(element("div"), fact)));
    const box = span.getBoundingClientRect();
    const width = this.tooltip.offsetWidth;
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8));
    const below = box.bottom + this.tooltip.offsetHeight + 12 < document.documentElement.clientHeight;
    this.tooltip.style.left = `${left + scrollX}px`;
    this.tooltip.style.top = `${(below ? box.bottom + 6 : box.top - this.tooltip.offsetHeight - 6) + scrollY}px`;
  }
}

// Neighbors of one group share a card, so that what was written to the same prompt can be compared.
function groupElements(rows, table, coloring, scale) {
  const cards = [];
  let last = null;
  rows.forEach((row, place) => {
    const group = table.groups[row.group];
    if (row.group !== last) cards.push(groupElement(group));
    last = row.group;
    cards.at(-1).append(rowElement(row, group, coloring, scale, place));
  });
  return cards;
}

function groupElement(group) {
  const message = ({ role, text }) =>
    element(
      "div",
      { class: "entry" },
      element("span", { class: "role", text: role || "prompt" }),
      appendVisible(element("div", { class: "prompt", dir: "auto" }), text),
    );
  return element(
    "article",
    { class: "group" },
    element("header", {}, fact("group", group.id), group.mean === null ? null : fact("mean reward", formatNumber(group.mean))),
    ...group.prompt.map(message),
  );
}

function rowElement(row, group, coloring, scale, place) {
  const difference = group.mean === null || row.reward === null ? null : aboveGroup(row, group);
  const cut = CUTS[row.finish];
  const facts = [
    row.environment ? fact("", row.environment) : null,
    row.segments ? fact("", row.numTurns === 1 ? "1 turn" : `${row.numTurns} turns`) : null,
    row.tokens === null ? null : fact("", `${row.tokens} tokens`),
    row.numObserved ? fact("", `${row.numObserved} observed`) : null,
    row.finish === null ? null : fact("", cut ?? row.finish, cut ? "cut" : ""),
    row.version === null ? null : fact("version", row.version),
    ...Object.entries(row.functions).map(([name, value]) => fact(name, formatNumber(value))),
  ];
  return element(
    "div",
    { class: "entry row", data: { place } },
    element(
      "div",
      { class: "facts" },
      element(
        "div",
        { class: "reward" },
        element("b", { text: formatNumber(row.reward) }),
        difference === null ? null : element("span", { text: difference === 0 ? "\u00b10" : formatSigned(difference), title: "reward minus group mean" }),
      ),
      ...facts.filter((one) => one !== null),
    ),
    row.segments ? conversationElement(row, group, coloring, scale) : completionElement(row, group, coloring, scale),
  );
}

function fact(label, value, kind = "") {
  return element("span", { class: `fact ${kind}` }, label ? `${label} ` : "", element("b", { text: value }));
}
