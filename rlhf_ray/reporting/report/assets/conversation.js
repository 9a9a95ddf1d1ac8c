"use strict";

// A trajectory of several turns: what was sampled is shaded as in a completion, what was observed is gray.
function conversationElement(row, group, coloring, scale) {
  const shaded = coloring !== null && coloring.has(row, group);
  const shade = shaded ? tokenShade(row, group, coloring, scale) : null;
  const parts = row.segments.flatMap((segment, number) => {
    const end = row.segments[number + 1]?.start ?? row.texts.length;
    const made = segmentElement(row, segment, end, shade);
    const sequence = row.segments[number - 1]?.sequence ?? 0;
    return segment.sequence === sequence ? [made] : [dividerElement(row, segment), made];
  });
  return element("div", { class: "conversation" }, ...parts);
}

function segmentElement(row, segment, end, shade) {
  const turn = row.turns[segment.turn] ?? {};
  const tokens = element("div", { class: "completion", dir: "auto" });
  appendTokens(tokens, row, [segment.start, end], segment.observed ? null : shade);
  const label = segment.observed
    ? element("div", { class: "role", text: (turn.roles ?? []).join(", ") || "observed" })
    : element("div", { class: "role" }, `turn ${segment.turn + 1}`, fact(" reward", formatNumber(turn.reward)));
  const calls = segment.observed ? [] : (turn.calls ?? []);
  return element("div", { class: segment.observed ? "observation" : "turn" }, label, tokens, ...calls.map(callElement));
}

function callElement({ name, arguments: given }) {
  return element(
    "details",
    { class: "call" },
    appendVisible(element("summary"), `tool call ${name}`),
    appendVisible(element("div", { class: "completion", dir: "auto" }), given),
  );
}

function dividerElement(row, { sequence }) {
  const length = row.furtherPrompts[sequence - 1];
  return element("div", { class: "divider", text: `history rewritten: a prompt of ${formatNumber(length)} tokens` });
}
