// The line between two pictures follows its slider.
element.addEventListener("input", (event) => {
  if (event.target.classList.contains("split")) {
    event.target.closest("figure").querySelector(".stage").style.setProperty("--split", `${event.target.value}%`);
  }
});
