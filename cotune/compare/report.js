// The example browser. Only the rows on screen exist in the page; texts are set as text, never as markup.
"use strict";
(() => {
  const source = document.getElementById("data");
  if (!source) return;
  const groups = JSON.parse(source.textContent);
  const at = (id) => document.getElementById(id);
  const [task, seed, show, search, filters, count, list, rows, detail] =
    ["task", "seed", "show", "search", "filters", "count", "list", "rows", "detail"].map(at);
  const HEIGHT = 44; // of a row, in pixels, as in report.css
  const NAMES = { c: "correct", w: "wrong", t: "truncated", e: "errored", "?": "unknown" };
  const SIGNS = { c: "✓", w: "✗", t: "…", e: "!", "?": "?" };
  let group, columns, lower, order = [], chosen = 0;

  const make = (name, css, text) => {
    const element = document.createElement(name);
    if (css) element.className = css;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const option = (value, text) => {
    const made = make("option", "", text);
    made.value = value;
    return made;
  };
  const score = (run, i) => (run.score ? run.score[i] : run.right[i] === "1" ? 1 : 0);
  // A run with fractions for scores shows the number: "wrong" may still be worth something.
  const sign = (run, i) => (run.score && run.outcome[i] !== "e" ? String(Math.round(100 * score(run, i))) : SIGNS[run.outcome[i]]);

  function open() {
    group = groups[Number(task.value)];
    lower = null;
    list.className = group.rows.length > 7 ? "dense" : "";
    const seeds = [...new Set(group.runs.map((run) => run.seed))];
    seed.replaceChildren(...seeds.map((value, i) => option(String(i), String(value))));
    seed.seeds = seeds;
    filters.replaceChildren(...group.rows.map((name, row) => {
      const label = make("label");
      const select = make("select");
      select.dataset.row = row;
      for (const [value, text] of [["", "any"], ["1", "correct"], ["0", "not correct"], ["w", "wrong"], ["t", "truncated"], ["e", "errored"]])
        select.append(option(value, text));
      select.addEventListener("change", filter);
      label.title = name;
      label.append(make("span", "", name), select);
      return label;
    }));
    turn();
  }

  // One run for each row: the one with the chosen seed, else the row's first (what tunes nothing has one seed).
  function turn() {
    const wanted = seed.seeds[Number(seed.value)];
    columns = group.rows.map((_, row) => {
      const own = group.runs.filter((run) => run.row === row);
      return own.find((run) => run.seed === wanted) || own[0];
    });
    const scores = group.ids.map((_, i) => columns.map((run) => score(run, i)));
    group.spread = scores.map((some) => Math.max(...some) - Math.min(...some));
    // Evenly split first; then the order of the test set.
    const lone = scores.map((some) => { const right = some.filter((s) => s >= 0.5).length; return Math.min(right, some.length - right); });
    group.order = group.ids.map((_, i) => i).sort((a, b) => group.spread[b] - group.spread[a] || lone[b] - lone[a] || a - b);
    filter();
  }

  function matches(words) {
    if (!words) return null;
    lower = lower || group.texts.map((text) => text.toLowerCase());
    return lower.map((text) => text.includes(words));
  }

  function filter() {
    const words = search.value.trim().toLowerCase();
    const hit = matches(words);
    const asked = [...filters.querySelectorAll("select")].map((s) => [columns[Number(s.dataset.row)], s.value]).filter(([, v]) => v);
    order = group.order.filter((i) => {
      if (show.value === "differ" && group.spread[i] === 0) return false;
      if (show.value === "right" && !columns.every((run) => run.right[i] === "1")) return false;
      if (show.value === "wrong" && columns.some((run) => run.right[i] === "1")) return false;
      for (const [run, value] of asked)
        if (value === "0" || value === "1" ? run.right[i] !== value : run.outcome[i] !== value) return false;
      return !hit || group.ids[i].toLowerCase().includes(words) || hit[group.references[i]] || columns.some((run) =>
        ["prediction", "completion", "prompt", "note"].some((name) => run[name] && hit[run[name][i]]));
    });
    const apart = order.filter((i) => group.spread[i] > 0).length;
    count.textContent = `${order.length} of ${group.ids.length} examples; strategies disagree on ${apart} of them.` +
      (columns.length > 1 ? ` Grades in this order: ${group.rows.join(", ")}.` : "");
    chosen = 0;
    list.scrollTop = 0;
    rows.style.height = `${order.length * HEIGHT}px`;
    draw();
    tell();
  }

  function draw() {
    const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4);
    const last = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / HEIGHT) + 4);
    const made = [];
    for (let place = first; place < last; place++) {
      const i = order[place];
      const item = make("div", "item");
      item.id = `item-${place}`;
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", String(place === chosen));
      item.setAttribute("aria-setsize", String(order.length));
      item.setAttribute("aria-posinset", String(place + 1));
      item.style.top = `${place * HEIGHT}px`;
      const grades = make("span", "grades");
      columns.forEach((run, row) => {
        const grade = make("span", run.right[i] === "1" ? "grade ok" : "grade", sign(run, i));
        grade.title = `${group.rows[row]}: ${NAMES[run.outcome[i]]}`;
        grades.append(grade);
      });
      item.setAttribute("aria-label", `${group.ids[i]}: ` + columns.map((run, row) => `${group.rows[row]} ${NAMES[run.outcome[i]]}`).join(", "));
      item.append(make("span", "id", group.ids[i]), grades);
      item.addEventListener("click", () => { choose(place); open_detail(); });
      made.push(item);
    }
    rows.replaceChildren(...made);
    if (order.length) list.setAttribute("aria-activedescendant", `item-${chosen}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function choose(place) {
    if (!order.length) return;
    chosen = Math.max(0, Math.min(order.length - 1, place));
    const top = chosen * HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
    draw();
    tell();
  }

  function tell() {
    if (!order.length) {
      detail.replaceChildren(make("p", "soft", "No example matches. Escape in the search field clears it."));
      return;
    }
    const i = order[chosen];
    const head = make("h3", "", group.ids[i]);
    const about = make("dl");
    const say = (dl, name, text, css) => dl.append(make("dt", "", name), make("dd", css || "text", text || "–"));
    say(about, "reference", group.texts[group.references[i]]);
    const cards = columns.map((run, row) => {
      const card = make("article");
      const title = make("h4", "", group.rows[row]);
      title.append(make("small", "", ` seed ${run.seed}`));
      const facts = make("dl");
      const grade = make("span", run.right[i] === "1" ? "grade ok" : "grade", ` ${sign(run, i)} ${NAMES[run.outcome[i]]} `);
      const graded = make("dd");
      graded.append(grade);
      facts.append(make("dt", "", "grade"), graded);
      if (run.completion) {
        say(facts, "prediction", group.texts[run.prediction[i]]);
        say(facts, "completion", group.texts[run.completion[i]], "text completion");
        say(facts, "prompt", group.texts[run.prompt[i]]);
        if (group.texts[run.note[i]]) say(facts, "note", group.texts[run.note[i]]);
      } else say(facts, "text", "left out: it would make this file too large; see the run folder");
      const others = group.runs.filter((other) => other.row === row && other !== run);
      if (others.length) say(facts, "other seeds", others.map((other) => `${other.seed}: ${NAMES[other.outcome[i]]}`).join(", "));
      card.append(title, facts);
      return card;
    });
    detail.replaceChildren(head, about, ...cards);
    detail.scrollTop = 0;
  }

  function open_detail() {
    detail.focus({ preventScroll: true });
    if (detail.getBoundingClientRect().top > innerHeight - 120) detail.scrollIntoView({ block: "start" });
  }

  let later = 0, frame = 0;
  list.addEventListener("scroll", () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(draw); });
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor(list.clientHeight / HEIGHT) - 1);
    const to = { ArrowDown: chosen + 1, j: chosen + 1, ArrowUp: chosen - 1, k: chosen - 1, PageDown: chosen + page,
      PageUp: chosen - page, Home: 0, End: order.length - 1 }[event.key];
    if (to !== undefined) choose(to);
    else if (event.key === "Enter") open_detail();
    else return;
    event.preventDefault();
  });
  detail.addEventListener("keydown", (event) => {
    if (event.key === "Escape") list.focus();
    else if (event.key === "j" || event.key === "k") choose(chosen + (event.key === "j" ? 1 : -1));
    else return;
    event.preventDefault();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "ArrowDown") { clearTimeout(later); filter(); list.focus(); }
    else if (event.key === "Escape") { search.value = ""; filter(); list.focus(); }
    else return;
    event.preventDefault();
  });
  search.addEventListener("input", () => { clearTimeout(later); later = setTimeout(filter, 80); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    search.focus();
    search.select();
    event.preventDefault();
  });
  task.addEventListener("change", open);
  seed.addEventListener("change", turn);
  show.addEventListener("change", filter);
  addEventListener("resize", draw);
  open();
})();
