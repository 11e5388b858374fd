// The picker: examples, upload, paste and drop; sends what was chosen as the event `select`.
const limit = Number(props.limit);

async function take(file) {
  if (!file) return;
  if (file.size > limit) {
    const size = Math.round(file.size / 1e6);
    trigger("select", { problem: `${file.name} has ${size} MB; this page takes photos up to ${limit / 1e6} MB.` });
    return;
  }
  document.body.classList.add("working");
  try {
    const { path } = await upload(file);
    trigger("select", { file: path });
  } catch (error) {
    trigger("select", { problem: `${file.name} could not be uploaded.` });
  }
}

element.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.example) {
    document.body.classList.add("working");
    trigger("select", { example: button.dataset.example });
  }
  if (button.classList.contains("remove")) trigger("select", {});
  if (button.classList.contains("paste")) {
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find((name) => name.startsWith("image/"));
        if (type) return take(new File([await item.getType(type)], "pasted.png", { type }));
      }
      trigger("select", { problem: "There is no picture to paste." });
    } catch (error) {
      trigger("select", { problem: "The browser does not let this button paste; press Ctrl+V instead." });
    }
  }
});
element.addEventListener("change", (event) => {
  if (event.target.type !== "file") return;
  take(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
