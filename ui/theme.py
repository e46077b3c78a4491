"""Gradio's base theme in warm neutrals and one accent. No font is fetched from anywhere."""

from __future__ import annotations

import gradio as gr


def theme() -> gr.themes.Base:
    stone = gr.themes.Color(
        name="stone", c50="#fafaf9", c100="#f5f5f4", c200="#e7e5e4", c300="#d6d3d1", c400="#a8a29e",
        c500="#78716c", c600="#57534e", c700="#44403c", c800="#292524", c900="#1c1917",
        c950="#141210",
    )  # fmt: skip
    sizes = gr.themes.sizes
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=stone,
        radius_size=sizes.radius_lg,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
        # Plain names: any other Google font than the bundled ones would be fetched.
        font=["Inter", "ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto",
              "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
    ).set(
        body_background_fill="#fbfaf8",
        body_background_fill_dark="#171513",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1f1c1a",
        background_fill_secondary="#f6f4f1",
        background_fill_secondary_dark="#1a1816",
        body_text_color="#1f1b18",
        body_text_color_dark="#ece8e3",
        body_text_color_subdued="#6f6962",
        body_text_color_subdued_dark="#a8a198",
        border_color_primary="#e6e2dc",
        border_color_primary_dark="#34302c",
        block_border_width="0px",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_shadow="none",
        block_padding="0px",
        block_label_border_width="0px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#221f1c",
        input_border_color="#e0dbd4",
        input_border_color_dark="#3a3530",
        input_border_width="1px",
        input_placeholder_color="#6f6962",
        input_placeholder_color_dark="#a8a198",
        input_shadow="none",
        input_shadow_focus="0 0 0 3px rgba(15,118,110,.16)",
        input_border_color_focus="#0f766e",
        input_border_color_focus_dark="#2dd4bf",
        input_radius="10px",
        button_primary_background_fill="#1f1b18",
        button_primary_background_fill_hover="#3a342e",
        button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="#ece8e3",
        button_primary_background_fill_hover_dark="#ffffff",
        button_primary_text_color_dark="#1f1b18",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_hover="#efebe6",
        button_secondary_background_fill_dark="transparent",
        button_secondary_background_fill_hover_dark="#2a2622",
        button_secondary_border_color="#e0dbd4",
        button_secondary_border_color_dark="#3a3530",
        button_border_width="1px",
        button_large_radius="10px",
        button_small_radius="8px",
        button_large_text_weight="500",
        button_small_text_weight="500",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
        layout_gap="12px",
        section_header_text_weight="500",
    )  # fmt: skip
