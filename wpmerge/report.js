(async () => {
  "use strict";
  if (!("DecompressionStream" in window)) {
    document.getElementById("unit").textContent = "The figures need a browser of 2023 or later.";
    return;
  }

  function inflated(text) {
    const bytes = Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate")));
  }

  // Whole numbers by column; of each column its first bytes, then its second ones, and so on (page_data.py).
  async function columnsOf(text, count, bytesEach) {
    const bytes = new Uint8Array(await inflated(text).arrayBuffer());
    const length = bytes.length / count / bytesEach;
    return Array.from({ length: count }, (_, column) => {
      const found = new Uint32Array(length);
      for (let plane = 0; plane < bytesEach; plane++) {
        const start = (column * bytesEach + plane) * length;
        for (let i = 0; i < length; i++) found[i] = found[i] * 256 + bytes[start + i];
      }
      return found;
    });
  }

  // A score of three digits in 16 bits; NaN where there is none.
  function number(code) {
    if (code < 2) return code === 0 ? NaN : 0;
    const digits = ((code - 2) % 900) + 100;
    const above = Math.floor((code - 2) / 900);
    const exponent = Math.floor(above / 2) - 33;
    const size = exponent < 0 ? digits / 10 ** -exponent : digits * 10 ** exponent;
    return above % 2 ? -size : size;
  }

  const data = await inflated(document.getElementById("data").textContent).json();
  const { figures, themes, lookup } = data;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const views = {};
  const numberOf = new Map(lookup.units.map((unit, row) => [unit, row]));
  const kindOf = new Map(lookup.kinds.map((each) => [each.kind, each]));
  const rowsOfKind = new Map(lookup.kinds.map((each) => [each.kind, []]));
  lookup.units.forEach((unit, row) => rowsOfKind.get(unit.split(".", 1)[0]).push(row));
  const orders = new Map();
  const coded = await columnsOf(lookup.values, lookup.maps.length, 2);
  const values = coded.map((column) => Float64Array.from(column, number));
  const ranks = await columnsOf(lookup.ranks, lookup.maps.length, 4);
  const valueAt = (row, column) => (Number.isNaN(values[column][row]) ? null : values[column][row]);
  let picked = null;
  let pickedPlace = "";

  // --- figures

  function unpack(packed) {
    const made = Array.from({ length: packed.length }, () => ({}));
    for (const [name, column] of Object.entries(packed.columns)) {
      for (let i = 0; i < packed.length; i++) {
        made[i][name] = column.texts ? column.texts[column.at[i]] : column.values[i];
      }
    }
    return made;
  }

  function rowsOf(name) {
    const figure = figures[name];
    figure.unpacked ??= unpack(figure.rows);
    return figure.unpacked.map((row) => ({ ...row }));
  }

  async function draw(name) {
    const holder = document.getElementById(`chart-${name}`);
    let text = JSON.stringify(figures[name].spec);
    for (const [key, colour] of Object.entries(dark.matches ? themes.dark : themes.light)) {
      text = text.replaceAll(key, colour);
    }
    const spec = { ...JSON.parse(text), datasets: { rows: rowsOf(name) } };
    const options = {
      renderer: "svg",
      actions: { export: true, source: false, compiled: false, editor: false },
      downloadFileName: name,
      tooltip: { theme: dark.matches ? "dark" : "light" },
    };
    try {
      if (views[name]) views[name].finalize();
      const result = await window.vegaEmbed(holder.firstElementChild, spec, options);
      views[name] = result;
      if (figures[name].picks) {
        result.view.addEventListener("click", (event, item) => {
          if (item && item.datum && item.datum.unit) pick(item.datum.unit);
        });
      }
      holder.dataset.drawn = "true";
      mark(name);
    } catch (error) {
      holder.textContent = `This figure could not be drawn: ${error.message}`;
      console.error(name, error);
    }
  }

  function mark(name) {
    const { kind } = figures[name];
    if (!kind || !views[name]) return;
    const place = picked !== null && picked.startsWith(`${kind}.`) ? pickedPlace : "";
    try {
      views[name].view.signal("place", place).runAsync();
    } catch (error) {
      console.error(name, error);
    }
  }

  // --- one unit

  function element(tag, text, attributes = {}) {
    const made = document.createElement(tag);
    if (text !== undefined && text !== null) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  const short = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(3))));

  function partsOf(unit) {
    const [kind, layer, index] = unit.split(".");
    return { kind, layer: Number(layer ?? 0), index: Number(index ?? 0) };
  }

  function pick(unit, place) {
    const { kind, layer, index } = partsOf(unit);
    const known = kindOf.get(kind);
    picked = unit;
    pickedPlace = place ?? `${layer}/${Math.floor(index / (known ? known.cell : 1))}`;
    showPicker(kind, layer, index);
    show(unit);
    Object.keys(views).forEach(mark);
  }

  function showPicker(kind, layer, index) {
    const known = kindOf.get(kind);
    document.getElementById("pick-kind").value = kind;
    const fields = { "pick-layer": [layer, known.layers], "pick-index": [index, known.units] };
    for (const [id, [value, count]] of Object.entries(fields)) {
      const field = document.getElementById(id);
      field.max = count - 1;
      field.value = value;
    }
  }

  function show(unit) {
    const panel = document.getElementById("unit");
    const row = numberOf.get(unit);
    const { kind } = partsOf(unit);
    const title = element("h3", lookup.names[unit] ? `${unit} (${lookup.names[unit]})` : unit);
    panel.replaceChildren(title);
    for (const [capability, units] of Object.entries(lookup.roles)) {
      if (units[unit]) panel.append(element("p", `${units[unit]} unit of ${capability}`));
    }
    if (row === undefined) {
      panel.append(element("p", held(kind)));
      panel.append(element("pre", `wpmerge report SCORES --plan PLAN --explain ${unit}`));
      return;
    }
    panel.append(...scoreTable(row, unit, kind), ...coefficientParts(row, unit), ...cellParts(unit));
    panel.append(...rivalParts(row, unit, kind));
  }

  function held(kind) {
    const { layers, units } = kindOf.get(kind);
    const all = (layers * units).toLocaleString("en");
    const here = rowsOfKind.get(kind).length.toLocaleString("en");
    return `Of ${all} units of this kind the page has room for ${here}: those that a cell shows and those that were verified. Of any other this prints scores and coefficients:`;
  }

  // The units that share a cell of the map with this one, the strongest first.
  function cellParts(unit) {
    const { kind, layer, index } = partsOf(unit);
    const known = kindOf.get(kind);
    if (known.cell === 1 || !known.whole) return [];
    const first = index - (index % known.cell);
    const last = Math.min(first + known.cell, known.units) - 1;
    const own = (row) => lookup.maps.map((map, column) => (map.own ? Math.abs(valueAt(row, column) ?? 0) : 0));
    const size = (unit) => Math.max(...own(numberOf.get(unit)));
    const others = [];
    for (let each = first; each <= last; each++) {
      if (each !== index) others.push(`${kind}.${layer}.${each}`);
    }
    others.sort((a, b) => size(b) - size(a));
    const line = element("p", null);
    others.slice(0, 6).forEach((other, place) => line.append(place ? ", " : "", unitButton(other)));
    return [element("h4", `In the same cell, ${kind}.${layer}.${first} to ${last}, the strongest first`), line];
  }

  function unitButton(unit) {
    const button = element("button", unit, { type: "button" });
    button.addEventListener("click", () => pick(unit));
    return button;
  }

  function scoreTable(row, unit, kind) {
    const experts = [...new Set(lookup.maps.map((map) => map.expert))];
    const labels = [...new Set(lookup.maps.map((map) => map.label))];
    const largest = Math.max(...lookup.maps.map((_, column) => Math.abs(valueAt(row, column) ?? 0)), 1e-12);
    const table = element("table");
    const head = element("tr");
    for (const name of ["read by", ...experts]) head.append(element("th", name, { scope: "col" }));
    const body = element("tbody");
    for (const label of labels) {
      const line = element("tr");
      line.append(element("th", label, { scope: "row" }));
      for (const expert of experts) {
        const column = lookup.maps.findIndex((map) => map.label === label && map.expert === expert);
        line.append(scoreCell(row, column, largest));
      }
      body.append(line);
    }
    const top = element("thead");
    top.append(head);
    table.append(top, body);
    const scroll = element("div", null, { class: "scroll" });
    scroll.append(table);
    const known = element("ul", null, { class: "known" });
    lookup.maps.forEach((map, column) => {
      if (map.own) known.append(element("li", `${map.label}: ${how(map, unit, kind, valueAt(row, column))}`));
    });
    const parts = [element("h4", "Score from each expert, with its rank by size"), scroll];
    return known.children.length ? [...parts, element("h4", "How known"), known] : parts;
  }

  function scoreCell(row, column, largest) {
    const cell = element("td");
    const value = column < 0 ? null : valueAt(row, column);
    if (value === null) {
      cell.append("–");
      return cell;
    }
    const bar = element("span", "", { class: `bar ${value < 0 ? "hurt" : "help"}`, "aria-hidden": "true" });
    bar.style.width = `${Math.round((40 * Math.abs(value)) / largest)}px`;
    const number = element("span", short(value), { class: lookup.maps[column].own ? "own" : "cross" });
    const rank = ranks[column][row];
    cell.append(number, element("small", rank ? ` #${rank}` : ""), element("br"), bar);
    return cell;
  }

  function how(map, unit, kind, value) {
    const exact = map.own ? (lookup.exact[map.label] ?? {})[unit] : undefined;
    if (exact) {
      const reach = exact[2] === null ? "" : ` ± ${short(1.96 * exact[2])}`;
      return `verified: exact ${short(exact[1])}${reach}`;
    }
    if (value === null) return "not seen by this readout";
    const error = (lookup.errors[map.label] ?? {})[kind];
    return error === undefined ? "estimated" : `estimated, ± ${short(error)} at worst in the random draw`;
  }

  function coefficientParts(row, unit) {
    const experts = Object.entries(lookup.coefficients);
    if (!experts.length) return [];
    const parts = [element("h4", "Coefficients of the merge")];
    const said = experts.map(([expert, values]) => `${expert} ${short(values[row])}`).join(", ");
    parts.push(element("p", said));
    for (const sentence of lookup.why[unit] ?? []) parts.push(element("p", sentence, { class: "why" }));
    if (!(unit in lookup.why)) {
      parts.push(element("small", `Why: wpmerge report SCORES --plan PLAN --explain ${unit}`));
    }
    return parts;
  }

  function rivalParts(row, unit, kind) {
    const parts = [];
    if (rowsOfKind.get(kind).length < 2) return parts;
    lookup.maps.forEach((map, column) => {
      if (!map.own || valueAt(row, column) === null) return;
      const order = orderOf(kind, column);
      const at = order.indexOf(row);
      const near = [at - 2, at - 1, at + 1, at + 2].filter((i) => i >= 0 && i < order.length);
      const line = element("p", `${map.label}, rank ${ranks[column][row]}: `);
      near.forEach((i, place) => {
        const other = lookup.units[order[i]];
        const rank = ranks[column][order[i]];
        line.append(place ? ", " : "", unitButton(other), ` (${rank}. ${short(valueAt(order[i], column))})`);
      });
      if (near.length) parts.push(line);
    });
    if (!parts.length) return parts;
    const whole = kindOf.get(kind).whole;
    return [element("h4", whole ? "Nearest rivals by size" : "Nearest rivals by size, among the units kept here"), ...parts];
  }

  function orderOf(kind, column) {
    const key = `${kind} ${column}`;
    if (!orders.has(key)) {
      const order = rowsOfKind.get(kind).filter((i) => ranks[column][i] > 0);
      orders.set(key, order.sort((a, b) => ranks[column][a] - ranks[column][b]));
    }
    return orders.get(key);
  }

  // --- keyboard

  function unitAt(name, layer, bin) {
    const place = `${layer}/${bin}`;
    const rows = unitsByPlace(name).get(place) ?? [];
    const own = rows.find((row) => row.expert === row.read) ?? rows[0];
    return own ? own.unit : null;
  }

  function unitsByPlace(name) {
    const figure = figures[name];
    if (!figure.places) {
      figure.unpacked ??= unpack(figure.rows);
      figure.places = new Map();
      for (const row of figure.unpacked) {
        const place = `${row.layer}/${row.bin}`;
        if (!figure.places.has(place)) figure.places.set(place, []);
        figure.places.get(place).push(row);
      }
    }
    return figure.places;
  }

  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function onKey(event) {
    const name = event.currentTarget.dataset.figure;
    const { kind } = figures[name];
    const step = STEPS[event.key];
    if (!kind || !step || event.target !== event.currentTarget) return;
    event.preventDefault();
    const here = picked !== null && picked.startsWith(`${kind}.`) ? pickedPlace.split("/").map(Number) : null;
    const there = here ? [here[0] + step[0], here[1] + step[1]] : [0, 0];
    const unit = unitAt(name, ...there);
    if (unit !== null) pick(unit, there.join("/"));
  }

  // --- start

  function startPicker() {
    const kinds = document.getElementById("pick-kind");
    for (const each of lookup.kinds) kinds.append(element("option", each.kind, { value: each.kind }));
    const chosen = () => {
      const known = kindOf.get(kinds.value);
      const value = (id, count) => Math.min(Math.max(0, Number(document.getElementById(id).value) || 0), count - 1);
      const layer = value("pick-layer", known.layers);
      const index = value("pick-index", known.units);
      const alone = known.layers === 1 && known.units === 1 && numberOf.has(known.kind);
      pick(alone ? known.kind : `${known.kind}.${layer}.${index}`);
    };
    document.getElementById("picker").addEventListener("input", chosen);
    document.getElementById("picker").addEventListener("submit", (event) => event.preventDefault());
  }

  function strongestUnit() {
    const shown = Object.values(figures).find((figure) => figure.kind);
    let best = null;
    let size = -1;
    lookup.units.forEach((unit, row) => {
      if (!shown || !unit.startsWith(`${shown.kind}.`)) return;
      lookup.maps.forEach((map, column) => {
        const value = Math.abs(valueAt(row, column) ?? 0);
        if (map.own && map.readout === "reference" && value > size) [best, size] = [unit, value];
      });
    });
    return best ?? lookup.units[0];
  }

  async function drawAll() {
    for (const chart of document.querySelectorAll(".chart")) {
      const folded = chart.closest("details");
      if (!folded || folded.open) await draw(chart.dataset.figure);
    }
    document.documentElement.dataset.ready = "true";
  }

  for (const chart of document.querySelectorAll(".chart")) {
    chart.addEventListener("keydown", onKey);
    const folded = chart.closest("details");
    if (folded) {
      folded.addEventListener("toggle", () => {
        if (folded.open && !chart.dataset.drawn) draw(chart.dataset.figure);
      });
    }
  }
  dark.addEventListener("change", drawAll);
  startPicker();
  const first = strongestUnit();
  if (first !== undefined) pick(first);
  drawAll();
})();
