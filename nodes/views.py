"""Look inside: keypoints over the portrait, and motion over time."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pctalk.drawing import draw_keypoints, plot_deformation
from ..pctalk.keypoints import Deformation, Keypoints
from ..pctalk.render import Portrait
from .host import Progress, empty_images, intermediate_device
from .sockets import CATEGORY, PACK_NAMES, DeformationSocket, KeypointsSocket, PortraitSocket


class DrawKeypoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_DrawKeypoints",
            display_name="Draw Keypoints",
            category=CATEGORY,
            description="Shows the 21 keypoints over the face crop, coloured by region: lips red, eyes blue, brows yellow.",
            search_aliases=[*PACK_NAMES, "visualize keypoints", "debug", "preview", "landmarks"],
            inputs=[
                PortraitSocket.Input("portrait", tooltip="From Extract Keypoints."),
                KeypointsSocket.Input(
                    "keypoints", tooltip="The portrait's own, or the sum from Add Deformations: one picture a frame."
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="One picture per frame, 512 x 512.")],
        )

    @classmethod
    def execute(cls, portrait: Portrait, keypoints: Keypoints) -> io.NodeOutput:
        size = portrait.crops[0].size
        images, _ = empty_images(keypoints.frames, size, size, "shorten the audio")
        progress = Progress()
        for index, picture in enumerate(draw_keypoints(portrait, keypoints)):
            images[index] = picture / 255.0
            progress(index + 1, keypoints.frames)
        return io.NodeOutput(images)


class PlotDeformation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_PlotDeformation",
            display_name="Plot Deformation",
            category=CATEGORY,
            description="Draws how far lips, eyes, brows and the rest of the face move over time, under the sound.",
            search_aliases=[*PACK_NAMES, "visualize motion", "curve", "graph", "debug", "waveform"],
            inputs=[
                DeformationSocket.Input("deformation", tooltip="From LAC, EMC or Mix Emotions by Region."),
                io.Audio.Input("audio", optional=True, tooltip="The recording, to see the motion under its waveform."),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The plot, 1280 x 720.")],
        )

    @classmethod
    def execute(cls, deformation: Deformation, audio: dict[str, Any] | None = None) -> io.NodeOutput:
        sound = {} if audio is None else {"waveform": audio["waveform"][0], "sample_rate": audio["sample_rate"]}
        picture = plot_deformation(deformation, **sound)
        return io.NodeOutput((picture / 255.0).to(intermediate_device())[None])
