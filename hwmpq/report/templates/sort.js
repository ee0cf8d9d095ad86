"use strict";
// Tables of the class "sorted": a click on a heading sorts by it.
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => {
      const cell = row.cells[column];
      return "v" in cell.dataset ? (parseFloat(cell.dataset.v) || 0) : cell.textContent;
    };
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, {numeric: true});
      return up ? order : -order;
    }).forEach(row => body.append(row));
  }));
}
