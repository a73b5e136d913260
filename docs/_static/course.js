// What scrolls can be reached by keyboard; two roles of the theme and of docutils are put right.
document.addEventListener("DOMContentLoaded", () => {
  const reach = () => document.querySelectorAll(".cell_output, .cell_output .output, pre, .pst-scrollable-table-container")
    .forEach(box => { if (box.scrollWidth > box.clientWidth) box.tabIndex = 0; });
  reach();
  window.addEventListener("load", reach);
  window.addEventListener("resize", reach);
  document.querySelectorAll(".search-button-field").forEach(button => button.removeAttribute("aria-label"));
  document.querySelectorAll(".citation-list > [role]").forEach(entry => entry.setAttribute("role", "listitem"));
});
