// A click on a heading sorts the table by that column; a second click reverses the order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const text = row => row.cells[column].dataset.sort;
    const order = (a, b) => {
      if (text(a) === "" || text(b) === "") return (text(a) === "") - (text(b) === "");  // nothing: last
      return descending ? text(b) - text(a) : text(a) - text(b);
    };
    body.append(...[...body.rows].sort(order));
    table.classList.toggle("sorted", column > 0 || descending);
  }));
}

// One switch for all compute-matched rows; they start hidden on a small screen.
const switches = [...document.querySelectorAll("input[role=switch]")];
function showAlternatives(shown) {
  document.documentElement.classList.toggle("without-alternatives", !shown);
  for (const each of switches) each.checked = shown;
}
for (const each of switches) each.addEventListener("change", () => showAlternatives(each.checked));
if (switches.length) showAlternatives(matchMedia("(min-width: 821px)").matches);
