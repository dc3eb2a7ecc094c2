"use strict";
// Draws the page from its JSON. Text of the data reaches the DOM as text nodes only; what the eye would not see in it
// (control characters, marks of direction) is shown by its number. Plots wait until they come into view, and the library
// that draws them until the page has nothing else to do; a plot whose width has changed is drawn anew.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const INVISIBLE = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\u{e0000}-\u{e01ef}])/u;
  const PAGE = 25;
  const root = document.documentElement;

  // --- the DOM ---

  const write = (node, text) => {
    for (const piece of String(text).replace(/\r\n/g, "\n").split(INVISIBLE)) {
      if (!INVISIBLE.test(piece)) node.append(piece);
      else {
        const mark = node.appendChild(document.createElement("span"));
        mark.className = "mark";
        mark.textContent = piece === "\0" ? "NUL" : "U+" + piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
        mark.title = "invisible character U+" + piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      }
    }
    return node;
  };
  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") node.addEventListener(name, value);
      else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat()) if (child !== null && child !== undefined) {
      if (child instanceof Node) node.append(child);
      else write(node, child);
    }
    return node;
  };
  const count = (n) => n.toLocaleString("en");
  const real = (x, digits = 4) => (x === undefined ? "–" : x.toFixed(digits));
  const short = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);
  const tied = (text) => text.replace(/(\d) %/g, "$1\u00a0%");
  const spaced = (name) => name.replaceAll("_", " ");
  const chip = (bucket) => make("span", { class: "chip", "data-bucket": bucket }, spaced(bucket));

  // --- the theme ---

  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const toggle = make("button", { type: "button", id: "theme", click: () => theme(root.dataset.theme !== "dark") });
  const theme = (dark) => {
    root.dataset.theme = dark ? "dark" : "light";
    toggle.textContent = dark ? "Light" : "Dark";
    toggle.setAttribute("aria-label", `Change to ${dark ? "light" : "dark"} colours`);
    for (const { canvas } of drawn) seen.observe(canvas); // drawn anew once they are in view
  };
  prefers.addEventListener("change", () => theme(prefers.matches));

  // --- plots ---

  const drawn = new Set();
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const painted = (value, key = "") => {
    if (Array.isArray(value)) return value.map((each) => painted(each, key));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, painted(each, name)]));
    }
    if (key === "colorscale" && value === "@sequential") return [[0, colour("low")], [1, colour("high")]];
    return key === "color" && String(value).startsWith("@") ? colour(value.slice(1)) : value;
  };
  const draw = (plot) => {
    drawn.add(plot);
    sized.observe(plot.canvas);
    const width = plot.width = plot.canvas.clientWidth, narrow = width < 520;
    const free = plot.spec.id === "map" || plot.spec.id === "plane";
    const axis = { gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"), automargin: true, fixedrange: !free, ticks: "" };
    const { xaxis, yaxis, ...layout } = painted(plot.spec.layout);
    const spec = {
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 12.5, color: colour("ink") },
      margin: { l: 10, r: 10, t: 30, b: 44, pad: 4 },
      legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", itemwidth: 30 },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("muted"), align: "left", font: { color: colour("ink") } },
      dragmode: free && !matchMedia("(pointer: coarse)").matches ? "zoom" : false,
      transition: { duration: 0 },
      ...layout, width, xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis, title: { standoff: 12, ...yaxis?.title } },
    };
    const config = { displayModeBar: false, doubleClick: "reset", showTips: false };
    const traces = painted(plot.spec.traces);
    if (narrow) for (const trace of traces) if (trace.colorbar) trace.showscale = false;
    Plotly.react(plot.canvas, traces, spec, config);
    if (plot.spec.id === "plane" && !plot.listens) {
      plot.listens = true;
      plot.canvas.on("plotly_click", (event) => open(event.points[0].customdata, plot.canvas));
    }
  };
  const queue = new Set();
  const idle = window.requestIdleCallback ?? ((work) => setTimeout(work, 50));
  const library = () => document.head.append(Object.assign(document.createElement("script"), { textContent: document.getElementById("plotly").textContent }));
  const work = () => {
    if (!window.Plotly) library();
    else for (const plot of [...queue].slice(0, 1)) {
      queue.delete(plot);
      draw(plot);
    }
    if (queue.size) idle(work);
  };
  const later = (plot) => {
    if (!queue.size) idle(work);
    queue.add(plot);
  };
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) {
      seen.unobserve(target);
      later(target.plot);
    }
  }, { rootMargin: "300px" });
  const sized = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.clientWidth && target.clientWidth !== target.plot.width) later(target.plot);
  });

  // --- on paper: all of them, as wide as a sheet, in light colours ---

  let dark = false;
  addEventListener("beforeprint", () => {
    dark = root.dataset.theme === "dark";
    root.toggleAttribute("data-printing", true);
    theme(false);
    const canvases = document.querySelectorAll(".canvas");
    if (canvases.length && !window.Plotly) library();
    for (const { plot } of canvases) draw(plot);
  });
  addEventListener("afterprint", () => {
    root.toggleAttribute("data-printing", false);
    theme(dark);
  });

  // --- sections ---

  const table = (spec, extra = "") => {
    const numbers = new Set(spec.numbers);
    const first = spec.header.findIndex((_, i) => !numbers.has(i));
    const kind = (i) => (numbers.has(i) ? "n" : i !== first && spec.rows.some((row) => row[i].length > 24) ? "long" : null);
    const body = spec.rows.map((row) => make("tr", {}, row.map((cell, i) => (
      i === first ? make("th", { scope: "row" }, cell) : make("td", { class: kind(i) }, cell)))));
    return make("div", { class: "scroll " + (body.length > 20 ? "tall " : "") + extra, tabindex: 0, role: "region", "aria-label": spec.caption },
      make("table", {}, make("caption", {}, make("span", {}, tied(spec.caption))),
        make("thead", {}, make("tr", {}, spec.header.map((name, i) => make("th", { scope: "col", class: kind(i) }, name)))),
        make("tbody", {}, body)));
  };
  const figure = (spec) => {
    const canvas = make("div", { class: "canvas", role: "img", "aria-label": spec.alt, tabindex: -1 });
    canvas.style.height = spec.layout.height + "px";
    canvas.plot = { spec, canvas };
    return make("figure", { class: spec.half ? "card half" : "card", id: spec.id },
      make("figcaption", {}, make("h3", {}, spec.title)), canvas,
      spec.note ? make("p", { class: "note" }, tied(spec.note)) : null,
      spec.table ? make("details", {}, make("summary", {}, "The figures as a table"), table(spec.table)) : null);
  };
  const section = (spec) => make("section", { id: spec.id, "aria-labelledby": spec.id + "-title" },
    make("h2", { id: spec.id + "-title" }, spec.title), spec.says.map((text) => make("p", {}, tied(text))),
    make("div", { class: "parts" }, spec.parts.map((part) => (part.traces ? figure(part) : make("div", { class: part.half ? "card half" : "card" }, table(part))))));

  // --- samples ---

  const { rows, tasks, instructions, tags, total } = data.samples ?? { rows: [], tasks: [], instructions: [], tags: [], total: 0 };
  const place = new Map(rows.map((row, i) => [row.uid, i]));
  const asked = (row) => { const last = row.prompt?.at(-1) ?? row.completion.at(-1); return last ? last[1] : ""; };
  const answered = (row) => row.completion?.[0]?.[1] ?? "";
  const hay = (row) => (row.hay ??= [row.uid, row.parent, instructions[row.instruction].text,
    ...[...(row.prompt ?? []), ...(row.completion ?? [])].map((m) => m[1]), ...(row.answers ?? []).map((a) => a.text)].join("\n").toLowerCase());
  const COLUMNS = [
    { name: "sample", key: (row) => row.uid },
    { name: "text", key: asked, long: true },
    { name: "answer", key: answered, long: true },
    { name: "task", key: (row) => row.task },
    { name: "origin", key: (row) => row.origin },
    { name: "InsInfo", key: (row) => row.insinfo, number: true },
    { name: "best reward", key: (row) => row.reward, number: true },
    { name: "buckets", key: (row) => row.buckets?.join() },
  ].filter((c) => !["InsInfo", "best reward", "buckets"].includes(c.name) || rows.some((row) => c.key(row) !== undefined));
  const state = { column: null, down: false, page: 0, found: rows };
  const filters = {};
  const field = (name, node, wide = false) => {
    filters[name] = node;
    node.addEventListener("input", () => { state.page = 0; refresh(); });
    return make("label", { class: wide ? "wide" : null }, name, node);
  };
  const choice = (name, values, text = String) => field(name, make("select", {}, make("option", { value: "" }, "all"),
    values.map((value) => make("option", { value: String(value) }, short(text(value), 60)))));
  const present = (of) => [...new Set(rows.flatMap(of))];
  const told = make("p", { role: "status", "aria-live": "polite", id: "count" });
  const body = make("tbody");
  const heads = COLUMNS.map((column) => make("th", { scope: "col", "aria-sort": "none", class: column.number ? "n" : column.long ? "long" : null },
    make("button", { type: "button", class: "plain sort", click: () => {
      state.down = state.column === column ? !state.down : false;
      state.column = column;
      state.page = 0;
      refresh();
    } }, column.name)));
  const turn = (name, step) => make("button", { type: "button", click: () => { state.page += step; refresh(); } }, name);
  const back = turn("Previous", -1), on = turn("Next", 1), where = make("span", {});

  const clamp = (text, most) => make("span", { class: "clamp" }, short(text, most));
  const line = (row) => {
    const cells = {
      sample: () => make("button", { type: "button", class: "plain link", "aria-label": `Open sample ${row.uid.slice(0, 8)}` }, row.uid.slice(0, 8)),
      task: () => short(tasks[row.task].name, 60), origin: () => row.origin, text: () => clamp(asked(row), 260), answer: () => clamp(answered(row), 160),
      InsInfo: () => real(row.insinfo, 2), "best reward": () => real(row.reward), buckets: () => row.buckets?.map(chip) ?? "–",
    };
    const opener = () => tr.querySelector("button");
    const tr = make("tr", { click: () => open(place.get(row.uid), opener()) }, COLUMNS.map((column, i) => make(i ? "td" : "th",
      { class: column.number ? "n" : column.long ? "long" : null, scope: i ? null : "row" }, cells[column.name]())));
    return tr;
  };
  const refresh = () => {
    const words = filters.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { task, origin, bucket, tag } = Object.fromEntries(Object.entries(filters).map(([name, node]) => [name, node.value]));
    const wanted = tag.trim().toLowerCase();
    const numbers = wanted ? new Set(tags.flatMap((name, i) => (name.toLowerCase() === wanted ? [i] : []))) : null;
    if (numbers && !numbers.size) tags.forEach((name, i) => { if (name.toLowerCase().includes(wanted)) numbers.add(i); });
    state.found = rows.filter((row) => (!task || row.task === +task) && (!origin || row.origin === origin)
      && (!bucket || row.buckets?.includes(bucket)) && (!numbers || row.tags?.some((i) => numbers.has(i)))
      && words.every((word) => hay(row).includes(word)));
    if (state.column) {
      const { key } = state.column, sign = state.down ? -1 : 1;
      state.found.sort((a, b) => {
        const x = key(a), y = key(b);
        return x === y ? 0 : x === undefined ? 1 : y === undefined ? -1 : x < y ? -sign : sign;
      });
    }
    heads.forEach((head, i) => head.setAttribute("aria-sort", COLUMNS[i] !== state.column ? "none" : state.down ? "descending" : "ascending"));
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    const here = state.found.slice(state.page * PAGE, (state.page + 1) * PAGE).map(line);
    body.replaceChildren(...(here.length ? here : [make("tr", {}, make("td", { colspan: COLUMNS.length }, "No row matches."))]));
    told.textContent = `${count(state.found.length)} of ${count(rows.length)} rows`;
    where.textContent = here.length ? `page ${count(state.page + 1)} of ${count(pages)}` : "";
    back.disabled = state.page === 0;
    on.disabled = state.page === pages - 1;
  };
  const samples = () => {
    const says = rows.length < total
      ? `${count(rows.length)} of ${count(total)} samples are on this page: evenly many of every task, origin and rarest bucket, so that what is rare can be seen. Counts below are of these; samples.parquet has all.`
      : `All ${count(total)} samples. A row opens in full, with its lineage and why it is here.`;
    const names = present((row) => row.tags ?? []).map((i) => tags[i]).sort().slice(0, 1000);
    const form = make("form", { class: "filters", role: "search", "aria-label": "Filter the samples", submit: (event) => event.preventDefault(),
      reset: () => setTimeout(() => { state.page = 0; state.column = null; refresh(); }) },
      field("search", make("input", { type: "search", placeholder: "words, or a uid", autocomplete: "off" }), true),
      choice("task", present((row) => [row.task]).sort((a, b) => a - b), (i) => tasks[i].name),
      choice("origin", present((row) => [row.origin]).sort()),
      choice("bucket", present((row) => row.buckets ?? []).sort(), spaced),
      field("tag", make("input", { list: "tags", autocomplete: "off" })),
      make("button", { type: "reset" }, "Clear"));
    refresh();
    return make("section", { id: "samples", "aria-labelledby": "samples-title", tabindex: -1 }, make("h2", { id: "samples-title" }, "Samples"),
      make("p", {}, says), make("div", { class: "card" }, form, make("datalist", { id: "tags" }, names.map((name) => make("option", { value: name }))),
        make("div", { class: "bar" }, told, make("div", { class: "bar" }, back, where, on)),
        make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Samples" },
          make("table", {}, make("thead", {}, make("tr", {}, heads)), body))));
  };

  // --- one sample ---

  let returns = null;
  const shown = make("div", { class: "inside" });
  const title = make("h2", { id: "sample-title" });
  const dialog = make("dialog", { "aria-labelledby": "sample-title", close: () => returns?.focus(), click: (event) => { if (event.target === dialog) dialog.close(); } },
    make("header", {}, title, make("button", { type: "button", click: () => dialog.close() }, "Close")), shown);
  const texts = (messages) => messages.map(([role, text]) => make("div", { class: "text" }, make("span", { class: "role" }, role), text || "(empty)"));
  const titled = (name, ...nodes) => [make("h3", {}, name), ...nodes.flat()];
  const link = (uid) => (place.has(uid) ? make("button", { type: "button", class: "plain link", click: () => open(place.get(uid)) }, uid.slice(0, 8)) : make("code", {}, uid));
  const answers = (row) => make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Completions of this prompt" }, make("table", {}, make("thead", {}, make("tr", {},
    ["completion", "written by", "bucket", "log-prob", "reward", "rank", "beside the target"].map((name, i) => make("th", { scope: "col", class: i > 2 && i < 6 ? "n" : null }, name)))),
    make("tbody", {}, row.answers.map((a) => make("tr", {}, make("td", { class: "long" }, a.text || "(empty)"), make("td", {}, a.origin),
      make("td", {}, a.bucket ? chip(a.bucket) : "–"), make("td", { class: "n" }, real(a.logp, 3)), make("td", { class: "n" }, real(a.reward)),
      make("td", { class: "n" }, a.rank ?? "–"), make("td", {}, a.side ?? "–"))))));
  const open = (i, opener = null) => {
    const row = rows[i];
    if (!row) return;
    returns = opener ?? returns;
    title.textContent = "Sample " + row.uid.slice(0, 8);
    const facts = [["task", tasks[row.task].name], ["origin", row.origin], ["source row", row.row], ["answer written by", row.written_by],
      ["InsInfo", row.insinfo === undefined ? undefined : real(row.insinfo) + " nats"], ["weight", row.weight], ["licence", row.license], ["template", row.template]];
    const why = [...(row.origin === "replay" ? [...tasks[row.task].why, ...instructions[row.instruction].why] : []), ...(row.why ?? [])];
    const made = rows.filter((each) => each.parent === row.uid);
    shown.replaceChildren(...[
      make("dl", { class: "facts" }, [make("div", {}, make("dt", {}, "uid"), make("dd", {}, make("code", {}, row.uid))),
        ...facts.filter(([, value]) => value !== undefined).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)))]),
      why.length ? titled("Why it is in the set", make("ul", {}, why.map((text) => make("li", {}, text)))) : [],
      row.parent ? titled("Rewrite of", make("p", {}, link(row.parent))) : [],
      made.length ? titled("Rewrites of it on this page", make("p", {}, made.flatMap((each) => [link(each.uid), " "]))) : [],
      titled("Instruction", make("div", { class: "text" }, instructions[row.instruction].text)),
      row.prompt ? titled("Prompt", texts(row.prompt)) : [],
      titled("Completion", texts(row.completion ?? [])),
      row.references ? titled("Accepted answers", make("ul", {}, row.references.map((text) => make("li", {}, text)))) : [],
      row.answers ? titled(`Completions of this prompt: ${count(row.answers.length)} of ${count(row.of)}`, answers(row)) : [],
      row.tags ? titled("Tags", make("p", {}, row.tags.map((t) => make("span", { class: "tag" }, tags[t])))) : [],
      row.tools ? titled("Tools", make("div", { class: "text" }, row.tools)) : [],
    ].flat());
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    dialog.querySelector("header button").focus();
  };

  // --- the page ---

  const parts = [["summary", "Summary"], ...data.sections.map((s) => [s.id, s.id[0].toUpperCase() + s.id.slice(1)]), ...(data.samples ? [["samples", "Samples"]] : [])];
  document.getElementById("page").replaceWith(
    make("header", { class: "top" }, make("div", { class: "wrap" }, make("div", {}, make("p", { class: "kicker" }, data.kicker), make("h1", {}, data.name)), toggle)),
    make("nav", { "aria-label": "Sections" }, make("div", { class: "wrap" }, make("ul", {}, parts.map(([id, name]) => make("li", {}, make("a", { href: "#" + id }, name)))))),
    make("main", { class: "wrap" },
      make("section", { id: "summary", "aria-label": "Summary" }, make("dl", { class: "tiles" }, data.tiles.map(([number, name, remark]) => make("div", {}, make("dt", {}, name), make("dd", {}, number), make("dd", { class: "remark" }, remark)))),
        make("div", { class: "says" }, data.says.map((text) => make("p", {}, tied(text))))),
      data.sections.map(section), data.samples ? samples() : null),
    make("footer", { class: "wrap" }, make("p", {}, data.note)), dialog);
  theme(prefers.matches);
  addEventListener("load", () => document.querySelectorAll(".canvas").forEach((canvas) => seen.observe(canvas)));
})();
