"use strict";

// Tables: a click on a heading sorts by it, a second click turns the order round; empty cells stay at the end.
function compareKeys(first, second, isNumber) {
  return isNumber ? Number(first) - Number(second) : first.localeCompare(second, undefined, { numeric: true });
}

function sortTable(table, heading) {
  const column = [...heading.parentNode.children].indexOf(heading);
  const descending = heading.getAttribute("aria-sort") === "ascending";
  const key = (row) => row.children[column].dataset.key;
  const rows = [...table.tBodies[0].rows];
  const isNumber = rows.some((row) => row.children[column].classList.contains("number") && key(row) !== "");
  rows.sort((first, second) => {
    const [a, b] = [key(first), key(second)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return compareKeys(a, b, isNumber) * (descending ? -1 : 1);
  });
  table.tBodies[0].append(...rows);
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const heading of table.tHead.rows[0].children) {
    heading.querySelector("button").addEventListener("click", () => sortTable(table, heading));
  }
}

// Slices: the slider shows one of the drawn slices.
for (const block of document.querySelectorAll(".slices")) {
  const slider = block.querySelector("input[type=range]");
  const slices = block.querySelectorAll(".slice");
  slider?.addEventListener("input", () => {
    slices.forEach((slice, index) => { slice.hidden = index !== Number(slider.value); });
  });
}
