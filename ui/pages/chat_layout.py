"""What is on the chat page, before anything happens."""

from __future__ import annotations

import gradio as gr

from ui.icons import ICONS
from ui.model import Settings
from ui.pages.shared import LISTEN, composer, html, top
from ui.parts import Parts
from ui.view import View

HINT_BOX = "Message, or paste an image"
HINT = (
    "<div><kbd>Enter</kbd> send · <kbd>Shift Enter</kbd> new line · <kbd>Esc</kbd> stop · "
    "answers can be wrong, check what matters</div>"
)


class ChatLayout:
    """The components, made inside ``gr.Blocks``."""

    def __init__(self, parts: Parts) -> None:
        limits = Settings.model_fields
        self.view = gr.State(View())
        self.nav = html(top(parts, "chat"), elem_id="nav", js_on_load=None)
        with gr.Column(elem_id="side"):
            self.new = gr.Button("New chat", elem_id="new-chat")
            self.find = gr.Textbox(
                placeholder="Search chats", label="Search chats", show_label=False,
                container=False, elem_id="find", max_length=200,
            )  # fmt: skip
            self.list = html("", elem_id="convs", js_on_load=LISTEN)
        with gr.Column(elem_id="settings"):
            html(
                '<div class="sh"><h2>Settings</h2><button type="button" class="ib" data-settings '
                f'aria-label="Close settings">{ICONS["close"]}</button></div>',
                js_on_load=None,
            )
            self.system = gr.Textbox(
                label="System prompt", lines=3, placeholder="Optional", max_length=20_000
            )
            self.adapter = gr.Dropdown(
                [("None", "")], value="", label="Adapter", filterable=False, elem_id="adapter"
            )
            self.temperature = gr.Slider(
                0, 2, limits["temperature"].default, step=0.05, label="Temperature"
            )
            self.top_p = gr.Slider(0, 1, limits["top_p"].default, step=0.05, label="Top p")
            self.max_tokens = gr.Slider(
                1, 4096, limits["max_tokens"].default, step=1, label="Longest answer in tokens"
            )
            self.seed = gr.Textbox(
                label="Seed", placeholder="Random", max_length=19,
                info="The same seed and question give the same answer.",
            )  # fmt: skip
        with gr.Column(elem_id="stage"):
            with gr.Row(elem_id="bar"):
                self.model = gr.Dropdown(
                    [], label="Model", show_label=False, container=False, elem_id="model",
                    filterable=False,
                )  # fmt: skip
                self.kind = gr.Radio(
                    [("Auto", "auto"), ("SGLang", "sglang"), ("HF", "hf")], value="auto",
                    label="Backend", show_label=False, container=False, elem_id="backend",
                    elem_classes="seg",
                )  # fmt: skip
                html("", elem_classes="gap", js_on_load=None)
                self.export = html("", elem_id="export", js_on_load=None)
                html(
                    '<button type="button" class="ghost" id="open-settings" data-settings '
                    'aria-controls="settings">Settings</button>',
                    js_on_load=None,
                )
            self.banner = html("", elem_id="banner", js_on_load=None)
            self.tx = html("", elem_id="tx", js_on_load=LISTEN)
            self.live = html("", elem_id="live", js_on_load=None)
            with gr.Column(elem_id="dock"):
                self.notice = html("", elem_id="notice", js_on_load=LISTEN)
                self.box = composer(parts, placeholder=HINT_BOX)
                html(HINT, elem_id="hint", js_on_load=None)
            self.said = html("", elem_id="said", js_on_load=None)
        self.timer = gr.Timer(2)
