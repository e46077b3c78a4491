"""The drawings on buttons; lines in the colour of the text around them."""

from __future__ import annotations


def _icon(paths: str, size: int = 16) -> str:
    return (
        f'<svg width="{size}" height="{size}" viewBox="0 0 24 24" fill="none" '
        'stroke="currentColor" stroke-width="1.75" stroke-linecap="round" '
        f'stroke-linejoin="round" aria-hidden="true">{paths}</svg>'
    )


ICONS = {
    "copy": _icon(
        '<rect x="9" y="9" width="11" height="11" rx="2"/><path d="M5 15V5a1 1 0 0 1 1-1h10"/>'
    ),
    "retry": _icon('<path d="M20 11a8 8 0 1 0-2.3 6.3"/><path d="M20 5v6h-6"/>'),
    "up": _icon(
        '<path d="M7 11v9H4v-9zM7 11l4-7a2 2 0 0 1 2 2v4h5.5a2 2 0 0 1 2 2.3l-1 6a2 2 0 0 1-2 '
        '1.7H7"/>'
    ),
    "down": _icon(
        '<path d="M17 13V4h3v9zM17 13l-4 7a2 2 0 0 1-2-2v-4H5.5a2 2 0 0 1-2-2.3l1-6a2 2 0 0 1 '
        '2-1.7H17"/>'
    ),
    "edit": _icon('<path d="M4 20h4L19 9l-4-4L4 16z"/><path d="M13.5 6.5l4 4"/>'),
    "undo": _icon('<path d="M9 14L4 9l5-5"/><path d="M4 9h10a6 6 0 0 1 0 12h-3"/>'),
    "trash": _icon('<path d="M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13M10.5 11v5M13.5 11v5"/>'),
    "warn": _icon('<path d="M12 4l9 16H3z"/><path d="M12 10v4M12 17.3v.1"/>', 18),
    "clock": _icon('<circle cx="12" cy="12" r="8.5"/><path d="M12 7.5V12l3 2"/>', 18),
    "image": _icon(
        '<rect x="3.5" y="4.5" width="17" height="15" rx="2"/><circle cx="9" cy="10" r="1.5"/>'
        '<path d="M4 17l5-4 4 3 3-2.5 4 3.5"/>',
        18,
    ),
    "plug": _icon('<path d="M9 3v5M15 3v5M6 8h12v3a6 6 0 0 1-12 0zM12 17v4"/>', 18),
    "left": _icon('<path d="M14 6l-6 6 6 6"/>', 14),
    "right": _icon('<path d="M10 6l6 6-6 6"/>', 14),
    "sun": _icon(
        '<circle cx="12" cy="12" r="4"/><path d="M12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.6l1.4 '
        '1.4M17 17l1.4 1.4M5.6 18.4L7 17M17 7l1.4-1.4"/>',
        17,
    ),
    "side": _icon(
        '<rect x="3.5" y="4.5" width="17" height="15" rx="2.5"/><path d="M9.5 4.5v15"/>', 18
    ),
    "close": _icon('<path d="M6 6l12 12M18 6L6 18"/>', 17),
    "chat": _icon(
        '<path d="M5 5h14a2 2 0 0 1 2 2v8a2 2 0 0 1-2 2h-8l-5 4v-4H5a2 2 0 0 1-2-2V7a2 2 0 0 1 '
        '2-2z"/>',
        17,
    ),
    "compare": _icon(
        '<rect x="3.5" y="4.5" width="7" height="15" rx="1.5"/>'
        '<rect x="13.5" y="4.5" width="7" height="15" rx="1.5"/>',
        17,
    ),
    "cluster": _icon(
        '<rect x="4" y="4" width="16" height="6.5" rx="1.5"/><rect x="4" y="13.5" width="16" '
        'height="6.5" rx="1.5"/><path d="M8 7.2h.1M8 16.7h.1"/>',
        17,
    ),
}
