// Files that the user drops, pastes, chooses or saves.

/** Call `open` with a file that the user gives, and `warn` where something else or more than one was given. */
export function connectFiles(input, open, warn) {
  const take = (files) => {
    if (files.length) open(files[0]);
    if (files.length > 1) warn(`${files.length} files were given: only the first one, ${files[0].name}, is shown.`);
  };
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = ""; // the same file can be chosen again
  });
  document.addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    const { files } = event.dataTransfer;
    if (files.length) take(files);
    else warn("What was dropped is not a file. Save the image first, or copy and paste it.");
  });
}

export function saveFile(blob, name) {
  const link = document.createElement("a");
  [link.href, link.download] = [URL.createObjectURL(blob), name];
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser reads it after the click
}
