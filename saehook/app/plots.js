// Small pictures of numbers over one common x, each point of which can be clicked or reached with Tab; text enters as text only.
const W = 330, H = 190, LEFT = 46, RIGHT = 320, TOP = 10, BOTTOM = 156;
const COLOURS = ['#1A85FF', '#D41159', '#8a7a00', '#a83090'];
const svg = (tag, fields, ...children) => {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(fields || {})) node.setAttribute(key, value);
  node.append(...children); return node; };
const short = value => value === null ? '–' : Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3)
  ? value.toExponential(1) : String(+value.toPrecision(3));
const ticks = (low, high, n) => {
  const rough = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(d => d * power).find(s => s >= rough);
  const found = []; for (let i = Math.ceil(low / step); i <= high / step + 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found; };
const picture = (panel, value) => {
  const x = value.x, all = [...panel.series.flatMap(one => one.y), panel.base ?? null].filter(v => v !== null);
  let low = Math.min(...all), high = Math.max(...all);
  if (panel.zero) { low = Math.min(0, low); high = Math.max(0, high); }
  if (low === high) { low -= panel.zero ? 0 : 1; high += 1; }
  const log = v => panel.logarithmic ? Math.log2(v) : v, back = v => panel.logarithmic ? 2 ** v : v;
  const places = [...x, ...(panel.edges || []), ...(panel.mark ? [panel.mark] : [])];
  const left = log(Math.min(...places)), right = log(Math.max(...places)), span = right - left || 1;
  const X = v => LEFT + 12 + (log(v) - left) / span * (RIGHT - LEFT - 24), Y = v => BOTTOM - (v - low) / (high - low) * (BOTTOM - TOP);
  const root = svg('svg', {viewBox: `0 0 ${W} ${H}`, role: 'group', 'aria-label': panel.title, class: 'plot'});
  for (const v of ticks(low, high, 4)) root.append(svg('path', {class: 'rule', d: `M${LEFT} ${Y(v)}H${RIGHT}`}),
    svg('text', {class: 'y', x: LEFT - 5, y: Y(v) + 4}, short(v)));
  for (const v of ticks(left, right, 5).map(back)) root.append(svg('text', {class: 'x', x: X(v), y: BOTTOM + 14}, short(v)));
  root.append(svg('path', {class: 'axis', d: `M${LEFT} ${BOTTOM}H${RIGHT}`}), svg('text', {class: 'x', x: (LEFT + RIGHT) / 2, y: H - 4}, value.below || ''));
  if (panel.base !== undefined && panel.base !== null) {
    const line = svg('path', {class: 'base', d: `M${LEFT} ${Y(panel.base)}H${RIGHT}`});
    line.append(svg('title', {}, 'unedited: ' + short(panel.base))); root.append(line); }
  if (panel.mark) { const line = svg('path', {class: 'mark', d: `M${X(panel.mark)} ${TOP}V${BOTTOM}`});
    line.append(svg('title', {}, 'this one: ' + short(panel.mark))); root.append(line); }
  panel.series.forEach((one, number) => {
    const points = x.map((v, i) => [v, one.y[i], i]).filter(place => place[1] !== null).sort((a, b) => a[0] - b[0]);
    const colour = COLOURS[number % COLOURS.length];
    if (panel.bars) {
      const width = Math.max(1, (RIGHT - LEFT - 24) / Math.max(8, x.length) - 1);
      for (const [v, y, i] of points) {
        const from = panel.edges ? X(panel.edges[i]) : X(v) - width / 2, wide = panel.edges ? X(panel.edges[i + 1]) - from - 0.5 : width;
        const bar = svg('rect', {x: from, y: Y(y), width: Math.max(0.5, wide), height: Math.max(0, Y(low) - Y(y)), fill: colour});
        const where = panel.edges ? `${short(panel.edges[i])} to ${short(panel.edges[i + 1])}` : short(v);
        bar.append(svg('title', {}, `${where}: ${short(y)}`)); root.append(bar); }
      return; }
    root.append(svg('path', {class: 'line', stroke: colour, 'stroke-dasharray': number ? '5 4' : 'none',
      d: points.map(([v, y], i) => (i ? 'L' : 'M') + X(v) + ' ' + Y(y)).join('')}));
    if (panel.still) return;
    for (const [v, y, i] of points) {
      const says = `${value.what || 'x'} ${short(v)}: ${one.name} ${short(y)}`;
      const dot = svg('circle', {cx: X(v), cy: Y(y), r: i === value.selected ? 6 : 4, fill: colour, tabindex: 0, role: 'button',
        'aria-label': says, 'data-key': i});
      dot.append(svg('title', {}, says)); root.append(dot); } });
  return root; };
const box = element.querySelector('.plots');
const make = (tag, fields, ...children) => { const node = Object.assign(document.createElement(tag), fields || {}); node.append(...children); return node; };
const whole = node => { const copy = node.cloneNode(true), from = [node, ...node.querySelectorAll('*')];
  [copy, ...copy.querySelectorAll('*')].forEach((one, i) => { const style = getComputedStyle(from[i]);
    one.setAttribute('style', ['fill', 'stroke', 'stroke-width', 'font-size', 'font-family', 'text-anchor', 'stroke-dasharray'].map(k => `${k}:${style.getPropertyValue(k)}`).join(';')); });
  copy.setAttribute('xmlns', 'http://www.w3.org/2000/svg'); copy.setAttribute('width', 2 * W); copy.setAttribute('height', 2 * H);
  return new XMLSerializer().serializeToString(copy); };
const png = (name, text) => { const image = new Image();
  image.onload = () => { const canvas = make('canvas', {width: 2 * W, height: 2 * H}), draw = canvas.getContext('2d');
    draw.fillStyle = getComputedStyle(document.body).backgroundColor; draw.fillRect(0, 0, 2 * W, 2 * H);
    draw.drawImage(image, 0, 0); canvas.toBlob(blob => save(name, blob)); };
  image.src = 'data:image/svg+xml;charset=utf-8,' + encodeURIComponent(text); };
const rowsOf = value => [[value.what || 'x', ...value.panels.flatMap(p => p.series.map(one => p.title + ': ' + one.name))],
  ...value.x.map((v, i) => [v, ...value.panels.flatMap(p => p.series.map(one => one.y[i]))])];
const draw = () => {
  const value = props.value || {}, focused = box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const panels = value.panels || [];
  box.replaceChildren(...panels.map(panel => {
    const drawing = picture(panel, value), name = fileName(panel.title);
    const key = panel.series.length < 2 ? [] : panel.series.map((one, i) => {
      const item = make('span', {className: 'key', textContent: one.name}); item.style.setProperty('--key', COLOURS[i % COLOURS.length]); return item; });
    return make('figure', {}, make('figcaption', {textContent: panel.title}), make('div', {className: 'keys'}, ...key), drawing,
      make('div', {className: 'save'},
        saveButton('SVG', panel.title, () => save(name + '.svg', whole(drawing), 'image/svg+xml')),
        saveButton('PNG', panel.title, () => png(name + '.png', whole(drawing))))); }));
  if (panels.length) box.append(make('div', {className: 'save all'}, 'All numbers:',
    saveButton('CSV', 'all numbers', () => save('numbers.csv', csv(rowsOf(value)), 'text/csv')),
    saveButton('JSON', 'all numbers', () => save('numbers.json', JSON.stringify(value, null, 1), 'application/json'))));
  if (focused) box.querySelector(`circle[data-key="${CSS.escape(focused)}"]`)?.focus(); };
const pick = event => { const dot = event.target.closest('circle[data-key]'); if (dot) trigger('select', {key: +dot.dataset.key}); };
box.addEventListener('click', pick);
box.addEventListener('keydown', event => { if (event.key === 'Enter' || event.key === ' ') {
  if (event.target.closest('circle')) { event.preventDefault(); pick(event); } } });
draw();
watch('value', draw);
