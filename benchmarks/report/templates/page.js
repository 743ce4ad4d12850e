"use strict";
(function () {
  const root = document.documentElement;
  root.classList.add("js");

  // Kept between visits where the browser lets a page keep anything.
  function remember(value) {
    try {
      if (value === undefined) { return localStorage.getItem("fimaq-report-theme"); }
      localStorage.setItem("fimaq-report-theme", value);
    } catch (error) { /* storage is switched off: the choice lasts as long as the page */ }
    return null;
  }

  function setTheme(choice) {
    if (choice === "light" || choice === "dark") { root.dataset.theme = choice; } else { delete root.dataset.theme; }
    for (const button of document.querySelectorAll("[data-theme-choice]")) {
      button.setAttribute("aria-pressed", String(button.dataset.themeChoice === (root.dataset.theme || "system")));
    }
  }
  setTheme(remember());

  function themes() {
    setTheme(root.dataset.theme);
    for (const button of document.querySelectorAll("[data-theme-choice]")) {
      button.addEventListener("click", () => { setTheme(button.dataset.themeChoice); remember(button.dataset.themeChoice); });
    }
  }

  function cellOf(row, index) { return row.cells[index]; }

  // By number where both have one; what was not measured comes last either way.
  function compare(a, b, direction) {
    const x = a.dataset.value, y = b.dataset.value;
    if (x !== undefined && y !== undefined) { return direction * (Number(x) - Number(y)); }
    if (x !== undefined || y !== undefined) { return x !== undefined ? -1 : 1; }
    if (a.tagName === "TH") { return direction * a.textContent.localeCompare(b.textContent); }
    return 0;
  }

  function sortable(table) {
    const body = table.tBodies[0], rows = Array.from(body.rows), heads = Array.from(table.querySelectorAll("th[data-sort]"));
    for (const head of heads) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const index = Number(head.dataset.sort), first = index === 0 ? "ascending" : "descending";
        const second = index === 0 ? "descending" : "ascending", now = head.getAttribute("aria-sort");
        const next = now === "none" ? first : now === first ? second : "none";
        for (const other of heads) { other.setAttribute("aria-sort", "none"); }
        head.setAttribute("aria-sort", next);
        const sorted = rows.slice();
        if (next !== "none") {
          sorted.sort((a, b) => compare(cellOf(a, index), cellOf(b, index), next === "ascending" ? 1 : -1));
        }
        body.append(...sorted);
      });
    }
  }

  function matches(element, wanted) {
    const data = element.dataset;
    if (wanted.task && data.task !== undefined && data.task !== wanted.task) { return false; }
    if (wanted.model && data.model !== undefined && data.model !== wanted.model) { return false; }
    if (wanted.bits && data.bits !== undefined && data.bits !== wanted.bits) { return false; }
    if (wanted.methods.length && data.method !== undefined) {
      return wanted.methods.some((word) => data.method.toLowerCase().includes(word));
    }
    return true;
  }

  function columns(table) {
    const heads = Array.from(table.querySelectorAll("thead tr:last-child th[data-sort]"));
    for (const row of table.tBodies[0].rows) {
      for (const head of heads) { cellOf(row, Number(head.dataset.sort)).hidden = head.hidden; }
    }
    for (const group of table.querySelectorAll("th.group")) {
      const mine = heads.filter((head) => head.dataset.model === group.dataset.model && !head.hidden);
      group.hidden = mine.length === 0;
      group.colSpan = Math.max(1, mine.length);
    }
  }

  function methodColumns(table, wanted) {
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, index) => {
      const method = head.dataset.methodColumn;
      if (method === undefined || method === "fp") { return; }
      const hide = wanted.methods.length > 0 && !wanted.methods.some((word) => method.toLowerCase().includes(word));
      for (const row of table.rows) { if (row.cells[index]) { row.cells[index].hidden = hide; } }
    });
  }

  function filters() {
    const form = document.querySelector(".filters"), said = form.querySelector("output");
    const filtered = Array.from(document.querySelectorAll("main [data-task], main [data-model], main [data-bits], main [data-method]"));
    const wides = Array.from(document.querySelectorAll("table.wide")), boards = Array.from(document.querySelectorAll("table.examples"));
    const holders = Array.from(document.querySelectorAll("section.task")).filter((part) => part.querySelector(".panel, .wide, .from, .more[data-model], .board"));
    function apply() {
      const wanted = {
        task: form.elements.task.value, model: form.elements.model.value, bits: form.elements.bits.value,
        methods: form.elements.method.value.toLowerCase().split(",").map((word) => word.trim()).filter(Boolean),
      };
      for (const element of filtered) { element.toggleAttribute("hidden", !matches(element, wanted)); }
      wides.forEach(columns);
      boards.forEach((table) => methodColumns(table, wanted));
      // A task that has nothing left is left out, with its heading.
      for (const part of holders) {
        if (!part.hidden) {
          const things = Array.from(part.querySelectorAll(".panel, .wide tbody td:not(.mark), .from, .more[data-model], .board"));
          part.hidden = things.length > 0 && things.every((thing) => thing.closest("[hidden]") !== null);
        }
      }
      const active = wanted.task || wanted.model || wanted.bits || wanted.methods.length > 0;
      const rows = Array.from(document.querySelectorAll("#results .wide.main-table tbody tr")), left = rows.filter((row) => row.closest("[hidden]") === null);
      said.textContent = active ? `${left.length} of ${rows.length} rows of results` : "";
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", apply);
    form.addEventListener("change", apply);
    form.addEventListener("reset", () => setTimeout(apply, 0));
    apply();
  }

  function origins() {
    const dialog = document.querySelector("dialog"), content = dialog.querySelector(".content"), heading = dialog.querySelector("h2");
    document.addEventListener("click", (event) => {
      const link = event.target.closest("a.origin");
      if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button !== 0) { return; }
      const body = document.getElementById(link.getAttribute("href").slice(1));
      if (!body) { return; }
      event.preventDefault();
      const copy = body.cloneNode(true);
      copy.removeAttribute("id");
      for (const recipe of copy.querySelectorAll("details.recipe")) { recipe.open = false; }
      heading.textContent = body.dataset.title;
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
    document.querySelectorAll("table.sortable").forEach(sortable);
    filters();
    origins();
  });
})();
