// Makes the text of a slide smaller until all of it fits; keys lead to the next slide and back.
const slides = () => [...document.querySelectorAll("section")];
const fit = () => slides().forEach(slide => {
  for (let size = 1; size > 0.3; size -= 0.04) {
    slide.style.setProperty("--fit", size);
    const wide = [slide, ...slide.querySelectorAll("pre, table")].some(e => e.scrollWidth > e.clientWidth + 1);
    if (!wide && slide.scrollHeight <= slide.clientHeight) break;
  }
});
addEventListener("load", fit);
addEventListener("resize", fit);
addEventListener("keydown", event => {
  const steps = { ArrowRight: 1, ArrowDown: 1, PageDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1, PageUp: -1 };
  const step = steps[event.key], all = slides();
  if (!step) return;
  event.preventDefault();
  const now = Math.round(scrollY / innerHeight) + step;
  all[Math.max(0, Math.min(all.length - 1, now))].scrollIntoView();
});
