// Before the first paint: the theme that was chosen here, if any; the system's otherwise.
try {
  document.documentElement.dataset.theme = localStorage.getItem("earlyfusion.theme") ?? "auto";
} catch {
  document.documentElement.dataset.theme = "auto";
}
