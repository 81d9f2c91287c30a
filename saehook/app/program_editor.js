// Whatever a row holds enters the page as the value of an input: nothing is interpreted. A row that the controls cannot show in
// full (conditions, schedules, vectors) is shown as its JSON.
const part = name => element.querySelector('.' + name);
const OPS = {add: 'add (steer)', set: 'set to', scale: 'scale by', ablate: 'ablate', min: 'at least', max: 'at most',
  mean: 'set to its mean', swap: 'swap two', keep_only: 'keep only', resample: 'take from token'};
const UNITS = {norm: '× ‖x‖', max: '× its max', raw: 'raw', quantile: 'quantile'};
const WHERE = {everywhere: 'everywhere', prompt: 'in the prompt', generation: 'in new text', tokens: 'at tokens',
  positions: 'from, to', pattern: 'where text is like'};
const HINTS = {tokens: '0, 3, -1', positions: '3, 9', pattern: 'regular expression'};
const VALUED = ['add', 'set', 'scale', 'min', 'max'], UNITED = ['add', 'set', 'min', 'max'];
const FIELDS = ['op', 'latents', 'value', 'unit', 'site', 'where', 'active_only', 'source'];
const KEY = 'saehook-presets';
const copy = value => JSON.parse(JSON.stringify(value));
const read = () => ({rows: [], sites: [], most: 1, ...copy(props.value || {})});
let draft = read(), own = JSON.stringify(draft), timer = 0;

const make = (tag, fields, ...children) => {
  const node = Object.assign(document.createElement(tag), fields || {}); node.append(...children); return node; };
const control = (node, label, key) => { node.setAttribute('aria-label', label); node.id = key; return node; };
const choice = (options, value) => {
  const node = make('select');
  for (const [key, text] of Object.entries(options)) node.append(make('option', {value: key, textContent: text}));
  node.value = value; return node; };
const numbers = text => {
  const words = text.replaceAll(',', ' ').split(/\s+/).filter(Boolean);
  return words.length && words.every(word => /^-?\d{1,9}$/.test(word)) ? words.map(Number) : text; };
const shown = value => Array.isArray(value) ? value.filter(one => one !== null).join(', ') : value ?? '';
const whereKind = where => {
  const keys = Object.keys(where || {}).filter(key => key !== 'special').sort().join();
  if (keys === '') return 'everywhere';
  if (keys === 'generation,prompt' && where.prompt !== where.generation) return where.prompt ? 'prompt' : 'generation';
  return ['tokens', 'positions', 'pattern'].includes(keys) ? keys : null; };
const showable = edit => edit && typeof edit === 'object' && edit.op in OPS && 'latents' in edit
  && Object.keys(edit).every(key => FIELDS.includes(key)) && (edit.unit ?? 'raw') in UNITS && whereKind(edit.where) !== null
  && (!edit.source || edit.source[0] === 0);

const commit = () => { own = JSON.stringify(draft); props.value = copy(draft);
  clearTimeout(timer); timer = setTimeout(() => trigger('input'), 250); };
const changed = () => { commit(); draw(); };
const put = (edit, key, value) => {
  if (value === undefined) delete edit[key]; else edit[key] = value; };
const putWhere = (edit, kind, argument) => {
  const where = {prompt: {prompt: true, generation: false}, generation: {prompt: false, generation: true}}[kind]
    || (kind === 'everywhere' ? {} : {[kind]: argument});
  if ((edit.where || {}).special) where.special = true;
  put(edit, 'where', Object.keys(where).length ? where : undefined); };

const controls = (row, n) => {
  const edit = row.edit, key = name => 'edit-' + n + '-' + name;
  const op = control(choice(OPS, edit.op), 'Operation of edit ' + n, key('op'));
  op.onchange = () => { edit.op = op.value;
    if (!VALUED.includes(edit.op)) { delete edit.value; } else edit.value ??= edit.op === 'scale' ? 2 : 0.3;
    if (!UNITED.includes(edit.op)) delete edit.unit;
    if (['ablate', 'keep_only'].includes(edit.op)) delete edit.active_only;
    put(edit, 'source', edit.op === 'resample' ? [0, -1] : undefined); changed(); };
  const latent = control(make('input', {value: shown(edit.latents), placeholder: 'latent', maxLength: 200}),
    'Latent of edit ' + n, key('latent'));
  latent.oninput = () => { edit.latents = numbers(latent.value); commit(); };
  const lines = [[op, latent]];
  if (VALUED.includes(edit.op)) {
    const value = control(make('input', {type: 'number', step: 'any', value: edit.value ?? ''}),
      'Strength of edit ' + n, key('strength'));
    value.oninput = () => { edit.value = value.value === '' ? null : +value.value; commit(); };
    lines.push([value]);
    if (UNITED.includes(edit.op)) {
      const unit = control(choice(UNITS, edit.unit ?? 'raw'), 'Unit of edit ' + n, key('unit'));
      unit.onchange = () => { edit.unit = unit.value; commit(); };
      lines.at(-1).push(unit); } }
  if (edit.op === 'resample') {
    const source = control(make('input', {type: 'number', step: 1, value: (edit.source || [0, -1])[1]}),
      'Source token of edit ' + n, key('source'));
    source.oninput = () => { edit.source = [0, +source.value]; commit(); };
    lines.push([source]); }
  if (draft.sites.length > 1) {
    const names = Object.fromEntries([...new Set([...draft.sites, ...(edit.site ? [edit.site] : [])])].map(s => [s, s]));
    const site = control(choice(names, edit.site ?? draft.sites[0]), 'Site of edit ' + n, key('site'));
    if (!edit.site) edit.site = draft.sites[0];
    site.onchange = () => { edit.site = site.value; commit(); };
    lines.push([site]); }
  const kind = whereKind(edit.where);
  const where = control(choice(WHERE, kind), 'Where edit ' + n + ' acts', key('where'));
  where.onchange = () => { putWhere(edit, where.value, ''); changed(); };
  lines.push([where]);
  if (kind in HINTS) {
    const place = control(make('input', {value: shown(edit.where[kind]), placeholder: HINTS[kind], maxLength: 1000}),
      'Tokens of edit ' + n, key('place'));
    place.oninput = () => { putWhere(edit, kind, kind === 'pattern' ? place.value : numbers(place.value)); commit(); };
    lines.at(-1).push(place); }
  const boxes = [];
  const box = (name, text, on, set) => {
    const node = make('input', {type: 'checkbox', checked: on}); node.id = key(name);
    node.onchange = () => { set(node.checked); commit(); };
    boxes.push(make('label', {className: 'check'}, node, text)); };
  if (!['ablate', 'keep_only'].includes(edit.op))
    box('active', 'only where active', !!edit.active_only, on => put(edit, 'active_only', on || undefined));
  box('special', 'special tokens, too', !!(edit.where || {}).special, on => {
    const rest = {...(edit.where || {})}; put(rest, 'special', on || undefined);
    put(edit, 'where', Object.keys(rest).length ? rest : undefined); });
  return [...lines.map(line => make('div', {className: 'line'}, ...line)), make('div', {className: 'line'}, ...boxes)]; };

const asText = (row, n) => {
  const text = control(make('textarea', {rows: 4, spellcheck: false, maxLength: 90000,
    value: 'text' in row ? row.text : JSON.stringify(row.edit, null, 1)}), 'JSON of edit ' + n, 'edit-' + n + '-json');
  text.oninput = () => {
    try { row.edit = JSON.parse(text.value); delete row.text; } catch { row.text = text.value; delete row.edit; }
    commit(); };
  return [text]; };

const drawRow = (row, i) => {
  const n = i + 1, can = !('text' in row) && showable(row.edit);
  const on = make('input', {type: 'checkbox', checked: !!row.on, id: 'edit-' + n + '-on'});
  on.onchange = () => { row.on = on.checked; item.classList.toggle('off', !row.on); commit(); };
  const json = control(make('button', {type: 'button', textContent: '{ }', disabled: !can, className: row.json ? 'down' : '',
    title: can ? 'Show this edit as JSON' : 'Only JSON can show this edit in full'}), 'Edit ' + n + ' as JSON', 'edit-' + n + '-as-json');
  json.setAttribute('aria-pressed', String(!!row.json || !can));
  json.onclick = () => { put(row, 'json', row.json ? undefined : true); changed(); };
  const remove = control(make('button', {type: 'button', textContent: '✕', title: 'Remove this edit'}),
    'Remove edit ' + n, 'edit-' + n + '-remove');
  remove.onclick = () => { draft.rows.splice(i, 1); changed(); };
  const head = make('div', {className: 'line head'}, make('label', {className: 'check'}, on, 'Edit ' + n), json, remove);
  const item = make('li', {className: row.on ? '' : 'off'}, head, ...(can && !row.json ? controls(row, n) : asText(row, n)));
  return item; };

const draw = () => {
  const focused = element.contains(document.activeElement) ? document.activeElement.id : null;
  part('rows').replaceChildren(...draft.rows.map(drawRow));
  part('empty').hidden = draft.rows.length > 0;
  part('add').disabled = draft.rows.length >= draft.most;
  part('error').value = draft.error || 'keep';
  const cap = draft.norm && typeof draft.norm === 'object';
  part('norm').value = cap ? 'cap' : draft.norm || '';
  part('cap').hidden = !cap;
  if (cap && +part('cap').value !== draft.norm.cap) part('cap').value = draft.norm.cap ?? '';
  part('splice').checked = !!draft.splice;
  part('parallel').checked = !!draft.parallel;
  if (focused) element.querySelector('#' + CSS.escape(focused))?.focus(); };

const saved = () => { try { return JSON.parse(localStorage.getItem(KEY)) || {}; } catch { return {}; } };
const store = presets => { try { localStorage.setItem(KEY, JSON.stringify(presets)); } catch { /* full, or not allowed */ }
  listPresets(); };
const listPresets = () => part('preset').replaceChildren(make('option', {value: '', textContent: 'presets…'}),
  ...Object.keys(saved()).sort().map(name => make('option', {value: name, textContent: name})));

part('add').onclick = () => {
  draft.rows.push({on: true, edit: {op: 'add', latents: '', value: 0.3, unit: 'norm'}}); changed();
  element.querySelector('#edit-' + draft.rows.length + '-latent').focus(); };
part('clear').onclick = () => { Object.assign(draft, {rows: [], error: 'keep', norm: null, splice: false, parallel: false}); changed(); };
part('error').onchange = event => { draft.error = event.target.value; commit(); };
part('norm').onchange = event => { draft.norm = event.target.value === 'cap' ? {cap: 0.5} : event.target.value || null; changed(); };
part('cap').oninput = event => { draft.norm = {cap: event.target.value === '' ? null : +event.target.value}; commit(); };
for (const name of ['splice', 'parallel']) part(name).onchange = event => { draft[name] = event.target.checked; commit(); };
part('preset').onchange = event => {
  const preset = saved()[event.target.value];
  if (preset) { Object.assign(draft, copy(preset)); part('name').value = event.target.value; changed(); }
  event.target.value = ''; };
part('save').onclick = () => {
  const name = part('name').value.trim();
  if (!name) { part('name').focus(); return; }
  const {rows, error, norm, splice, parallel} = draft;
  store({...saved(), [name]: {rows, error, norm, splice, parallel}}); };
part('forget').onclick = () => { const presets = saved(); delete presets[part('name').value.trim()]; store(presets); };
draw(); listPresets();
watch('value', () => { if (JSON.stringify(props.value) !== own) { draft = read(); own = JSON.stringify(props.value); draw(); } });
