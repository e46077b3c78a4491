// What Gradio's components do not do: clicks in our HTML become events, formulas are drawn,
// the page follows the answer, the theme and the drawers are kept. Nothing is fetched from elsewhere.
(() => {
  if (window.tandem) return;
  const root = document.currentScript?.dataset.root ?? document.querySelector('script[data-root]')?.dataset.root ?? '';
  const body = () => document.body.classList;
  const phone = () => innerWidth <= 760;
  const remember = (key, value) => { try { localStorage.setItem(key, value); } catch { /* private window */ } };
  const recall = key => { try { return localStorage.getItem(key); } catch { return null; } };

  // ---------------------------------------------------------------- formulas
  // In a shadow root, so that Gradio's patching of the page leaves them alone.
  customElements.get('x-tex') || customElements.define('x-tex', class extends HTMLElement {
    static observedAttributes = ['tex'];
    attributeChangedCallback() { this.draw(); }
    connectedCallback() { this.draw(); }
    draw() {
      if (!window.katex) { setTimeout(() => this.draw(), 60); return; }
      const tex = this.getAttribute('tex') || '';
      if (this.drawn === tex) return;
      this.drawn = tex;
      const shadow = this.shadowRoot || this.attachShadow({ mode: 'open' });
      shadow.innerHTML = `<link rel="stylesheet" href="${root}/tandem/vendor/katex/katex.min.css"><style>:host([d]){display:block;overflow-x:auto;overflow-y:hidden;margin:12px 0;padding:2px 0}.katex-display{margin:0!important;text-align:left!important}.katex-display>.katex{text-align:left!important}</style><span></span>`;
      try {
        katex.render(tex, shadow.lastChild, { displayMode: this.hasAttribute('d'), throwOnError: false, trust: false, maxSize: 20, maxExpand: 200 });
      } catch { shadow.lastChild.textContent = tex; }
    }
  });

  // ---------------------------------------------------------------- clicks in our HTML
  const copied = '<svg width="16" height="16" viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" aria-hidden="true"><path d="M5 13l4 4L19 7"/></svg>';
  async function copy(text, button) {
    try { await navigator.clipboard.writeText(text); } catch {
      const area = document.createElement('textarea');
      area.value = text; document.body.append(area); area.select(); document.execCommand('copy'); area.remove();
    }
    const before = button.innerHTML;
    button.innerHTML = copied;
    setTimeout(() => { button.innerHTML = before; }, 1200);
  }

  // A small form in place of, or below, something; Escape and Cancel close it.
  function form(look, { value = '', label, send, note = '', empty = false, lines = true }, done) {
    const made = document.createElement('form');
    made.className = look;
    made.innerHTML = `<textarea rows="${lines ? 3 : 1}" maxlength="100000"></textarea><div class="row"><span class="note"></span><button type="button" class="bt">Cancel</button><button type="submit" class="bt pri"></button></div>`;
    const area = made.querySelector('textarea');
    area.setAttribute('aria-label', label); area.dataset.testid = 'edit-box'; area.value = value;
    if (empty) area.placeholder = label;
    made.querySelector('.note').textContent = note;
    made.querySelector('[type=submit]').textContent = send;
    const close = text => { made.remove(); done(text); };
    made.querySelector('[type=button]').onclick = () => close(null);
    made.onkeydown = event => {
      event.stopPropagation();
      if (event.key === 'Escape') close(null);
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) { event.preventDefault(); made.requestSubmit(); }
    };
    made.onsubmit = event => {
      event.preventDefault();
      const text = area.value.trim();
      if (text || empty) close(text);
    };
    setTimeout(() => { area.focus(); area.setSelectionRange(area.value.length, area.value.length); });
    return made;
  }

  function edit(turn, index, trigger) {
    if (turn.querySelector('form')) return;
    const bubble = turn.querySelector('.ub'), later = turn.parentElement.querySelectorAll('[data-testid=user-turn]').length - 1 - index;
    const made = form('edit', { value: turn.dataset.raw, label: 'Edit message', send: 'Send', note: later > 0 ? 'What follows is removed.' : '' }, text => {
      if (bubble) bubble.hidden = false;
      if (text !== null) trigger('select', { act: 'edit', i: index, text });
    });
    if (bubble) { bubble.hidden = true; bubble.after(made); } else turn.prepend(made);
  }

  function judge(turn, button, index, trigger) {
    const on = button.classList.contains('on'), v = button.dataset.v;
    turn.querySelector('form')?.remove();
    trigger('select', { act: 'judge', i: index, v });
    if (on) return;
    const made = form('edit say', { label: v === 'up' ? 'What was good? (optional)' : 'What was wrong? (optional)', send: 'Save comment', empty: true, lines: false },
      comment => { if (comment) trigger('select', { act: 'judge', i: index, v, comment }); });
    // After the page has been drawn with the vote, or the drawing would take the form along.
    made.classList.add('float');
    document.querySelectorAll('form.float').forEach(other => other.remove());
    document.querySelector('#dock').prepend(made);
  }

  function rename(row, trigger) {
    const open = row.querySelector('.op');
    const made = form('edit ren', { value: open.textContent, label: 'Name of the chat', send: 'Save', lines: false }, text => {
      row.classList.remove('naming');
      if (text) trigger('select', { act: 'rename', k: row.dataset.k, text });
    });
    row.classList.add('naming'); row.append(made);
  }

  function listen(element, trigger) {
    element.addEventListener('click', event => {
      const button = event.target.closest('[data-act]');
      if (!button || button.disabled) return;
      const act = button.dataset.act, turn = button.closest('.turn'), row = button.closest('.cv');
      const index = +(button.dataset.i ?? turn?.dataset.i ?? -1);
      if (act === 'copy') return copy(turn.dataset.raw, button);
      if (act === 'copy-code') return copy(button.closest('.code').querySelector('pre').innerText, button);
      if (act === 'edit') return edit(turn, index, trigger);
      if (act === 'judge') return judge(turn, button, index, trigger);
      if (act === 'rename') return rename(row, trigger);
      if (act === 'delete' && !confirm('Delete this chat, with its images and feedback?')) return;
      if (act === 'drain' && !confirm(`Drain ${button.dataset.k}? It finishes what runs and takes nothing new.`)) return;
      if (act === 'resume' && !confirm(`Let ${button.dataset.k} take requests again?`)) return;
      if (act === 'retry' && button.dataset.later && !confirm('Answer this again? What follows is removed.')) return;
      if (act === 'open' && phone()) body().remove('side-shown');
      const to = button.dataset.to === undefined ? undefined : +button.dataset.to;
      trigger('select', { act, i: index, to, k: row?.dataset.k ?? button.dataset.k });
    });
  }
  window.tandem = { listen };

  // ---------------------------------------------------------------- theme, drawers, keys
  const theme = () => {
    const dark = (recall('tandem-theme') || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
    body().toggle('dark', dark);
  };
  theme();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', theme);
  if (recall('tandem-side') === 'hidden') body().add('side-hidden');
  document.addEventListener('click', event => {
    const at = selector => event.target.closest(selector);
    if (at('[data-theme]')) { remember('tandem-theme', body().contains('dark') ? 'light' : 'dark'); theme(); return; }
    if (at('[data-settings]')) { body().toggle('set-shown'); return; }
    if (at('[data-side]')) {
      if (phone()) body().toggle('side-shown');
      else remember('tandem-side', body().toggle('side-hidden') ? 'hidden' : 'shown');
      return;
    }
    if (!at('details.menu') || at('details.menu a')) document.querySelectorAll('details.menu[open]').forEach(menu => { menu.open = false; });
    if (phone() && !at('#side')) body().remove('side-shown');
    if (phone() && !at('#settings') && !at('[role=listbox]')) body().remove('set-shown');
    if (phone() && at('#new-chat')) body().remove('side-shown');
  });
  addEventListener('keydown', event => {
    const area = document.querySelector('#box textarea');
    const typing = /TEXTAREA|INPUT/.test(document.activeElement.tagName);
    if (event.key === 'Escape') {
      const open = ['side-shown', 'set-shown'].filter(name => body().contains(name));
      if (open.length) body().remove(...open);
      else document.querySelector('#box .stop-button')?.click();
    }
    if (event.key === '/' && !typing && area) { event.preventDefault(); area.focus(); }
    if ((event.metaKey || event.ctrlKey) && event.shiftKey && event.key.toLowerCase() === 'o') { event.preventDefault(); document.querySelector('#new-chat')?.click(); }
    if (event.key === 'ArrowUp' && area && document.activeElement === area && !area.value) {
      const last = [...document.querySelectorAll('#tx [data-act=edit]')].at(-1);
      if (last) { event.preventDefault(); last.click(); }
    }
  });

  // ---------------------------------------------------------------- the page follows what happens
  let pinned = true, shown = null;
  addEventListener('scroll', () => { pinned = innerHeight + scrollY > document.documentElement.scrollHeight - 160; }, { passive: true });
  const bottom = () => scrollTo({ top: document.documentElement.scrollHeight });
  function counted() { // "Try again" says how long to wait, and can be pressed then
    document.querySelectorAll('[data-wait]').forEach(button => {
      const words = button.dataset.words ??= button.textContent, until = button.dataset.until ??= Date.now() + 1000 * button.dataset.wait;
      const left = Math.ceil((until - Date.now()) / 1000);
      const text = left > 0 ? `${words} in ${left} s` : words;
      if (button.textContent !== text) button.textContent = text;
      button.disabled = left > 0;
    });
  }
  setInterval(counted, 500);
  function followed() {
    const stage = document.querySelector('#stage'), tx = document.querySelector('#tx');
    if (!stage || !tx) { setTimeout(followed, 100); return; }
    new ResizeObserver(() => { if (pinned && !document.querySelector('form.edit')) bottom(); }).observe(stage);
    const look = () => {
      const marked = tx.querySelector('[data-c]');
      if (!marked || marked.dataset.c === shown) return;
      const first = shown === null;
      shown = marked.dataset.c;
      const address = new URL(location.href);
      if (shown) address.searchParams.set('c', shown); else address.searchParams.delete('c');
      history.replaceState(history.state, '', address);
      document.querySelectorAll('form.float').forEach(made => made.remove());
      pinned = true;
      if (shown) bottom(); else scrollTo({ top: 0 });
      if (!first && !phone()) document.querySelector('#box textarea')?.focus();
    };
    new MutationObserver(look).observe(tx, { subtree: true, childList: true, attributes: true, attributeFilter: ['data-c'] });
    look();
  }
  followed();
})();
