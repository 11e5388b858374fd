// A link to a folded part opens it. The browser itself would load the page anew, without what the visitor chose.
element.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (!link) return;
  event.preventDefault();
  const part = document.querySelector(link.hash);
  part.querySelector("button.label-wrap:not(.open)")?.click();
  part.scrollIntoView();
});
