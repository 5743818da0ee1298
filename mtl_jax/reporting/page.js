"use strict";
// A table sorts by the column whose heading is pressed: numbers from the largest, texts from A; pressed again, the other way round.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const column = heading.cellIndex;
    const body = heading.closest("table").tBodies[0];
    const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const rows = [...body.rows];
    const numbers = rows.every((row) => value(row) === "" || !Number.isNaN(Number(value(row))));
    const before = heading.getAttribute("aria-sort");
    const first = numbers ? "descending" : "ascending";
    const other = numbers ? "ascending" : "descending";
    const order = before === first ? other : first;
    const sign = order === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is missing stays below
      return sign * (numbers ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
    });
    for (const th of heading.parentElement.cells) th.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    body.append(...rows);
  });
}
// Of many panels the chosen one is shown; without this script all of them are.
for (const select of document.querySelectorAll("select")) {
  const panels = [...select.closest("figure").querySelectorAll(".panel")];
  const show = () => panels.forEach((panel, n) => { panel.hidden = select.value !== "all" && select.value !== String(n); });
  select.addEventListener("change", show);
  select.closest("label").hidden = false;
  show();
}
