"""What the nodes ask of ComfyUI: to hold and place models, to show progress, to be interrupted, to say what fits in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import comfy.model_patcher
import comfy.utils
import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

Model = TypeVar("Model")


@dataclass(frozen=True)
class Handle(Generic[Model]):
    """A loaded model on a link. ComfyUI decides where its networks live; nodes linked to one loader share one copy."""

    model: Model
    patchers: tuple[ModelPatcher, ...] = field(repr=False)

    @classmethod
    def of(cls, model: Model, networks: dict[str, nn.Module]) -> Handle[Model]:
        # CoreModelPatcher is looked up now: ComfyUI replaces it at start when it manages memory dynamically.
        patcher = comfy.model_patcher.CoreModelPatcher
        run_on, wait_on = run_device(), model_management.unet_offload_device()
        return cls(model, tuple(patcher(network, run_on, wait_on) for network in networks.values()))

    def get_models(self) -> list[ModelPatcher]:
        return list(self.patchers)

    def load(self, working_memory: int = 0) -> torch.device:
        """Bring the networks to the device they run on, which is returned, and free as many bytes there for what they do."""
        # In full: ComfyUI can run a network half loaded only when all its layers are of comfy.ops.
        model_management.load_models_gpu(self.get_models(), working_memory, force_full_load=True)
        return run_device()


def run_device() -> torch.device:
    """Where ComfyUI runs networks."""
    return model_management.get_torch_device()


class Progress:
    """The bar under a node. Called between frames or chunks, which is also where the user's interrupt takes effect."""

    def __init__(self) -> None:
        self._bar: comfy.utils.ProgressBar | None = None

    def __call__(self, done: int, total: int) -> None:
        model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(total)
        self._bar.update_absolute(done, total)


def intermediate_device() -> torch.device:
    """Where results wait for the next node."""
    return model_management.intermediate_device()


def empty_images(frames: int, height: int, width: int, remedy: str, *, with_mask: bool = False) -> tuple[Tensor, Tensor | None]:
    """Room for an IMAGE [T, H, W, 3] and a MASK [T, H, W], float 0..1, not yet filled.

    Raises ValueError when they don't fit in memory, before an hour of rendering shows it.
    """
    device = intermediate_device()
    needed = frames * height * width * (4 if with_mask else 3) * 4
    free = model_management.get_free_memory(device)
    if needed > free:
        raise ValueError(
            f"{frames} frames of {width} x {height} take {needed / 2**30:.1f} GiB as a ComfyUI image, "
            f"{free / 2**30:.1f} GiB are free: {remedy}."
        )
    images = torch.empty(frames, height, width, 3, device=device)
    return images, torch.empty(frames, height, width, device=device) if with_mask else None
