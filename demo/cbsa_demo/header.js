// A link to a folded part of the page opens it.
element.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (link) document.querySelector(link.hash)?.querySelector("button.label-wrap:not(.open)")?.click();
});
