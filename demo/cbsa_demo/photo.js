// The photo: what else is drawn on the page takes its shape and its picture from here.
function adopt() {
  const root = document.documentElement.style;
  const figure = element.querySelector("figure");
  if (!figure) return;
  root.setProperty("--ratio", figure.dataset.ratio);
  root.setProperty("--rows", figure.dataset.rows);
  root.setProperty("--columns", figure.dataset.columns);
  root.setProperty("--photo", `url("${figure.querySelector("img").src}")`);
}

adopt();
watch("value", adopt);
