"use strict";

// Charts as the runs' numbers make them: a table of columns for uPlot, and what each column is.

const DASHES = [[], [6, 4], [2, 3], [8, 3, 2, 3]];

// A stacked chart of several runs would hide all but one: each part becomes a chart in which runs can be compared.
function chartsFor(charts, runs) {
  const split = (chart) =>
    chart.curves
      .filter((curve) => runs.some(({ run }) => run.values[curve.key]))
      .map((curve) => ({ ...chart, title: `Time: ${curve.label}`, stacked: false, curves: [curve] }));
  return charts.flatMap((chart) => (chart.stacked && runs.length > 1 ? split(chart) : [chart]));
}

function chartSeries(chart, runs, { axis, smoothing, alone }) {
  const series = [];
  const tables = [];
  for (const { run, index } of runs) {
    const xs = run.x[axis];
    const curves = chart.curves.filter((curve) => run.values[curve.key]);
    if (!xs || !curves.length) continue;
    const columns = [];
    for (const curve of curves) {
      const place = chart.curves.indexOf(curve);
      const raw = run.values[curve.key];
      const smoothed = smoothing > 0 && !curve.points && !chart.stacked;
      const look = {
        label: label(chart, curve, run, alone),
        color: seriesColor(alone ? place : index),
        dash: alone ? [] : DASHES[place % DASHES.length],
        points: curve.points,
      };
      if (smoothed) {
        columns.push(raw);
        series.push({ ...look, faint: true });
      }
      columns.push(smoothed ? smooth(raw, smoothing) : raw);
      series.push({ ...look, faint: false });
    }
    tables.push([xs, ...columns]);
  }
  if (!tables.length) return null;
  const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
  return chart.stacked ? stack(data, series) : { data, shown: data, series };
}

function label(chart, curve, run, alone) {
  if (alone) return curve.label;
  return chart.curves.length > 1 ? `${run.name} \u00b7 ${curve.label}` : run.name;
}

// The exponential mean, without the pull toward the first value that it has in the beginning.
function smooth(values, weight) {
  let [mean, share] = [0, 0];
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    mean = weight * mean + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return mean / share;
  });
}

// The highest first: each of the sums below then covers the part of it that is not its own. Where there is no part at
// all, as in what is measured before the first iteration, there is no sum: 0 would be a number that nobody measured.
function stack(data, series) {
  const parts = data.slice(1);
  const measured = data[0].map((_, index) => parts.some((column) => (column[index] ?? null) !== null));
  const sums = [];
  for (const column of parts) {
    const below = sums.at(-1);
    sums.push(column.map((value, index) => (measured[index] ? (value ?? 0) + (below ? below[index] : 0) : null)));
  }
  const reversed = (list) => [...list].reverse();
  return {
    data: [data[0], ...reversed(sums)],
    shown: [data[0], ...reversed(parts)],
    series: reversed(series).map((one) => ({ ...one, filled: true })),
  };
}

// A run has no number at a place that only another run knows; its nearest one before is what the reader means.
function valueAt(column, index) {
  for (let place = index; place >= 0; place -= 1) {
    if (column[place] !== null && column[place] !== undefined) return column[place];
  }
  return null;
}
