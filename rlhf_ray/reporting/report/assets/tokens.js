"use strict";

// Colors of tokens. A coloring says what number a token has, where that number lies on its scale, and what the scale is.

const COLORINGS = {
  advantage: {
    label: "advantage",
    has: (row) => row.advantages !== undefined,
    value: (row, group, token) => row.advantages[token],
    scale: diverging,
  },
  value: {
    label: "value before the token",
    has: (row) => row.values !== undefined,
    value: (row, group, token) => row.values[token],
    scale: diverging,
  },
  logprob: {
    label: "log-probability when sampled",
    has: (row) => row.logprobs !== undefined,
    value: (row, group, token) => row.logprobs[token],
    scale: surprise,
  },
  version: {
    label: "policy version",
    has: (row) => row.versions !== undefined,
    value: (row, group, token) => row.versions[token],
    scale: versions,
  },
  group: {
    label: "reward minus group mean",
    has: (row, group) => group.mean !== null && row.reward !== null,
    value: aboveGroup,
    scale: diverging,
  },
};

// Strong enough to be told apart, weak enough to read the text on it.
const FULL = 0.75;

function aboveGroup(row, group) {
  return row.reward - group.mean;
}

function coloringsOf(table) {
  const fits = (coloring) => table.rows.some((row) => coloring.has(row, table.groups[row.group]));
  return Object.entries(COLORINGS).filter(([, coloring]) => fits(coloring));
}

// All rows of a table share a scale, or its pages could not be compared.
function scaleOf(coloring, table) {
  const values = [];
  for (const row of table.rows) {
    const group = table.groups[row.group];
    if (!coloring.has(row, group)) continue;
    const count = row.texts ? row.texts.length : 1;
    for (let token = 0; token < count; token += 1) values.push(coloring.value(row, group, token));
  }
  return coloring.scale(values.filter((value) => value !== null && value !== undefined));
}

// One token far from all others must not make them look alike.
const WITHIN_SCALE = 0.98;

function quantile(values, share) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))];
}

function diverging(values) {
  const most = quantile(values.map(Math.abs), WITHIN_SCALE) || 1;
  const shade = (value) => tint(value < 0 ? "--below" : "--above", Math.min(1, Math.abs(value) / most));
  return {
    shade,
    gradient: [shade(-most), shade(0), shade(most)],
    marks: [`\u2264 ${formatNumber(-most)}`, `\u2265 ${formatSigned(most)}`],
  };
}

function surprise(values) {
  const least = Math.min(-0.1, quantile(values, 1 - WITHIN_SCALE) ?? -1);
  const shade = (value) => tint("--surprise", Math.min(1, Math.max(0, value / least)));
  return { shade, gradient: [shade(least), shade(0)], marks: [`\u2264 ${formatNumber(least)}`, "0 (certain)"] };
}

function versions(values) {
  const found = [...new Set(values)].sort((one, other) => one - other);
  const [oldest, newest] = [found[0] ?? 0, found.at(-1) ?? 0];
  if (found.length <= SERIES_COLORS) {
    const shade = (value) => tint(`--series-${found.indexOf(value)}`, 0.8);
    return { shade, swatches: found.map((version) => [shade(version), `version ${version}`]) };
  }
  const shade = (value) => tint("--above", (value - oldest) / (newest - oldest));
  return { shade, gradient: [shade(oldest), shade(newest)], marks: [`version ${oldest}`, `version ${newest}`] };
}

function tint(name, strength) {
  return `rgb(from ${color(name)} r g b / ${(FULL * strength).toFixed(3)})`;
}

function scaleLegend(scale) {
  if (scale.swatches) {
    return element("div", { class: "scale" }, ...scale.swatches.map(([shade, label]) => {
      const swatch = element("i", { class: "swatch" });
      swatch.style.backgroundColor = shade;
      return element("span", {}, swatch, label);
    }));
  }
  const bar = element("i", { class: "bar" });
  bar.style.backgroundImage = `linear-gradient(to right, ${scale.gradient.join(", ")})`;
  const [first, last] = scale.marks.map((mark) => element("span", { text: mark }));
  return element("div", { class: "scale" }, first, bar, last);
}

function completionElement(row, group, coloring, scale) {
  const made = element("div", { class: "completion", dir: "auto" });
  const shaded = coloring !== null && coloring.has(row, group);
  if (!row.texts) {
    const whole = appendVisible(element("span", { class: "untokenized" }), row.text);
    if (shaded) whole.style.backgroundColor = scale.shade(coloring.value(row, group, 0));
    made.append(whole);
    return made;
  }
  appendTokens(made, row, [0, row.texts.length], shaded ? tokenShade(row, group, coloring, scale) : null);
  return made;
}

function tokenShade(row, group, coloring, scale) {
  return (token) => {
    const value = coloring.value(row, group, token) ?? null;
    return value === null ? "" : scale.shade(value);
  };
}

// Tokens from the first up to the second number; without a shade they are plain text.
function appendTokens(parent, row, [start, end], shade) {
  for (let token = start; token < end; token += 1) {
    if (row.omitted && token === row.omitted.at) {
      parent.append(element("span", { class: "omitted", text: `${row.omitted.count} tokens left out` }));
    }
    const text = row.texts[token];
    const span = appendVisible(element("span", { class: text ? "token" : "token silent", data: { token } }), text);
    if (shade) span.style.backgroundColor = shade(token);
    parent.append(span);
  }
}
function tokenFacts(row, token) {
  const text = row.texts[token];
  const facts = [text ? JSON.stringify(text) : "no text of its own: a special token, or part of a character"];
  if (row.ids) facts.push(`token ${row.ids[token]}`);
  const segment = row.segments?.findLast(({ start }) => start <= token);
  if (segment?.observed) return [...facts, "observed, not sampled"];
  const logprob = row.logprobs?.[token] ?? null;
  if (logprob !== null) {
    facts.push(`log-probability ${formatNumber(logprob)} (${formatNumber(100 * Math.exp(logprob))} %)`);
  }
  if ((row.versions?.[token] ?? null) !== null) facts.push(`policy version ${row.versions[token]}`);
  if (row.advantages) {
    const advantage = row.advantages[token];
    facts.push(advantage === null ? "not in the loss" : `advantage ${formatSigned(advantage)}`);
  }
  if ((row.values?.[token] ?? null) !== null) facts.push(`value before it ${formatNumber(row.values[token])}`);
  return facts;
}
