"""A recording as the motion networks hear it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..pctalk.checkpoints import MotionModel
from ..pctalk.speech import encode_speech
from .host import Handle, Progress, intermediate_device
from .sockets import CATEGORY, PACK_NAMES, MotionModelSocket, SpeechSocket


class EncodeSpeech(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PCTalk_EncodeSpeech",
            display_name="Encode Speech",
            category=CATEGORY,
            description="Turns a recording into what the motion networks hear, 25 times a second, and measures its loudness.",
            search_aliases=[*PACK_NAMES, "audio encoder", "speech features", "voice", "wav2lip"],
            inputs=[
                MotionModelSocket.Input("motion_model", tooltip="Use the same motion model here and in LAC and EMC."),
                io.Audio.Input(
                    "audio",
                    tooltip="Speech at any sample rate, mono or stereo, at least 0.1 s. The video lasts as long as it does.",
                ),
            ],
            outputs=[SpeechSocket.Output(display_name="speech", tooltip="For LAC and EMC.")],
        )

    @classmethod
    def execute(cls, motion_model: Handle[MotionModel], audio: dict[str, Any] | None) -> io.NodeOutput:
        if audio is None:
            raise ValueError("There is no audio: what it comes from has no sound track, connect a recording instead.")
        motion_model.load()
        waveform = audio["waveform"].to(intermediate_device())
        encoder = motion_model.model.audio_encoder
        return io.NodeOutput(encode_speech(encoder, waveform, audio["sample_rate"], progress=Progress()))
