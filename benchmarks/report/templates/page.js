"use strict";
(function () {
  const root = document.documentElement;
  root.classList.add("js");
  const all = (css, from = document) => Array.from(from.querySelectorAll(css));

  // Keeps the chosen theme between visits if the browser allows it.
  function remembered(choice) {
    try {
      if (choice) { localStorage.setItem("fimaq-report-theme", choice); }
      return localStorage.getItem("fimaq-report-theme");
    } catch (error) { return choice; }  // without storage, until the page closes
  }

  function setTheme(choice) {
    if (choice === "light" || choice === "dark") { root.dataset.theme = choice; } else { delete root.dataset.theme; }
    for (const button of all("[data-theme-choice]")) {
      button.setAttribute("aria-pressed", String(button.dataset.themeChoice === (root.dataset.theme || "system")));
    }
  }
  setTheme(remembered());

  function themes() {
    setTheme(root.dataset.theme);
    for (const button of all("[data-theme-choice]")) {
      button.addEventListener("click", () => setTheme(remembered(button.dataset.themeChoice)));
    }
  }

  // Orders cells by their numbers; cells without a number come last in both directions.
  function compare(a, b, direction) {
    const x = a.dataset.value, y = b.dataset.value;
    if (x !== undefined && y !== undefined) { return direction * (Number(x) - Number(y)); }
    if (x !== undefined || y !== undefined) { return x !== undefined ? -1 : 1; }
    return a.tagName === "TH" ? direction * a.textContent.localeCompare(b.textContent) : 0;
  }

  function sortable(table) {
    const body = table.tBodies[0], rows = Array.from(body.rows), heads = all("th[data-sort]", table);
    for (const head of heads) {
      const button = document.createElement("button"), index = Number(head.dataset.sort);
      const orders = index === 0 ? ["none", "ascending", "descending"] : ["none", "descending", "ascending"];
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const next = orders[(orders.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
        for (const other of heads) { other.setAttribute("aria-sort", other === head ? next : "none"); }
        const direction = { none: 0, ascending: 1, descending: -1 }[next];
        const order = (a, b) => compare(a.cells[index], b.cells[index], direction);
        body.append(...(direction ? rows.slice().sort(order) : rows));
      });
    }
  }

  const named = (method, wanted) => !wanted.methods.length || wanted.methods.some((word) => method.toLowerCase().includes(word));

  function matches(data, wanted) {
    const same = (name) => !wanted[name] || data[name] === undefined || data[name] === wanted[name];
    return same("task") && same("model") && same("bits") && (data.method === undefined || named(data.method, wanted));
  }

  // Hides the cells below hidden heads.
  function columns(table) {
    const heads = all("thead tr:last-child th[data-sort]", table);
    for (const row of table.tBodies[0].rows) {
      for (const head of heads) { row.cells[Number(head.dataset.sort)].hidden = head.hidden; }
    }
    for (const group of all("th.group", table)) {
      const left = heads.filter((head) => head.dataset.model === group.dataset.model && !head.hidden).length;
      group.hidden = left === 0;
      group.colSpan = Math.max(1, left);
    }
  }

  function methodColumns(table, wanted) {
    Array.from(table.tHead.rows[0].cells).forEach((head, index) => {
      const method = head.dataset.methodColumn;
      if (method === undefined || method === "fp") { return; }
      for (const row of table.rows) { if (row.cells[index]) { row.cells[index].hidden = !named(method, wanted); } }
    });
  }

  function filters() {
    const form = document.querySelector(".filters"), said = form.querySelector("output");
    const filtered = all("main [data-task], main [data-model], main [data-bits], main [data-method]");
    const things = ".panel, .wide tbody td:not(.mark), .from, .more[data-model], .board";
    function apply() {
      const { task, model, bits, method } = Object.fromEntries(new FormData(form));
      const methods = method.toLowerCase().split(",").map((word) => word.trim()).filter(Boolean);
      const wanted = { task, model, bits, methods };
      for (const element of filtered) { element.toggleAttribute("hidden", !matches(element.dataset, wanted)); }
      all("table.wide").forEach(columns);
      all("table.examples").forEach((table) => methodColumns(table, wanted));
      // A section whose whole content is hidden is hidden with its heading.
      for (const part of all("section.task:not([hidden])")) {
        const mine = all(things, part);
        part.hidden = mine.length > 0 && mine.every((thing) => thing.closest("[hidden]") !== null);
      }
      const rows = all("#results .wide.main-table tbody tr"), left = rows.filter((row) => row.closest("[hidden]") === null);
      const active = task || model || bits || methods.length;
      said.textContent = active ? `${left.length} of ${rows.length} rows of results` : "";
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const name of ["input", "change"]) { form.addEventListener(name, apply); }
    form.addEventListener("reset", () => setTimeout(apply, 0));
    apply();
  }

  function origins() {
    const dialog = document.querySelector("dialog"), content = dialog.querySelector(".content");
    document.addEventListener("click", (event) => {
      const link = event.target.closest("a.origin");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) { return; }
      const body = document.getElementById(link.getAttribute("href").slice(1)), copy = body.cloneNode(true);
      event.preventDefault();
      copy.removeAttribute("id");
      dialog.querySelector("h2").textContent = body.dataset.title;
      content.replaceChildren(copy);
      dialog.showModal();
      dialog.scrollTop = 0;
    });
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) { dialog.close(); } });
    dialog.addEventListener("close", () => content.replaceChildren());
  }

  document.addEventListener("DOMContentLoaded", () => {
    themes();
    all("table.sortable").forEach(sortable);
    filters();
    origins();
  });
})();
