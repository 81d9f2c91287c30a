"""What a reader or a listener of the page may miss."""

from __future__ import annotations

from playwright.sync_api import Page

# Text on the colours of all that lies behind it, one on the other. Pictures behind text are bars, which count as in CSS.
UNREADABLE = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = colours => { canvas.clearRect(0, 0, 1, 1);
    colours.forEach(colour => { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); });
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const luminance = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => { const found = [];
    for (let one = node; one; one = one.parentElement) { const style = getComputedStyle(one);
      const bar = style.backgroundImage.match(/rgba?\\([^)]*\\)/);
      if (bar) found.unshift(bar[0]);
      found.unshift(style.backgroundColor); }
    return ['white', ...found]; };
  const seen = node => { const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    return box.width > 1 && box.height > 1 && style.visibility === 'visible' && +style.opacity > 0.1; };
  const found = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !seen(node) || node.closest('script, style, option, footer, .hide, [disabled]')) continue;
    const svg = node.closest('svg'), style = getComputedStyle(node), ground = behind(svg ? svg.parentElement : node);
    const [a, b] = [luminance(paint([...ground, svg ? style.fill : style.color])), luminance(paint(ground))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.add(text.slice(0, 40) + ' ' + ratio.toFixed(2)); }
  return [...found]; }"""
NAMELESS = """() => [...document.querySelectorAll('input, select, textarea, button, [role=button], [role=tab], [role=listbox]')]
  .filter(node => node.getBoundingClientRect().width > 1 && getComputedStyle(node).visibility === 'visible')
  .filter(node => !(node.ariaLabel || node.title || node.getAttribute('aria-labelledby') || node.textContent.trim()
    || [...(node.labels || [])].some(label => label.textContent.trim())))
  .map(node => node.outerHTML.slice(0, 160))"""


def check(page: Page) -> None:
    """Every text has a contrast of 4.5 or more (WCAG 2.2, 1.4.3), and every control a name."""
    page.wait_for_timeout(250)  # colours of buttons fade
    assert page.evaluate(UNREADABLE) == []
    assert page.evaluate(NAMELESS) == []
