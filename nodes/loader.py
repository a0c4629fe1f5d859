"""Load DMM Model: a checkpoint with styles as MODEL, CLIP and VAE."""

from __future__ import annotations

from collections.abc import Sequence

from comfy_api.latest import io

from ..training.config import ModelSettings
from ..training.files.model_files import change_stamp
from . import host_model, paths

PLAIN = "a plain model, no styles: fine as a teacher or a base"


def describe(info: host_model.ModelInfo, missing: Sequence[str]) -> str:
    """What the file holds, for the node's text field. missing: the outputs that it has nothing for."""
    names = list(info.known)
    lines = [f"{len(names)} styles: {', '.join(names)}" if names else PLAIN]
    if missing:
        add = " and ".join(f"Load {part}" for part in missing)
        lines.append(f"no {' and no '.join(missing)} in this file: to paint, add {add}")
    lines += [info.remark] if info.remark else []
    return "\n".join(lines)


class LoadDMMModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DMMLoadModel",
            display_name="Load DMM Model",
            category="DMM",
            description=(
                "Loads one model that holds many styles. Pick one of them with Style Selector; without it, the model "
                "paints with no style."
            ),
            search_aliases=[
                "load checkpoint",
                "multi style",
                "distilled model merging",
                "加载模型",
                "載入模型",
                "モデル読み込み",
                "모델 로드",
            ],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=paths.model_files(),
                    tooltip=(
                        "From models/dmm, output/dmm, models/checkpoints, and UNets in models/diffusion_models or "
                        "models/diffusers. Plain models load without styles."
                    ),
                ),
                io.Int.Input(
                    "num_heads",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Attention heads of the UNet, which its weights do not show. 0: what the file or a yaml beside it says, or the "
                        "usual number. Only models of sizes of their own need it."
                    ),
                ),
                io.Int.Input(
                    "num_head_channels",
                    default=0,
                    min=0,
                    max=1024,
                    optional=True,
                    advanced=True,
                    tooltip="The same said otherwise: channels of each attention head. 0: as the file says.",
                ),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name, num_heads=0, num_head_channels=0):
        stamp = change_stamp(paths.model_path(ckpt_name))  # a training run may have replaced the file
        return (ckpt_name, num_heads, num_head_channels, stamp)

    @classmethod
    def execute(cls, ckpt_name, num_heads=0, num_head_channels=0) -> io.NodeOutput:
        said = ModelSettings(num_heads=num_heads or None, num_head_channels=num_head_channels or None)
        model, clip, vae, info = host_model.load(paths.model_path(ckpt_name), said)
        parts = {"CLIP": clip is not None, "VAE": vae.first_stage_model is not None}
        missing = [part for part, there in parts.items() if not there]
        # In the page the styles stand on cards, and what is missing on the outputs: of the text only the remark is left to say.
        shown = {"text": [describe(info, missing)], "remarks": [info.remark], "lacks": missing}
        return io.NodeOutput(model, clip, vae, ui=shown)


NODES = [LoadDMMModel]
