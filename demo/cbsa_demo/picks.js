// Pictures on which something can be chosen: a patch, a representative, or a row of the matrix between them.
element.addEventListener("click", (event) => {
  const map = event.target.closest("button[data-layer]");
  if (map) return trigger("select", { layer: Number(map.dataset.layer), head: map.dataset.head });
  const stage = event.target.closest("[data-pick]");
  if (!stage) return;
  const style = getComputedStyle(document.documentElement);
  const rows = Number(stage.dataset.rows || style.getPropertyValue("--rows"));
  const columns = Number(stage.dataset.columns || style.getPropertyValue("--columns"));
  const box = stage.getBoundingClientRect();
  const at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
  const row = at((event.clientY - box.top) / box.height, rows);
  const column = at((event.clientX - box.left) / box.width, columns);
  if (stage.dataset.pick === "patch") trigger("select", { row, column });
  else trigger("select", { representative: stage.dataset.pick === "matrix" ? row : row * columns + column });
});
