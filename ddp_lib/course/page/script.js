// Theme: the reader's choice, else the system's. Search: sections that hold all words, over SECTIONS of sections.js.
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
root.dataset.theme = localStorage.getItem("theme") || (dark ? "dark" : "light");
addEventListener("DOMContentLoaded", () => {
  document.querySelector("header button").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  });
  const list = document.querySelector(".results");
  document.querySelector("header input").addEventListener("input", event => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = words.length ? SECTIONS.filter(s => words.every(w => s.text.includes(w))) : [];
    const inTitle = hit => words.every(w => hit.title.toLowerCase().includes(w));
    hits.sort((a, b) => inTitle(b) - inTitle(a));
    list.replaceChildren(...hits.slice(0, 30).map(hit => {
      const item = document.createElement("li"), link = document.createElement("a");
      link.href = hit.link;
      link.textContent = `${hit.page}: ${hit.title}`;
      item.append(link);
      return item;
    }));
  });
});
