// What the server made for the visitor to keep, saved under its name.
watch("value", () => {
  if (!props.value) return;
  const link = document.createElement("a");
  link.href = props.value.uri;
  link.download = props.value.name;
  link.click();
});
