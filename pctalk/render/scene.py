"""One source frame of a portrait, prepared once and drawn with any motion.

The face is one smooth field of displacements. Over it lie the two eyes and the mouth, each as two layers of skin with an
inside (see `openings`), whose fields blend into the face's. Everything per frame is a matrix product or a look-up, for a group
of frames together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Portrait, mouth, openings
from .basis import LOWER_LIP, NUM_LANDMARKS, UPPER_LIP, Basis
from .canvas import Canvas, Patch, look_up
from .motion import LandmarkMotion, Motion, soft_limit
from .openings import LEFT_LOWER_LID, LEFT_UPPER_LID, RIGHT_LOWER_LID, RIGHT_UPPER_LID, Outline
from .shape import FaceShape, Field
from .warp import Lattice, pull_back, smoothstep, spline_weights

# Frames drawn together: at most GROUP, fewer when what moves of them has more than GROUP_PIXELS in all. It depends on the
# portrait and on whether the head moves, and the last group is filled up, so no byte depends on how many are asked for at once.
GROUP = 8
GROUP_PIXELS = 4_000_000
FACE_STEP = 8.0  # crop pixels between the nodes of the face's field; a multiple of those of the openings
FEATHER = 0.6  # crop pixels: half the width of an edge between layers
EYES = ((LEFT_UPPER_LID, LEFT_LOWER_LID), (RIGHT_UPPER_LID, RIGHT_LOWER_LID))
CHEEKS = (50, 101, 205, 280, 330, 425)

LASHES = 0.05  # units beside a lid's edge that move with it
WIDER_EYE = (0.2, 0.4)  # how much an eyeball is stretched under lids that part: freely up to, never beyond
GAZE_COORDINATES = (3 * 11, 3 * 15)  # of an expression: the x of the eyes' keypoints
GAZE_GAIN, GAZE_LIMIT = 6.0, (0.05, 0.09)  # units that an iris moves sideways per unit of them; freely up to, never beyond
LOWER_LIP_MIDDLE, JAW_SHARE = (87, 14, 317), 0.88  # lower teeth and tongue move with the lip's edge, a little less


@dataclass(frozen=True)
class Zone:
    """Where an opening's own layers hold and how finely: lengths in units, but for step (crop pixels between nodes).

    height: above and below the middle; fade (across, down): over which the layers' fields turn into the face's; drop: how
    much farther down the lower edge may come; spacing: between landmarks that splines run through.
    """

    step: float
    height: float
    fade: tuple[float, float]
    drop: float
    spacing: float


EYE_ZONE = Zone(step=2.0, height=0.16, fade=(0.14, 0.12), drop=0.0, spacing=0.02)
MOUTH_ZONE = Zone(step=4.0, height=0.28, fade=(0.22, 0.20), drop=0.35, spacing=0.035)


class Scene:
    """A source frame on a canvas; `group`: how many frames are drawn together."""

    def __init__(
        self, portrait: Portrait, index: int, motion: Motion, basis: Basis, paste_back: bool, device: torch.device
    ) -> None:
        """Args: index of the source frame; motion: all that will be drawn with it, which tells how much room it needs."""
        self.canvas = Canvas.of(portrait, index, paste_back)
        self.shape = FaceShape(portrait.features["landmarks"][index].cpu(), portrait.crops[index].size, basis)
        self.device = device
        self.turns = motion.turns
        self.landmarks = LandmarkMotion(self.shape.points, self.shape.unit, basis, device)

        low, high = self.shape.box(self.turns)
        self.patch = Patch.covering(self.canvas, low, high, FACE_STEP, 0.3 * self.shape.unit, device)
        lattice = Lattice.covering(low - FACE_STEP, high + FACE_STEP, FACE_STEP)
        # Edges of openings belong to their layers; the face without them is smooth.
        edges = {landmark for ring in (UPPER_LIP, LOWER_LIP, *EYES[0], *EYES[1]) for landmark in ring[1:-1]}
        controls = self.shape.thinned([i for i in range(NUM_LANDMARKS) if i not in edges], 0.03)
        self.field = self.shape.field(lattice, controls, device)
        self.turning = self.shape.turning(lattice, device) if self.turns else None
        self.background = self.canvas.picture.to(device)
        self.group = max(1, min(GROUP, GROUP_PIXELS // (self.patch.width * self.patch.height)))

        room = self._head_travel(motion)
        self.openings: list[Opening] = [Eye(self, upper, lower, room) for upper, lower in EYES]
        self.openings.append(Mouth(self, basis, room))

    def _head_travel(self, motion: Motion) -> float:
        """The farthest that the head's own motion carries any landmark, in crop pixels."""
        places = (self.shape.points - self.shape.pivot).float()
        low, high = places.amin(dim=0), places.amax(dim=0)
        corners = torch.cartesian_prod(*torch.stack([low, high]).unbind(dim=1))
        return float((corners @ motion.turn + motion.shift[:, None]).norm(dim=-1).max())

    @torch.no_grad()
    def draw(self, motion: Motion) -> Tensor:
        """At most `group` frames: uint8 [b, H, W, 3] on the CPU."""
        count = motion.frames
        motion = motion.filled(self.group).to(self.device)
        displacement = self.landmarks(motion.change)
        expression = self.field(displacement)
        field = self.turning(expression, motion.turn, motion.shift) if self.turning else expression
        offset = pull_back(field, self.field.lattice, self.patch.nodes)
        colours = look_up(self.patch.texture, self.patch.grid(offset))
        for opening in self.openings:
            place, within = self.patch.shared(opening.patch)
            drawn, cover = opening.draw(displacement, expression, motion)
            # A head that turns needs boxes so large that they overlap: each is laid in only where the opening is.
            colours[place] = torch.lerp(colours[place], drawn[within], cover[within]) if self.turns else drawn[within]
        frames = self.background.expand(self.group, -1, -1, -1).clone()
        self.patch.put(frames, colours)
        return frames[:count].cpu()


class Opening:
    """An eye or the mouth: an upper layer of skin over a lower one over an inside."""

    zone: Zone

    def __init__(self, scene: Scene, upper: Sequence[int], lower: Sequence[int], room: float) -> None:
        """Args: upper, lower: landmarks of the edges; room: crop pixels that the head may carry the opening away."""
        shape, device = scene.shape, scene.device
        self.upper_edge, self.lower_edge = tuple(upper), tuple(lower)
        self.outline = Outline(shape.at(upper), shape.at(lower))
        self.feather = max(FEATHER, 0.6 / scene.canvas.density)
        edges = (shape.at(upper).mean(dim=0) + shape.at(lower).mean(dim=0)) / 2
        self.middle = (self.outline.origin + edges) / 2

        low, high = self._box(shape, room)
        lattice = Lattice.covering(low, high, self.zone.step)
        nodes = lattice.nodes().reshape(-1, 2)
        own = self._blend(shape, nodes)
        self.upper_field = self._field(shape, lattice, own, device, is_upper=True)
        self.lower_field = self._field(shape, lattice, own, device, is_upper=False)
        self.turning = shape.turning(lattice, device) if scene.turns else None
        self.face_share = (1.0 - own).reshape(1, 1, lattice.rows, lattice.columns).float().to(device)
        self.face_places = scene.field.lattice.normalise(lattice.nodes())[None].float().to(device)

        self.patch = Patch.covering(scene.canvas, low, high, self.zone.step, 0.2 * shape.unit + room, device)
        centre = shape.points[[ring[len(ring) // 2] for ring in (upper, lower)], 2].mean()  # depth of what lies inside
        self.centre = (torch.cat([self.middle, centre[None]]) - shape.pivot).float().to(device)
        self.pixels = (self.patch.pixels(scene.canvas) - self.middle).float().to(device)
        upper_mask, lower_mask, shadow = openings.layer_masks(
            self.outline, self.patch.places, shape.unit, self.feather, self._overlap(scene)
        )
        cover = smoothstep(self._blend(shape, self.patch.places) / 0.1)
        masks = torch.stack([upper_mask, shadow, cover, lower_mask])[None].to(device)
        self.upper_texture = torch.cat([self.patch.texture, masks[:, :3]], dim=1)  # colours, alpha, shadow, cover
        self.lower_texture = torch.cat([self.patch.texture, masks[:, 3:]], dim=1)  # colours, alpha

    def _overlap(self, scene: Scene) -> float:
        """Crop pixels that the lower layer reaches under the upper edge."""
        return 0.0

    def _without(self, shape: FaceShape, is_upper: bool) -> set[int]:
        """Landmarks that one layer's field must not follow, those of the other layer first of all."""
        raise NotImplementedError

    def _controls(self, shape: FaceShape, landmarks: list[int], is_upper: bool) -> tuple[list[int], Tensor]:
        """Landmarks and the positions [n, 2] at which their displacements hold."""
        return landmarks, shape.at(landmarks)

    def inside(self, displacement: Tensor, motion: Motion, upper: Tensor) -> Tensor:
        """What shows between the layers: [b, 3, height, width]. upper: the upper layer as drawn."""
        raise NotImplementedError

    def _extent(self, shape: FaceShape) -> tuple[Tensor, Tensor]:
        """Half the size of the part that is the layers' own, and of all that they touch: [2] each."""
        own = torch.tensor([self.outline.reach + 0.05 * shape.unit, self.zone.height * shape.unit], dtype=torch.float64)
        return own, own + shape.unit * torch.tensor(self.zone.fade, dtype=torch.float64)

    def _box(self, shape: FaceShape, room: float) -> tuple[Tensor, Tensor]:
        _, extent = self._extent(shape)
        extent = extent + room + 0.04 * shape.unit
        drop = torch.tensor([0.0, self.zone.drop * shape.unit], dtype=torch.float64)
        low, high = self.middle - extent, self.middle + extent + drop
        return low.clamp(min=0.0, max=shape.crop_size - 2.0), high.clamp(min=2.0, max=float(shape.crop_size))

    def _blend(self, shape: FaceShape, places: Tensor) -> Tensor:
        """How much of a place [..., 2] is the layers' own motion, 1 within and 0 where the face's alone holds: [...]."""
        own, extent = (size.to(places) for size in self._extent(shape))
        axes = ((places - self.middle.to(places)) @ self.outline.axes.T.to(places)).abs()
        return smoothstep(1.0 - ((axes - own) / (extent - own)).clamp(min=0.0).norm(dim=-1))

    def _field(self, shape: FaceShape, lattice: Lattice, own: Tensor, device: torch.device, is_upper: bool) -> Field:
        _, extent = self._extent(shape)
        near = ((shape.points[:, :2] - self.middle).abs() < extent + 0.15 * shape.unit).all(dim=1)
        without = self._without(shape, is_upper)
        landmarks = dict.fromkeys([*self.upper_edge, *self.lower_edge, *torch.nonzero(near).flatten().tolist()])
        landmarks = shape.thinned([i for i in landmarks if i not in without], self.zone.spacing)
        controls, places = self._controls(shape, landmarks, is_upper)
        nodes = lattice.nodes().reshape(-1, 2)
        weights = spline_weights(places, nodes) * (own * shape.expression_window(nodes))[:, None]
        return Field(lattice, weights.float().to(device), torch.tensor(controls, device=device))

    def draw(self, displacement: Tensor, expression: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
        """Colours of the patch [b, 3, height, width], and where in it the opening is [b, 1, height, width].

        Args: displacement [b, 468, 2] of landmarks; expression [b, 2, rows, columns]: the face's field before the head turns.
        """
        face = F.grid_sample(
            expression, self.face_places.expand(len(expression), -1, -1, -1), padding_mode="border", align_corners=True
        )
        face = face * self.face_share
        upper = self._layer(self.upper_field(displacement) + face, self.upper_texture, motion)
        lower = self._layer(self.lower_field(displacement) + face, self.lower_texture, motion)
        colours = torch.lerp(self.inside(displacement, motion, upper), lower[:, :3], lower[:, 3:4])
        return torch.lerp(colours, upper[:, :3], upper[:, 3:4]), upper[:, 5:6]

    def _layer(self, field: Tensor, texture: Tensor, motion: Motion) -> Tensor:
        if self.turning:
            field = self.turning(field, motion.turn, motion.shift)
        return look_up(texture, self.patch.grid(pull_back(field, self.upper_field.lattice, self.patch.nodes)))

    def _carried(self, motion: Motion, extra: Tensor | None = None, stretch: Tensor | None = None) -> Tensor:
        """Where the patch's pixels lie on something that the head carries in the opening: a grid [b, height, width, 2].

        extra [b, 2]: a displacement of its own; stretch [b]: a vertical stretch of its own.
        """
        identity = torch.eye(2, device=self.pixels.device)
        linear = motion.turn[:, :2] + identity
        moved = self.centre @ motion.turn + motion.shift
        if extra is not None:
            moved = moved + extra
        if stretch is not None:
            linear = torch.stack([linear[..., 0], linear[..., 1] * stretch[:, None]], dim=-1)
        back = torch.linalg.inv(linear)
        return self.patch.grid_of_pixels(self.pixels @ (back - identity) - moved[:, None] @ back)


class Eye(Opening):
    """Lids over an eyeball, which stays where it is in the head. Lids that part more than in the portrait stretch it, and the
    iris can look aside: the middle of the eyeball moves, its corners hold."""

    zone = EYE_ZONE

    def __init__(self, scene: Scene, upper: Sequence[int], lower: Sequence[int], room: float) -> None:
        super().__init__(scene, upper, lower, room)
        self.upper_lid, self.lower_lid = list(upper[1:-1]), list(lower[1:-1])
        gap = (scene.shape.at(self.lower_lid) - scene.shape.at(self.upper_lid))[:, 1].mean()
        self.gap = max(float(gap), 1.0)
        self.unit = scene.shape.unit
        p, _ = self.outline.to_axes(self.patch.pixels(scene.canvas)).unbind(dim=1)
        aside = (1.0 - (p / self.outline.reach) ** 2).clamp(min=0.0) ** 2
        self.aside = (aside[:, None] * self.outline.axes[0]).float().to(scene.device)  # [height * width, 2]

    def _without(self, shape: FaceShape, is_upper: bool) -> set[int]:
        axes = self.outline.to_axes(shape.points[:, :2])
        upper, lower = self.outline.edges(axes[:, 0])
        above, below = (upper - axes[:, 1]) / shape.unit, (axes[:, 1] - lower) / shape.unit
        near = (axes[:, 0].abs() < self.outline.reach) & (axes[:, 1].abs() < 0.35 * shape.unit)
        in_upper_half = axes[:, 1] < (upper + lower) / 2
        if is_upper:  # not the lower lid, and not the row of landmarks in the lashes, which move with the edge (`_controls`)
            out = (~in_upper_half & (below < 0.10)) | ((above > 0.0) & (above < 2.0 * LASHES))
            own, other = self.upper_edge, self.lower_edge
        else:
            out = (in_upper_half & (above < 0.06)) | ((below > 0.0) & (below < 1.5 * LASHES))
            own, other = self.lower_edge, self.upper_edge
        return (set(torch.nonzero(near & out).flatten().tolist()) | set(other[1:-1])) - set(own)

    def _controls(self, shape: FaceShape, landmarks: list[int], is_upper: bool) -> tuple[list[int], Tensor]:
        """Lashes and the lid's rim keep their shape: what lies just outside the edge moves as the edge does."""
        rim = [i for i in (self.upper_edge if is_upper else self.lower_edge)[1:-1] if i in landmarks]
        outward = (-LASHES if is_upper else LASHES) * shape.unit * self.outline.axes[1]
        return landmarks + rim, torch.cat([shape.at(landmarks), shape.at(rim) + outward])

    def inside(self, displacement: Tensor, motion: Motion, upper: Tensor) -> Tensor:
        opened = (displacement[:, self.lower_lid, 1] - displacement[:, self.upper_lid, 1]).mean(dim=1) / self.gap
        stretch = 1.0 + soft_limit(opened.clamp(min=0.0)[:, None], *WIDER_EYE)[:, 0]
        gaze = GAZE_GAIN * self.unit * motion.change[:, GAZE_COORDINATES].mean(dim=1, keepdim=True)
        gaze = soft_limit(gaze, *(self.unit * limit for limit in GAZE_LIMIT))
        grid = self._carried(motion, stretch=stretch)
        return look_up(self.patch.texture, grid - self.patch.grid_step(gaze[:, None] * self.aside))


class Mouth(Opening):
    """Lips over teeth and tongue."""

    zone = MOUTH_ZONE

    def __init__(self, scene: Scene, basis: Basis, room: float) -> None:
        self.lips = set(basis.region_lips.tolist())
        super().__init__(scene, UPPER_LIP, LOWER_LIP, room)
        shape, look = scene.shape, scene.canvas.look
        lids = [(shape.at(upper[1:-1]), shape.at(lower[1:-1])) for upper, lower in EYES]
        eyeballs = torch.cat([torch.lerp(upper, lower, height) for upper, lower in lids for height in (0.3, 0.5, 0.7)])
        white = mouth.white_of(look(eyeballs), look(shape.at(CHEEKS)))
        own = None
        if scene.landmarks.opening > 0:
            share = mouth.read_teeth(self.outline, look, shape.unit).upper_share
            own = self.patch.texture[0].permute(1, 2, 0).cpu(), share
        lips = mouth.lip_colour(look, self.outline, shape.unit)
        painted = mouth.paint(self.outline, self.patch.places, shape.unit, self.feather, white, lips, own)
        self.head_texture, self.jaw_texture, cavity = (part.float().to(scene.device) for part in painted)
        self.cavity = cavity[None, :, None, None]

    def _overlap(self, scene: Scene) -> float:
        # Closed lips leave no gap at all; open ones already have the portrait's own inside between them.
        return 1.5 * self.feather if scene.landmarks.opening == 0 else 0.0

    def _without(self, shape: FaceShape, is_upper: bool) -> set[int]:
        axes = self.outline.to_axes(shape.points[:, :2])
        upper, lower = self.outline.edges(axes[:, 0])
        below = (axes[:, 1] >= (upper + lower) / 2).tolist()
        if is_upper:
            return ({i for i in self.lips if below[i]} | set(LOWER_LIP)) - set(UPPER_LIP)
        return ({i for i in self.lips if not below[i]} | set(UPPER_LIP)) - set(LOWER_LIP)

    def inside(self, displacement: Tensor, motion: Motion, upper: Tensor) -> Tensor:
        light = 1.0 - mouth.SHADOW * upper[:, 4:5]
        jaw_moves = JAW_SHARE * displacement[:, LOWER_LIP_MIDDLE].mean(dim=1)
        jaw = look_up(self.jaw_texture, self._carried(motion, extra=jaw_moves))
        head = look_up(self.head_texture, self._carried(motion))
        colours = self.cavity * light
        for part in (jaw, head):
            # What the portrait itself shows holds its own light; a lip that comes lower only darkens it.
            colours = torch.lerp(colours, part[:, :3] * (light / part[:, 4:5]).clamp(max=1.0), part[:, 3:4])
        return colours
