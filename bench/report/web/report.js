function unpacked(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (byte) => byte.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip")));
}

const datatables = await unpacked("datatables").json();
const bundle = URL.createObjectURL(new Blob([datatables], { type: "text/javascript" }));
const { default: DataTable } = await import(bundle);
for (const table of document.querySelectorAll("main table"))
  new DataTable(table, { paging: false, info: false, order: [], autoWidth: false,
    layout: { topStart: table.tBodies[0].rows.length > 6 ? "search" : null, topEnd: null },
    language: { search: "Filter rows", searchPlaceholder: "Filter" } });

// A table that is wider than its container says so, and says when its end is reached.
function showScroll(box) {
  box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
  box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  box.tabIndex = box.classList.contains("wide") ? 0 : -1;
}
const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => showScroll(target.closest(".scroll"))));
for (const box of document.querySelectorAll("main .scroll")) {
  box.addEventListener("scroll", () => showScroll(box), { passive: true });
  resized.observe(box);
  resized.observe(box.firstElementChild);
}

// A link to records is the ends of their ids, #hash,hash: every figure has an address of its own.
const records = await unpacked("records").json();
const dialog = document.querySelector("dialog");

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function scores(record) {
  const percent = ({ value, stderr }) => [value, stderr].filter(Number.isFinite).map((x) => (100 * x).toFixed(1)).join(" ± ");
  const head = ["%, ± s.e.", "validation", "test", "items"].map((title) => element("th", title));
  const rows = Object.entries(record.test).map(([task, score]) => element("tr", element("th", task),
    ...[percent(record.validation?.[task] ?? {}), percent(score), score.n].map((cell) => element("td", cell))));
  return element("table", element("tr", ...head), ...rows);
}

function curve(points) {
  const [first, last] = [points[0], points.at(-1)];
  const top = Math.max(...points.map(({ loss }) => loss));
  const path = points.map(({ step, loss }) => `${step / last.step},${1 - loss / top}`).join(" ");
  const says = `Loss: ${first.loss} at step ${first.step}, ${last.loss} at step ${last.step}`;
  const figure = element("figure", element("figcaption", says));
  figure.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 1 1" preserveAspectRatio="none"><polyline points="${path}"
    fill="none" stroke="currentColor" stroke-width="1.5" vector-effect="non-scaling-stroke"/></svg>`);
  return figure;
}

function article(handle) {
  const record = records[handle], { id, status, error, provenance: from } = record;
  const about = [status, error, from.device, from.time, from.commit && `commit ${from.commit.slice(0, 12)}`];
  const parts = [element("h3", id), element("p", about.filter(Boolean).join(" · "))];
  if (record.test) parts.push(scores(record));
  if (record.train?.curve.length) parts.push(curve(record.train.curve));
  for (const [name, value] of Object.entries(record))
    if (value && typeof value === "object")
      parts.push(element("details", element("summary", name), element("pre", JSON.stringify(value, null, 1))));
  return element("article", ...parts);
}

function show() {
  const handles = decodeURIComponent(location.hash.slice(1)).split(",").filter((one) => Object.hasOwn(records, one));
  if (!handles.length) return dialog.close();
  dialog.querySelector("h2").textContent = handles.length > 1 ? `${handles.length} records` : "A record";
  dialog.querySelector("div").replaceChildren(...handles.map(article));
  if (!dialog.open) dialog.showModal();
}
addEventListener("hashchange", show);
dialog.addEventListener("close", () => history.replaceState(null, "", "#"));
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
show();
