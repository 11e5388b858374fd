(source, layer, head, row, column, representative, opacity, behind) => {
  // Marks on the pictures, and the address of what one sees; an upload has none, since it is deleted.
  const style = document.documentElement.style;
  style.setProperty("--row", row);
  style.setProperty("--column", column);
  style.setProperty("--opacity", opacity);
  document.body.classList.toggle("behind", behind);
  for (const button of document.querySelectorAll("button[data-layer]")) {
    button.setAttribute("aria-pressed", button.dataset.layer == layer && button.dataset.head == head);
  }
  for (const button of document.querySelectorAll("button[data-example]")) {
    button.setAttribute("aria-pressed", button.dataset.example === source);
  }
  const address = new URL(window.location);
  const state = { photo: source, layer, head, row, column, representative };
  for (const [name, value] of Object.entries(state)) {
    if (source && !source.includes("/")) address.searchParams.set(name, value);
    else address.searchParams.delete(name);
  }
  window.history.replaceState(null, "", address);
}
