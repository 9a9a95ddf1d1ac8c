"use strict";

const MINUS = "\u2212";
const NO_NUMBER = "\u2013";

function formatNumber(value, digits = 3) {
  if (value === null || value === undefined) return NO_NUMBER;
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size >= 1e6 || size < 1e-3) text = size.toExponential(Math.max(0, digits - 1)).replace("e+", "e");
  else if (size >= 1e4) text = `${trimmed((size / 1e3).toPrecision(digits))}k`;
  else if (Number.isInteger(size)) text = String(size);
  else text = size >= 100 ? size.toFixed(Math.max(0, digits - 3)) : size.toPrecision(digits);
  return (value < 0 ? MINUS : "") + text.replace("e-", `e${MINUS}`);
}

// For the marks of an axis, where "0.500" beside "0.25" would only be wider.
function formatTick(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-3 ? trimmed(size.toExponential(1)) : trimmed(size >= 1e4 ? size / 1e3 : size);
  return (value < 0 ? MINUS : "") + text.replace("e-", `e${MINUS}`) + (size >= 1e4 && size < 1e6 ? "k" : "");
}

function formatSigned(value) {
  return value > 0 ? `+${formatNumber(value)}` : formatNumber(value);
}

function formatSeconds(value) {
  if (value === null || value === undefined) return NO_NUMBER;
  const seconds = Math.round(value);
  if (seconds < 60) return `${seconds} s`;
  const padded = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  return hours ? `${hours}:${padded(minutes)} h` : `${minutes}:${padded(seconds % 60)} min`;
}

function trimmed(value) {
  const text = String(typeof value === "number" ? Number(value.toPrecision(6)) : value);
  return text.replace(/(\.\d*?)0+(?=e|$)/, "$1").replace(/\.(?=e|$)/, "");
}
