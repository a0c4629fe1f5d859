"""Style, Blend Styles, Style Schedule: styles as values, to be put on a MODEL, a prompt or a region."""

from __future__ import annotations

from comfy_api.latest import io

from ..dmm_core.style_value import Blend, Change, Schedule, Strength
from .style_types import StyleType, as_style, style_input


class DMMStyle(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMStyle",
            display_name="Style",
            category="DMM/style",
            description="A style, a blend of styles or a schedule of them, written down.",
            search_aliases=["dmm style", "style text"],
            inputs=[
                io.String.Input(
                    "text",
                    default="ink:0.7, candy:0.3",
                    multiline=True,
                    tooltip=(
                        "ink: one style. ink:0.7, pen:0.3: a blend (shares are made to sum to 1; 'none' is no style). "
                        "0%: ink; 60%: pen: pen from 60% of the sampling on; 40%-60%: pen fades in between."
                    ),
                ),
                io.Float.Input("strength", default=1.0, min=0.0, max=4.0, step=0.05, tooltip="Multiplies all of it."),
            ],
            outputs=[StyleType.Output(display_name="style")],
        )

    @classmethod
    def execute(cls, text, strength) -> io.NodeOutput:
        style = as_style(text)
        return io.NodeOutput(style if strength == 1 else Strength(style, strength))


class BlendStyles(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMBlendStyles",
            display_name="Blend Styles",
            category="DMM/style",
            description="A mix of two styles. Blends can be blended again, so any number of styles can come together.",
            search_aliases=["mix styles", "interpolate styles", "混合", "ブレンド"],
            inputs=[
                style_input("first"),
                style_input("second"),
                io.Float.Input(
                    "share",
                    default=0.5,
                    min=-1.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Of the second: 0 is the first style, 1 the second; beyond, the difference is exaggerated.",
                ),
            ],
            outputs=[StyleType.Output(display_name="style")],
        )

    @classmethod
    def execute(cls, first, second, share) -> io.NodeOutput:
        return io.NodeOutput(Blend(as_style(first), as_style(second), share))


class StyleSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        percent = "Of the sampling, as in Apply ControlNet's start_percent: 0 is pure noise, 1 the finished picture."
        return io.Schema(
            node_id="DMMStyleSchedule",
            display_name="Style Schedule",
            category="DMM/style",
            description=(
                "One style at first, another later: the first decides the composition, the second the finish. Schedules "
                "can be chained."
            ),
            search_aliases=["style keyframes", "style over steps", "prompt travel", "调度", "排程", "スケジュール"],
            inputs=[
                style_input("first"),
                style_input("then"),
                io.Float.Input("change_at", default=0.5, min=0.0, max=1.0, step=0.01, tooltip=percent),
                io.Float.Input(
                    "fade",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How long the change takes, as a share of the sampling; 0 is a switch.",
                ),
            ],
            outputs=[StyleType.Output(display_name="style")],
        )

    @classmethod
    def execute(cls, first, then, change_at, fade) -> io.NodeOutput:
        change = Change(change_at, min(change_at + fade, 1.0), as_style(then))
        return io.NodeOutput(Schedule(as_style(first), (change,)))


NODES = [DMMStyle, BlendStyles, StyleSchedule]
