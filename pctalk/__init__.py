"""PC-Talk: talking faces whose every motion is added to 21 implicit keypoints. The engine, without ComfyUI."""

__version__ = "0.1.0"
