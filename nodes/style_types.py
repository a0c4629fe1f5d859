"""DMM_STYLE on the wires: a ``dmm_core.style_value.Style``; and inputs that take one, or its text form."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmm_core.style_value import NO_STYLE, Style, parse_style

StyleType = io.Custom("DMM_STYLE")

HOW = "A name (ink), shares (ink:0.7, pen:0.3), or a schedule (0%: ink; 60%: pen). Or connect a style. The button below shows them."


def style_input(name: str = "style", default: str = NO_STYLE, multiline: bool = False, tooltip: str = HOW):
    """A text field that also takes a link from the style nodes."""
    field = io.String.Input(name, default=default, multiline=multiline, tooltip=tooltip)
    return io.MultiType.Input(field, [StyleType])


def as_style(value: Style | str) -> Style:
    """What ``style_input`` gave. Raises ValueError for text that cannot be read."""
    return value if isinstance(value, Style) else parse_style(value)
