(() => {
  "use strict";
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const make = (tag, props = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), props);
    node.append(...children);
    return node;
  };

  /* Tabs: plain links to sections until this runs. */
  const tabs = all(".tabs a");
  const panels = tabs.map((tab) => document.getElementById(tab.hash.slice(1)));
  one(".tabs").setAttribute("role", "tablist");
  tabs.forEach((tab, i) => {
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panels[i].id);
    panels[i].setAttribute("role", "tabpanel");
    panels[i].setAttribute("aria-labelledby", tab.id);
    panels[i].tabIndex = 0;
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      open(i, true);
    });
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const to = { ArrowRight: i === last ? 0 : i + 1, ArrowLeft: i ? i - 1 : last, Home: 0,
        End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      open(to, true);
      tabs[to].focus();
    });
  });
  function open(index, remember) {
    tabs.forEach((tab, i) => {
      const on = i === index;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      panels[i].classList.toggle("open", on);
    });
    const tab = tabs[index];
    const bar = one(".tabs");
    bar.scrollLeft = tab.offsetLeft - (bar.clientWidth - tab.offsetWidth) / 2;
    if (remember) {
      history.replaceState(null, "", tab.hash);
      if (scrollY > bar.offsetTop) scrollTo(0, one(".head").offsetHeight);
    }
  }
  const named = () => tabs.findIndex((tab) => tab.hash === location.hash);
  open(Math.max(0, named()), false);
  addEventListener("hashchange", () => named() >= 0 && open(named(), false));

  /* Light and dark. */
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const theme = one("#theme");
  const tell = () => {
    theme.textContent = isDark() ? "Light" : "Dark";
    theme.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  };
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("curate-theme", root.dataset.theme); } catch { /* off */ }
    tell();
    redraw();
  });
  dark.addEventListener("change", () => { tell(); redraw(); });
  tell();

  /* Charts: drawn when they come near the window, and anew when the colours change. */
  const figures = all("figure[data-chart]");
  const drawn = new Map();
  let specs = [];
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const plain = new Set(["data", "datasets", "domain", "title"]); // names from the data stand there
  const coloured = (node, key) => {
    if (plain.has(key)) return node;
    if (typeof node === "string") return node[0] === "@" ? colour(node.slice(1)) : node;
    if (Array.isArray(node)) return node.map((item) => coloured(item));
    if (!node || typeof node !== "object") return node;
    return Object.fromEntries(Object.entries(node).map(([k, v]) => [k, coloured(v, k)]));
  };
  const config = () => {
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: colour("soft"), titleColor: colour("soft"), labelFont: font,
      titleFont: font, labelFontSize: 11, titleFontSize: 11, titleFontWeight: 500 };
    return {
      background: null, font, view: { stroke: null }, mark: { color: colour("accent") },
      text: { color: colour("soft"), font, fontSize: 11 },
      axis: { ...text, gridColor: colour("line"), domainColor: colour("faint"),
        tickColor: colour("faint"), tickSize: 4, labelPadding: 5 },
      legend: { ...text, symbolType: "circle", symbolSize: 60 },
      range: { category: Array.from({ length: 10 }, (_, i) => colour(`c${i + 1}`)) },
    };
  };
  async function draw(figure) {
    if (!window.vegaEmbed || drawn.get(figure)?.dark === isDark()) return;
    drawn.get(figure)?.view?.finalize();
    const entry = { dark: isDark(), view: null };
    drawn.set(figure, entry);
    const holder = make("div", { className: "view" });
    one(".chart", figure).replaceChildren(holder);
    try {
      const result = await vegaEmbed(holder, coloured(specs[+figure.dataset.chart]), {
        mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false,
        config: config(), tooltip: { disableDefaultStyle: true },
      });
      entry.view = result.view;
      figure.dataset.drawn = entry.dark ? "dark" : "light";
    } catch (error) {
      numbers(figure, true);
      console.error(error);
    }
  }
  const shown = (figure) => figure.offsetParent !== null;
  function redraw() {
    for (const figure of [...drawn.keys()]) {
      if (shown(figure)) draw(figure);
      else {
        drawn.get(figure).view?.finalize();
        drawn.delete(figure);
        delete figure.dataset.drawn;
        one(".chart", figure).replaceChildren();
        watcher.unobserve(figure);
        watcher.observe(figure);
      }
    }
  }
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
  }, { rootMargin: "400px" });

  /* The numbers of a chart: what `noscript` holds, as a table. */
  function numbers(figure, on) {
    const button = one(".numbers > button", figure);
    let table = one(".numbers > .scroll", figure);
    if (on && !table) {
      const held = new DOMParser().parseFromString(one("noscript", figure).textContent, "text/html");
      table = document.adoptNode(one(".scroll", held));
      one(".numbers", figure).append(table);
      sortable(one("table", table));
    }
    for (const part of all(".numbers > .scroll, .numbers > .find", figure)) part.hidden = !on;
    button.setAttribute("aria-expanded", String(on));
    button.textContent = on ? "Hide the numbers" : "Numbers";
  }
  for (const figure of figures) {
    const button = make("button", { type: "button", textContent: "Numbers" });
    button.setAttribute("aria-expanded", "false");
    const title = one("figcaption b", figure).textContent;
    button.setAttribute("aria-label", `Numbers: ${title}`);
    button.addEventListener("click", () =>
      numbers(figure, button.getAttribute("aria-expanded") === "false"));
    one(".numbers", figure).prepend(button);
    if ("open" in figure.dataset) numbers(figure, true);
  }

  /* Tables: a heading sorts; long ones can be searched. */
  function sortable(table) {
    if ("sortable" in table.dataset) return;
    table.dataset.sortable = "";
    const body = table.tBodies[0];
    const key = (row, at) => {
      const cell = row.cells[at];
      if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
      return cell.textContent === "–" ? "" : cell.textContent; // what was not measured comes last
    };
    all("thead th", table).forEach((head, at) => {
      const button = make("button", { type: "button" }, ...head.childNodes);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const first = head.classList.contains("number") ? "descending" : "ascending";
        const second = first === "descending" ? "ascending" : "descending";
        const order = head.getAttribute("aria-sort") === first ? second : first;
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...body.rows].map((row) => [key(row, at), row]);
        const empty = (value) => value === "" || Number.isNaN(value);
        rows.sort(([a], [b]) => empty(a) - empty(b) || sign *
          (typeof a === "number" && typeof b === "number" ? a - b
            : String(a).localeCompare(String(b), undefined, { numeric: true })));
        body.append(...rows.map(([, row]) => row));
      });
    });
    if (body.rows.length <= 12) return;
    const name = table.caption?.textContent.trim() || "the table";
    const input = make("input", { type: "search", placeholder: "Find rows" });
    input.setAttribute("aria-label", `Find rows of ${name}`);
    const count = make("span", { textContent: `${body.rows.length} rows` });
    count.setAttribute("role", "status");
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        left += !row.hidden;
      }
      count.textContent = words.length ? `${left} of ${body.rows.length} rows`
        : `${body.rows.length} rows`;
    });
    table.closest(".scroll").before(make("div", { className: "find" }, input, count));
  }
  all("table").forEach(sortable);

  /* One of several groups at a time. */
  for (const select of all(".choose select")) {
    const groups = all(":scope > .option", select.closest(".choice"));
    const choose = () => groups.forEach((group, i) => { group.hidden = i !== select.selectedIndex; });
    select.addEventListener("change", choose);
    choose();
  }

  /* Examples: lists, filters, search with its hits marked. */
  const examples = one("#cards");
  if (examples) {
    const step = 25;
    const cards = all(".card", examples);
    const filters = Object.fromEntries(all("[data-filter]").map((f) => [f.dataset.filter, f]));
    const status = one("#card-count");
    const more = one("#more");
    let texts;
    const has = (i, word) =>
      (texts ??= cards.map((card) => card.textContent.toLowerCase()))[i].includes(word);
    let limit = step;
    const unmark = (card) => all("mark.hit", card).forEach((hit) => {
      const parent = hit.parentNode;
      hit.replaceWith(...hit.childNodes);
      parent.normalize();
    });
    const mark = (card, words) => {
      const walker = document.createTreeWalker(card, NodeFilter.SHOW_TEXT);
      const nodes = [];
      while (walker.nextNode()) nodes.push(walker.currentNode);
      for (const node of nodes) {
        const text = node.data.toLowerCase();
        if (text.length !== node.data.length) continue;
        const hits = [];
        for (const word of words) {
          for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
            hits.push([at, at + word.length]);
          }
        }
        hits.sort((a, b) => a[0] - b[0]);
        const pieces = [];
        let end = 0;
        for (const [from, to] of hits) {
          if (from < end) continue;
          pieces.push(node.data.slice(end, from),
            make("mark", { className: "hit", textContent: node.data.slice(from, to) }));
          end = to;
        }
        if (pieces.length) node.replaceWith(...pieces, node.data.slice(end));
      }
    };
    const apply = () => {
      const words = filters.search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = filters.list?.selectedOptions[0]?.dataset.cards;
      const order = chosen === undefined ? cards.map((_, i) => i)
        : chosen.split(" ").filter(Boolean).map(Number);
      const fits = (card, name) => !filters[name]?.value || filters[name].value === "*" + card.dataset[name];
      const found = order.filter((i) => ["domain", "label", "reason"].every((n) => fits(cards[i], n))
        && words.every((word) => has(i, word)));
      const now = found.slice(0, limit).map((i) => cards[i]);
      for (const card of cards) { unmark(card); card.hidden = true; }
      for (const card of now) { card.hidden = false; if (words.length) mark(card, words); }
      examples.append(...now);
      status.textContent = found.length === 0 ? "No example fits."
        : found.length > now.length ? `${now.length} shown of ${found.length} that fit, ${cards.length} in all`
          : `${found.length} of ${cards.length} examples`;
      more.hidden = found.length <= now.length;
    };
    for (const filter of Object.values(filters)) {
      filter.addEventListener("input", () => { limit = step; apply(); });
    }
    more.addEventListener("click", () => { limit += step; apply(); });
    one("#clear").addEventListener("click", () => {
      for (const filter of Object.values(filters)) filter.value = "";
      limit = step;
      apply();
    });
    apply();
    /* Links from elsewhere to the examples of a list or a reason. */
    for (const link of all("a[data-show]")) {
      link.addEventListener("click", (event) => {
        event.preventDefault();
        for (const filter of Object.values(filters)) filter.value = "";
        if (filters[link.dataset.show]) filters[link.dataset.show].value = link.dataset.value;
        limit = step;
        apply();
        open(tabs.findIndex((tab) => tab.hash === "#examples"), true);
      });
    }
  }

  /* Copy buttons, and paper. */
  for (const button of all(".copy > button")) {
    button.addEventListener("click", async () => {
      const text = one("pre", button.parentNode).textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(one("pre", button.parentNode));
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  one("#print").addEventListener("click", async () => {
    const before = root.dataset.theme;
    root.dataset.theme = "light";
    root.classList.remove("js");
    const groups = all(".option[hidden]");
    groups.forEach((group) => { group.hidden = false; });
    await Promise.all(figures.map(draw));
    print();
    groups.forEach((group) => { group.hidden = true; });
    root.classList.add("js");
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    redraw();
  });
  addEventListener("beforeprint", () => {
    for (const figure of figures) {
      const fits = figure.dataset.drawn === "light";
      figure.classList.toggle("unprinted", !fits);
      figure.dataset.was = one(".numbers > button", figure).getAttribute("aria-expanded");
      if (!fits) numbers(figure, true);
    }
  });
  addEventListener("afterprint", () => {
    for (const figure of all("figure.unprinted")) {
      figure.classList.remove("unprinted");
      numbers(figure, figure.dataset.was === "true");
    }
  });

  addEventListener("DOMContentLoaded", () => {
    specs = JSON.parse(one("#charts").textContent);
    figures.forEach((figure) => watcher.observe(figure));
  });
})();
