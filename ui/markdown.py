"""Markdown of models as HTML. HTML in it is text, links are inert, images are not loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from html import escape

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from ui.icons import ICONS

_FENCES = {"$$": "$$", "\\[": "\\]", "$": "$", "\\(": "\\)"}
_OPENER = re.compile(r"`{3,}|~{3,}|\$\$|\\\[")
_ITEM = re.compile(r"[-*+>|]|\d+[.)]")
_HIGHLIGHT_CHARS = 20_000
_FORMATTER: HtmlFormatter[str] = HtmlFormatter(nowrap=True, classprefix="c-")


def code(source: str, language: str) -> str:
    """A block of code with its language and a button to copy it."""
    name = language.split()[0] if language.split() else ""
    body = escape(source)
    if name and len(source) <= _HIGHLIGHT_CHARS:
        try:
            body = highlight(source, get_lexer_by_name(name), _FORMATTER)
        except ClassNotFound:
            name = name[:20]
    return (
        f'<div class="code"><div class="code-h"><span>{escape(name) or "text"}</span>'
        f'<button type="button" data-act="copy-code" aria-label="Copy code">{ICONS["copy"]}'
        f'</button></div><pre tabindex="0"><code>{body}</code></pre></div>'
    )


# ---------------------------------------------------------------- mathematics


def _tex(source: str, *, display: bool) -> str:
    text = escape(source.strip())
    return f'<x-tex{" d" if display else ""} tex="{text}">{text}</x-tex>'


def _math_inline(state: StateInline, silent: bool) -> bool:
    opener = next((f for f in _FENCES if state.src.startswith(f, state.pos)), None)
    if opener is None:
        return False
    begin = state.pos + len(opener)
    closer = _FENCES[opener]
    end = state.src.find(closer, begin)
    while opener == "$" and end > 0 and state.src[end - 1] == "\\":
        end = state.src.find(closer, end + 1)
    source = state.src[begin:end] if end > begin else ""
    if not source.strip():
        return False
    if opener == "$":
        # "$5 and $10" are prices: a formula hugs its dollars, and no digit follows it.
        after = state.src[end + 1 : end + 2]
        if source[0].isspace() or source[-1].isspace() or after.isdigit():
            return False
    if not silent:
        token = state.push("math", "", 0)
        token.content = source
        token.meta = {"display": opener in ("$$", "\\[")}
    state.pos = end + len(closer)
    return True


def _math_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    if state.is_code_block(start):
        return False
    first = state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]
    opener = next((f for f in ("$$", "\\[") if first.startswith(f)), None)
    if opener is None:
        return False
    closer = _FENCES[opener]
    lines, last = [first[len(opener) :]], start
    while closer not in lines[-1]:
        last += 1
        if last >= end or state.sCount[last] < state.blkIndent:
            return False
        lines.append(state.src[state.bMarks[last] : state.eMarks[last]])
    lines[-1], _, rest = lines[-1].partition(closer)
    if rest.strip() or not "".join(lines).strip():
        return False
    if not silent:
        state.line = last + 1
        token = state.push("math", "", 0)
        token.content = "\n".join(lines)
        token.meta = {"display": True}
    return True


# ---------------------------------------------------------------- the renderer


def _render_math(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    return _tex(tokens[index].content, display=bool(tokens[index].meta["display"]))


def _render_code(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    return code(tokens[index].content.rstrip("\n"), tokens[index].info)


def _render_link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return renderer.renderToken(tokens, index, options, env)


def _render_image(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType
) -> str:
    """Its words: loading it would tell another host who reads this."""
    return escape(tokens[index].content or "image")


def _open_table(*_: object) -> str:
    return '<div class="tbl" tabindex="0"><table>'


def _close_table(*_: object) -> str:
    return "</table></div>"


def _make() -> MarkdownIt:
    md = MarkdownIt("commonmark", {"html": False, "breaks": True})
    md.enable(["table", "strikethrough"])
    md.inline.ruler.before("escape", "math", _math_inline)
    md.block.ruler.before(
        "fence", "math", _math_block, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    for name, rule in {
        "math": _render_math,
        "fence": _render_code,
        "code_block": _render_code,
        "link_open": _render_link,
        "image": _render_image,
    }.items():
        md.add_render_rule(name, rule)
    md.add_render_rule("table_open", _open_table)
    md.add_render_rule("table_close", _close_table)
    return md


_MD = _make()


@lru_cache(2048)
def html(text: str) -> str:
    """The HTML of a whole text."""
    return str(_MD.render(text))


def growing(text: str) -> str:
    """The HTML of a text that grows: only what follows its last finished block is made anew."""
    done, tail = split(text)
    return (html(done) if done else "") + str(_MD.render(tail))


def split(text: str) -> tuple[str, str]:
    """``text`` cut at its last blank line that is outside code, formula and list."""
    cut, blank, at, closer = 0, 0, 0, ""
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if closer:
            closer = "" if bare.startswith(closer) or bare.endswith(closer) else closer
        elif not bare:
            blank = at
        else:
            if blank and not line[0].isspace() and not _ITEM.match(bare):
                cut = blank
            blank = 0
            opened = _OPENER.match(bare)
            if opened:
                wanted = _FENCES.get(opened.group(), opened.group())
                closer = "" if wanted in bare[opened.end() :] else wanted
        at += len(line)
    return text[:cut], text[cut:]
