"""The deformations: lips from speech (LAC), emotions (EMC), their mix by region, and the sum with the portrait's keypoints."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pctalk.checkpoints import MotionModel
from ..pctalk.emc import mix_regions, predict_emotion
from ..pctalk.keypoints import EMOTIONS, REGIONS, Deformation, Keypoints, add_deformations
from ..pctalk.lac import predict_lips
from ..pctalk.speech import Speech
from .host import Handle, Progress, intermediate_device
from .sockets import CATEGORY, PACK_NAMES, DeformationSocket, KeypointsSocket, MotionModelSocket, SpeechSocket

ROW_COUNTS = range(2, 9)


def _gain(name: str, sound: str, what: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=0.0,
        max=3.0,
        step=0.05,
        tooltip=f"{what}, as in “{sound}”: 1 leaves it, 0.8 to 1.2 stays natural, 0 removes it.",
    )


class LACDeform(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_LACDeform",
            display_name="Lip Alignment (LAC)",
            category=CATEGORY,
            description="Moves the lips with the speech: in whose style, how far (amplitude) and into which shapes (gains).",
            search_aliases=[*PACK_NAMES, "lip sync", "LAC", "lip alignment control", "talking", "mouth", "articulation"],
            inputs=[
                MotionModelSocket.Input("motion_model", tooltip="The motion model that encoded the speech."),
                SpeechSocket.Input("speech", tooltip="From Encode Speech."),
                KeypointsSocket.Input("keypoints", tooltip="The portrait's own keypoints, K_ori, from Extract Keypoints."),
                io.Int.Input(
                    "style_id",
                    default=0,
                    min=0,
                    max=9999,
                    tooltip="Whose way of articulating. The published model recommends 192, 166 and 202. An error names "
                    "the range when there is no such style.",
                ),
                io.Float.Input(
                    "amplitude",
                    default=1.0,
                    min=0.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How far the lips move: 1 as predicted, 0.6 to 0.8 restrained, 0 not at all.",
                ),
                io.Float.Input(
                    "follow_loudness",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much louder speech opens the mouth wider and quieter speech less. 0 is off.",
                ),
                _gain("pursing", "too", "How far the lips purse"),
                _gain("widening", "bee", "How far the lips widen"),
                _gain("opening", "duck", "How far the mouth opens"),
                io.Combo.Input(
                    "lips",
                    options=["replace", "add"],
                    default="replace",
                    tooltip="replace: speech takes the place of the portrait's own mouth expression, which may be a smile. "
                    "add: speech is added to it.",
                ),
                io.Boolean.Input("smoothing", default=True, tooltip="Removes the tremble between frames, as published."),
            ],
            outputs=[
                DeformationSocket.Output(display_name="deformation", tooltip="D_l, the lips' motion: for Add Deformations.")
            ],
        )

    @classmethod
    def execute(
        cls,
        motion_model: Handle[MotionModel],
        speech: Speech,
        keypoints: Keypoints,
        style_id: int,
        amplitude: float,
        follow_loudness: float,
        pursing: float,
        widening: float,
        opening: float,
        lips: str,
        smoothing: bool,
    ) -> io.NodeOutput:
        device = motion_model.load()
        deformation = predict_lips(
            motion_model.model,
            speech.to(device),
            keypoints.to(device),
            style=style_id,
            amplitude=amplitude,
            follow_loudness=follow_loudness,
            pursing=pursing,
            widening=widening,
            opening=opening,
            lips=lips,
            smoothing=smoothing,
            progress=Progress(),
        )
        return io.NodeOutput(deformation.to(intermediate_device()))


class EMCDeform(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_EMCDeform",
            display_name="Emotion (EMC)",
            category=CATEGORY,
            description="An emotion that moves with the speech, as what it adds to a neutral face.",
            search_aliases=[*PACK_NAMES, "EMC", "emotion control", "expression", "happy", "sad", "angry", "smile"],
            inputs=[
                MotionModelSocket.Input("motion_model", tooltip="The motion model that encoded the speech."),
                SpeechSocket.Input("speech", tooltip="From Encode Speech."),
                KeypointsSocket.Input("keypoints", tooltip="The portrait's own keypoints, K_ori, from Extract Keypoints."),
                io.Combo.Input("emotion", options=list(EMOTIONS), default="happy", tooltip="neutral adds exactly nothing."),
                io.Float.Input(
                    "intensity",
                    default=0.5,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strong, linearly: 0 is exactly nothing, up to 0.5 restrained, 1 in full.",
                ),
                io.Combo.Input(
                    "region",
                    options=list(REGIONS),
                    default="all",
                    tooltip="The part of the face that shows it; nothing outside moves. lower_face is the lips, upper_face is "
                    "eyes and brows.",
                ),
            ],
            outputs=[
                DeformationSocket.Output(
                    display_name="deformation", tooltip="D_e: for Add Deformations or Mix Emotions by Region."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        motion_model: Handle[MotionModel],
        speech: Speech,
        keypoints: Keypoints,
        emotion: str,
        intensity: float,
        region: str,
    ) -> io.NodeOutput:
        device = motion_model.load()
        deformation = predict_emotion(
            motion_model.model,
            speech.to(device),
            keypoints.to(device),
            emotion=emotion,
            intensity=intensity,
            region=region,
            progress=Progress(),
        )
        return io.NodeOutput(deformation.to(intermediate_device()))


def _rows(tooltip: str, row) -> io.DynamicCombo.Input:
    """A list whose entries are numbers of rows; `row(n)` gives the inputs of row n.

    Not io.Autogrow: its rows have one socket each and no widget, and these have a widget or two beside it.
    """
    options = [
        io.DynamicCombo.Option(str(count), [one for number in range(1, count + 1) for one in row(number)])
        for count in ROW_COUNTS
    ]
    return io.DynamicCombo.Input("rows", options=options, tooltip=tooltip)


class RegionEmotionMix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def row(number: int) -> list[io.Input]:
            return [
                DeformationSocket.Input(f"deformation_{number}", optional=True, tooltip="From Emotion (EMC), or any other."),
                io.Combo.Input(
                    f"region_{number}",
                    options=list(REGIONS),
                    default="all",
                    tooltip="Where this deformation counts. Leave the region of Emotion (EMC) at all, so that it is there.",
                ),
                io.Float.Input(
                    f"weight_{number}",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Times its own strength. Rows that share a region add up.",
                ),
            ]

        return io.Schema(
            node_id="PCTalk_RegionEmotionMix",
            display_name="Mix Emotions by Region",
            category=CATEGORY,
            description="Composes deformations, each in its region: happy lips under sad brows. Their order never matters.",
            search_aliases=[*PACK_NAMES, "mixed emotions", "blend expressions", "region mask", "compound emotion"],
            inputs=[
                _rows("How many deformations to mix. Rows without a connection are skipped.", row),
                io.Float.Input(
                    "seam_softness",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="0: hard regions, as published. Above: each region fades into its neighbours.",
                ),
            ],
            outputs=[DeformationSocket.Output(display_name="deformation", tooltip="For Add Deformations.")],
        )

    @classmethod
    def execute(cls, rows: dict[str, Any], seam_softness: float) -> io.NodeOutput:
        parts = [
            (rows[f"deformation_{number}"], rows[f"region_{number}"], rows[f"weight_{number}"])
            for number in range(1, int(rows["rows"]) + 1)
            if rows.get(f"deformation_{number}") is not None
        ]
        if not parts:
            raise ValueError("There is nothing to mix: connect at least one deformation.")
        return io.NodeOutput(mix_regions(parts, seam_softness=seam_softness))


class AddDeformations(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def row(number: int) -> list[io.Input]:
            return [
                DeformationSocket.Input(
                    f"deformation_{number}", optional=True, tooltip="From LAC, EMC or Mix Emotions by Region."
                ),
                io.Float.Input(
                    f"gain_{number}", default=1.0, min=-2.0, max=2.0, step=0.05, tooltip="Times this; 0 leaves it out exactly."
                ),
            ]

        return io.Schema(
            node_id="PCTalk_AddDeformations",
            display_name="Add Deformations",
            category=CATEGORY,
            description="K_d = K_ori + the sum of all deformations, each times its gain. Their order never matters.",
            search_aliases=[*PACK_NAMES, "combine motion", "sum deformations", "keypoints add"],
            inputs=[
                KeypointsSocket.Input("keypoints", tooltip="The portrait's own keypoints, K_ori, from Extract Keypoints."),
                _rows("How many deformations to add. Rows without a connection are skipped.", row),
            ],
            outputs=[KeypointsSocket.Output(display_name="keypoints", tooltip="K_d, the motion to draw: for Warp and Decode.")],
        )

    @classmethod
    def execute(cls, keypoints: Keypoints, rows: dict[str, Any]) -> io.NodeOutput:
        given: list[tuple[Deformation | None, float]] = [
            (rows.get(f"deformation_{number}"), rows[f"gain_{number}"]) for number in range(1, int(rows["rows"]) + 1)
        ]
        deformations = [deformation.scaled(gain) for deformation, gain in given if deformation is not None]
        return io.NodeOutput(add_deformations(keypoints, deformations))
