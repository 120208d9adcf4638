"""Style and script of the page: light and dark as the reader's system asks, laptop and phone."""

STYLE = """
:root { --back: #ffffff; --panel: #f5f7fa; --text: #1d2733; --soft: #5a6877; --line: #d9e0e8; --accent: #2f7ed8; }
@media (prefers-color-scheme: dark) {
  :root { --back: #12171d; --panel: #1b222b; --text: #e6ebf1; --soft: #9aa8b8; --line: #313b47; --accent: #6aa8ee; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
.brand { margin: 0; color: var(--accent); font-weight: 600; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 4px 0 12px; }
h2 { font-size: 1.3rem; margin: 48px 0 8px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 20px 0 4px; }
.lead { margin: 4px 0; font-size: 1.1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.card { background: var(--panel); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 1.35rem; }
.card span, .caption, figcaption { color: var(--soft); font-size: .9rem; }
.note { background: var(--panel); border-left: 4px solid #e0b01e; padding: 8px 12px; }
figure { margin: 16px 0 28px; min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .85rem; margin: 2px 0 4px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; overflow-wrap: anywhere;
  min-width: 8em; }
tbody th { color: inherit; font-weight: 400; }
.beside td, .beside thead th { white-space: normal; overflow-wrap: anywhere; min-width: 5.5em; }
.beside td:last-child { white-space: nowrap; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
.pairs { width: auto; }
.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
.pairs th { text-align: left; vertical-align: top; }
.pairs th:first-child { color: var(--soft); white-space: nowrap; padding-right: 24px; }
summary { cursor: pointer; margin-top: 12px; }
li { overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 16px 14px 48px; } h1 { font-size: 1.35rem; } .lead { font-size: 1rem; }
  .cards { grid-template-columns: 1fr 1fr; } th, td { padding: 5px 6px; }
}
"""
"""CSS."""

SCRIPT = """
(function () {
  "use strict";
  const root = document.documentElement;
  const errors = [];
  window.addEventListener("error", (event) => errors.push(event.message));
  const value = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  function paint() {
    const text = value("--text"), soft = value("--soft"), line = value("--line");
    for (const own of Bokeh.documents) for (const model of own._all_models.values()) {
      const is_axis = model.type.endsWith("Axis");
      if (is_axis) model.setv({axis_label_text_color: soft, major_label_text_color: text, axis_line_color: line,
        major_tick_line_color: line, minor_tick_line_color: null, axis_label_text_font_style: "normal",
        major_label_text_font_size: "12px", axis_label_text_font_size: "12px"});
      if (model.type === "Grid") model.setv({grid_line_color: line, grid_line_alpha: 0.6});
    }
  }
  function when_drawn() {
    const drawn = Bokeh.documents.length > 0 && Bokeh.documents.every((own) => own.is_idle);
    if (!drawn) return void setTimeout(when_drawn, 20);
    paint();
    root.dataset.drawn = Math.round(performance.now());
    root.dataset.errors = errors.join("; ");
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  when_drawn();
})();
"""
"""Gives the figures the colours of the page, and says on the root element when all are drawn, after how many ms."""
