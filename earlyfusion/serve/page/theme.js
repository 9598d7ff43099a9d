// Runs before the first paint: the theme that the user chose, or the system's.
try {
  document.documentElement.dataset.theme = localStorage.getItem("earlyfusion.theme") ?? "auto";
} catch {
  document.documentElement.dataset.theme = "auto";
}
