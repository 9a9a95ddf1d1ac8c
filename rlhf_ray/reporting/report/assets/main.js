"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = new State();
  const curves = new Curves(data, state);
  const runs = new Runs(data, state, () => curves.draw(runs.visible));
  const browser = new Browser(data, state);
  const sections = [runs.root, differencesSection(data), curves.root, browser.root, settingsSection(data)];
  document.getElementById("page").append(...sections.filter((section) => section !== null));
  curves.draw(runs.visible);
  // Colors are drawn into the charts and tokens, so another theme needs another drawing.
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    curves.draw();
    if (browser.runs.length) browser.draw();
  });
})();
