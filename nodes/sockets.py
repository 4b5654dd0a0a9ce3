"""What travels on links. The classes behind the names are frozen dataclasses of pctalk; web/js gives them colours."""

from comfy_api.latest import io

MotionModelSocket = io.Custom("PCTALK_MOTION_MODEL")
RendererSocket = io.Custom("PCTALK_RENDERER")
PortraitSocket = io.Custom("PCTALK_PORTRAIT")
KeypointsSocket = io.Custom("PCTALK_KEYPOINTS")
SpeechSocket = io.Custom("PCTALK_SPEECH")
DeformationSocket = io.Custom("PCTALK_DEFORMATION")
FaceLandmarksSocket = io.Custom("FACE_LANDMARKS")  # of ComfyUI's own face nodes

CATEGORY = "PC-Talk"
PACK_NAMES = ("pc-talk", "pctalk")  # what every node is also found by
