"""The LivePortrait renderer: the published networks behind the two calls of `Renderer`; the quality path.

Once a source frame: F makes a feature volume, M reads K_s. Once a frame: S corrects K_d so that shoulders stay, W warps the
volume, G draws it. Networks run in their inference forms and in the precision they are given; keypoints stay in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import load_liveportrait
from ..faces import FaceFinder, PasteBack, crop_image, prepare_images, soft_mask
from ..keypoints import Keypoints, rotation_matrix
from ..networks.liveportrait.appearance import AppearanceFeatureExtractor
from ..networks.liveportrait.generator import SpadeGenerator
from ..networks.liveportrait.inference import fused_appearance, fused_generator, fused_motion, fused_warping
from ..networks.liveportrait.motion import Motion, MotionExtractor
from ..networks.liveportrait.retargeting import StitchingRetargeting
from ..networks.liveportrait.warping import WarpingModule
from . import Chunk, Portrait
from .tracking import find_faces, steady_crops

log = logging.getLogger(__name__)

INPUT_SIZE = 256  # of F and M
READ_BATCH = 16  # source frames that M reads at once
CPU_BATCH, GPU_BATCH = 1, 8  # frames drawn at once unless the caller chooses; more would only leave a CPU's cache
FRAME_BYTES = 300_000_000  # that drawing a frame takes in float32, about
PASTED_BYTES = 1 << 27  # of whole pictures made at once
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LivePortraitRenderer:
    """Draws portraits with the LivePortrait networks; see the module.

    Takes the plain networks with their weights loaded and keeps their inference forms.
    Args: dtype: precision of W and G, and see `appearance_dtype`; M and S, which are small and decide where things are, stay
    in float32; device: what they are to run on, which decides between inference forms (moving them there is the caller's).
    """

    name = "liveportrait"

    def __init__(
        self,
        face_finder: FaceFinder,
        appearance: AppearanceFeatureExtractor,
        motion: MotionExtractor,
        warping: WarpingModule,
        generator: SpadeGenerator,
        stitching: StitchingRetargeting,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        winograd = torch.device(device).type == "cpu" and dtype == torch.float32
        self.face_finder = face_finder
        self.appearance = fused_appearance(appearance).to(appearance_dtype(dtype))
        self.motion = fused_motion(motion)
        self.warping = fused_warping(warping, winograd=winograd).to(dtype)
        self.generator = fused_generator(generator, winograd=winograd).to(dtype)
        self.stitching = stitching.eval().requires_grad_(False)
        self.networks: dict[str, nn.Module] = {
            "face_finder": self.face_finder,
            "appearance": self.appearance,
            "motion": self.motion,
            "warping": self.warping,
            "generator": self.generator,
            "stitching": self.stitching,
        }

    @classmethod
    def from_folder(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> LivePortraitRenderer:
        """With the files in a folder, see `checkpoints.load_liveportrait`, whose errors it raises; on the CPU."""
        return cls(FaceFinder.from_assets(), **load_liveportrait(folder), dtype=dtype, device=device)

    def to(self, device: torch.device | str) -> LivePortraitRenderer:
        """The same renderer with its networks moved (in place, as nn.Module.to does)."""
        for network in self.networks.values():
            network.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def working_memory(self, device: torch.device, batch: int = 0) -> int:
        """See `Renderer.working_memory`."""
        precision = next(self.generator.parameters()).dtype
        return _batch(batch, device) * FRAME_BYTES * precision.itemsize // torch.float32.itemsize

    @torch.no_grad()
    def extract(
        self, images: Tensor, *, face_index: int = 0, crop_scale: float = 2.3, landmarks: Sequence | None = None
    ) -> tuple[Portrait, Keypoints]:
        """See `Renderer.extract`. Portrait.features: pictures uint8 [N, 256, 256, 3], what F and M see; keypoints K_s
        [N, 21, 3]."""
        frames = prepare_images(images).cpu()
        crops = steady_crops(find_faces(self.face_finder, frames, face_index, landmarks), crop_scale)
        pictures = torch.stack([_halved(crop_image(frame, crop)) for frame, crop in zip(frames, crops, strict=True)])
        keypoints = self._read(pictures)
        features = {"pictures": pictures, "keypoints": keypoints.posed()}
        return Portrait(self.name, frames, tuple(crops), features), keypoints

    @torch.no_grad()
    def render(
        self, portrait: Portrait, keypoints: Keypoints, *, paste_back: bool = True, stitching: bool = True, batch: int = 0
    ) -> Iterator[Chunk]:
        """See `Renderer.render`. A video's last frame is held when the track is longer.

        Chunks are on the CPU, and smaller than `batch` once memory has run out.
        Raises ValueError for a portrait of another renderer, MemoryError when not even one frame fits.
        """
        portrait.check_made_by(self.name)
        driving = keypoints.posed()
        batch = _batch(batch, self.device)
        source, canvas = _Source(self, portrait), _Canvas(portrait, self.device) if paste_back else None
        start = 0
        while start < len(driving):
            frames = list(range(start, min(start + batch, len(driving))))
            drawn = self._draw(source, driving[frames], frames, stitching)
            if drawn is None:
                if batch == 1:
                    raise MemoryError(
                        f"Memory ran out while drawing a single frame on {self.device}: free memory, or choose fp16 or bf16."
                    )
                batch //= 2
                log.warning("Memory ran out: drawing %d frame%s at a time now.", batch, "s" if batch > 1 else "")
                continue
            if canvas is None:
                yield Chunk(drawn.cpu(), soft_mask(drawn.shape[1]).expand(len(drawn), -1, -1))
            else:
                yield canvas.paste(drawn, frames)
            start += len(frames)

    def _draw(self, source: _Source, driving: Tensor, frames: list[int], stitching: bool) -> Tensor | None:
        """Crops uint8 [b, 512, 512, 3] of some frames driven by K_d [b, 21, 3]; None when memory runs out."""
        try:
            volume, keypoints = source.of(frames)
            driving = driving.to(self.device)
            if stitching:
                driving = self.stitching.stitch(keypoints.expand_as(driving), driving)
            picture = self.generator(self.warping(volume, keypoints, driving).feature)
            return picture.float().mul_(255.0).round_().byte().permute(0, 2, 3, 1).contiguous()
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            return None

    def _read(self, pictures: Tensor) -> Keypoints:
        """Keypoints of pictures uint8 [N, 256, 256, 3].

        M reads slightly different canonical keypoints from every frame of a video. Their mean is kept, and what a frame
        differs by becomes expression, so that K is exactly what M read.
        """
        parts = [self.motion(self._inputs(part)) for part in pictures.split(READ_BATCH)]
        motion = Motion(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))
        rotation = rotation_matrix(motion.pitch, motion.yaw, motion.roll)
        canonical = motion.canonical.mean(dim=0)
        expression = motion.expression + (motion.canonical - canonical) @ rotation
        return Keypoints(canonical, rotation, motion.scale, motion.translation, expression)

    def _inputs(self, pictures: Tensor) -> Tensor:
        """uint8 [b, 256, 256, 3] to float [b, 3, 256, 256], RGB 0..1, where the networks are."""
        return pictures.to(self.device).permute(0, 3, 1, 2).float() / 255.0


def _batch(batch: int, device: torch.device) -> int:
    """Frames drawn at once: what the caller chose, or for 0 what suits the device."""
    return batch or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)


def chosen_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """The precision of W and G by its name in `PRECISIONS`, or for auto float16 on CUDA and float32 elsewhere.

    Raises ValueError for float16 on a CPU, which has no fast arithmetic for it.
    """
    kind = torch.device(device).type
    if precision == "auto":
        return torch.float16 if kind == "cuda" else torch.float32
    if precision == "fp16" and kind == "cpu":
        raise ValueError("LivePortrait draws in fp16 on a GPU only, and this is a CPU: choose auto, fp32 or bf16.")
    return PRECISIONS[precision]


def appearance_dtype(dtype: torch.dtype) -> torch.dtype:
    """F's precision beside W and G in `dtype`: beside bfloat16 it stays in float32, where its rounding would be the largest."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


class _Source:
    """F's volume and K_s of source frames, made once a frame and kept while the frame stays the same."""

    def __init__(self, renderer: LivePortraitRenderer, portrait: Portrait) -> None:
        self.renderer = renderer
        self.pictures = portrait.features["pictures"]
        self.keypoints = portrait.features["keypoints"].to(renderer.device)
        self.rows: list[int] = []
        self.volume: Tensor | None = None

    def of(self, frames: list[int]) -> tuple[Tensor, Tensor]:
        """Volume [1 or b, 32, 16, 64, 64] and K_s [1 or b, 21, 3] for frames of the result: 1 where all have one source."""
        rows = [min(frame, len(self.pictures) - 1) for frame in frames]
        if rows[0] == rows[-1]:
            rows = rows[:1]
        if rows != self.rows:
            images = self.renderer._inputs(self.pictures[rows])
            self.volume = self.renderer.appearance(images.to(self.renderer.appearance.second.weight.dtype))
            self.rows = rows
        return self.volume, self.keypoints[rows]


class _Canvas:
    """The whole source pictures that crops are pasted into."""

    def __init__(self, portrait: Portrait, device: torch.device) -> None:
        self.portrait = portrait
        self.device = device
        self.row = -1
        self.paste_back: PasteBack | None = None

    def paste(self, drawn: Tensor, frames: list[int]) -> Chunk:
        """Crops uint8 [b, 512, 512, 3] in their pictures, on the CPU."""
        pictures, masks = [], []
        for row, crops in self._by_source(drawn, frames):
            if row != self.row:
                self.paste_back = PasteBack(self.portrait.crops[row], self.portrait.frames[row].to(self.device))
                self.row = row
            together = max(1, PASTED_BYTES // self.portrait.frames[row].numel())
            pictures += [self.paste_back(part).cpu() for part in crops.split(together)]
            masks.append(self.paste_back.mask.cpu().expand(len(crops), -1, -1))
        return Chunk(torch.cat(pictures), torch.cat(masks) if len(masks) > 1 else masks[0])

    def _by_source(self, drawn: Tensor, frames: list[int]) -> Iterator[tuple[int, Tensor]]:
        """Runs of crops that have the same source frame."""
        rows = [min(frame, len(self.portrait.frames) - 1) for frame in frames]
        for row, run in groupby(range(len(rows)), key=rows.__getitem__):
            yield row, drawn[list(run)]


def _halved(crop: Tensor) -> Tensor:
    """By area, as published: uint8 [512, 512, 3] to [256, 256, 3]."""
    pooled = F.adaptive_avg_pool2d(crop.permute(2, 0, 1).float(), INPUT_SIZE)
    return pooled.round().byte().permute(1, 2, 0)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a device said that memory ran out: CUDA by the error's type, MPS and CPUs only in words."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(part in str(error) for part in words)
