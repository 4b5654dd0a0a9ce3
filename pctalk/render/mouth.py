"""Mouths: where lips and teeth are in a portrait, and a mouth's inside painted in the portrait's colours.

Positions are crop pixels; `unit` is the face's inter-ocular distance in crop pixels, by which all lengths scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import LOWER_LIP, UPPER_LIP, lip_opening
from .openings import Outline, along, shadow_under
from .warp import smoothstep

Look = Callable[[Tensor], Tensor]  # crop positions [..., 2] to the picture's colours there, [..., 3] in 0..255

CAVITY = (52.0, 18.0, 18.0)  # the dark behind everything, under full light
SHADOW = 0.4  # what the upper lip's shadow takes of the light at the lip


def with_lip_edges(landmarks: Tensor, unit: float, look: Look) -> Tensor:
    """Landmarks [468, 3] with the inner lips where the picture has them.

    Lips that touch are brought onto the dark line between them; the lower edge of an open mouth is moved to its teeth's end.
    """
    points = landmarks.double().clone()
    upper, lower = list(UPPER_LIP), list(LOWER_LIP)
    if lip_opening(points, unit) > 0:
        outline = Outline(points[upper, :2], points[lower, :2])
        teeth = read_teeth(outline, look, unit)
        inner = lower[1:-1]
        axes = outline.to_axes(points[inner, :2])
        corners = smoothstep((outline.reach - axes[:, 0].abs()) / (0.15 * outline.reach))
        axes[:, 1] += corners * along(teeth.p, teeth.correction, axes[:, 0])
        points[inner, :2] = outline.from_axes(axes)
    if lip_opening(points, unit) == 0:
        middle = (points[upper] + points[lower]) / 2
        outline = Outline(middle[:, :2], middle[:, :2])
        p, correction = darkest_line(outline, look, unit)
        axes = outline.to_axes(middle[:, :2])
        axes[:, 1] += along(p, correction, axes[:, 0])
        middle[:, :2] = outline.from_axes(axes)
        points[upper] = points[lower] = middle
    return points.to(landmarks)


@dataclass(frozen=True)
class Teeth:
    """What an open mouth shows.

    correction [n]: from the outline's lower edge at p [n] to where the lower lip really begins; upper_share: how much of the
    opening, from the top, belongs to the skull, 1 unless the portrait shows lower teeth.
    """

    p: Tensor
    correction: Tensor
    upper_share: float


def read_teeth(outline: Outline, look: Look, unit: float) -> Teeth:
    """Find the teeth of an open mouth, which landmarks miss by a few pixels: slivers of teeth would stick to the lip.

    Teeth are told from lips, gums and tongue by redness and brightness. Columns without teeth follow their neighbours; a
    mouth without any keeps its landmarks.
    """
    p = torch.linspace(-0.9, 0.9, 37, dtype=torch.float64) * outline.reach
    upper, lower = outline.edges(p)
    step = 0.01 * unit
    count = int(float((lower - upper).max()) / step) + 12
    q = upper[:, None] + step * (torch.arange(count, dtype=torch.float64) - 3.0)  # from a little above the opening
    colours = look(outline.from_axes(torch.stack([p[:, None].expand_as(q), q], dim=-1)))
    redness, brightness = _redness(colours), colours.mean(dim=-1)
    inside = (q > upper[:, None]) & (q < lower[:, None])

    no_teeth = Teeth(p, torch.zeros_like(p), 1.0)
    if not inside.any():
        return no_teeth
    lip = float(_redness(lip_colour(look, outline, unit)))
    bright = float(brightness[inside].quantile(0.95))
    tooth = float(redness[inside & (brightness >= 0.5 * bright)].quantile(0.15))
    if lip - tooth < 0.03:
        return no_teeth
    teeth = (redness < tooth + 0.5 * (lip - tooth)) & (brightness > 0.35 * bright) & (q < (lower + 0.06 * unit)[:, None])

    correction, known = torch.zeros_like(p), torch.zeros_like(p)
    lower_rows, upper_ends, columns = 0, [], 0
    for column, row in enumerate(teeth.tolist()):
        top, bottom = float(upper[column]), float(lower[column])
        gap = bottom - top
        runs = [(float(q[column, start]), float(q[column, stop - 1]) + step) for start, stop in _runs(row)]
        # A run that starts at the lip's landmark or below it is a gleam on the lip.
        runs = [(start, end) for start, end in runs if end - start > 0.035 * unit and start < bottom - 0.02 * unit]
        if gap < 0.04 * unit:
            continue
        columns += 1
        if runs and runs[-1][1] > top + 0.55 * gap:
            correction[column], known[column] = runs[-1][1] - bottom, 1.0
        if runs and runs[-1][0] > top + 0.45 * gap:
            lower_rows += 1
        if runs and runs[0][0] < top + 0.35 * gap:
            upper_ends.append((runs[0][1] - top) / gap)
    kernel = torch.exp(-0.5 * ((p[:, None] - p[None]) / (0.09 * outline.reach)) ** 2)
    correction = (kernel @ correction) / (kernel @ known + 0.3)
    if columns == 0 or lower_rows < 0.3 * columns:
        return Teeth(p, correction, 1.0)
    share = sorted(upper_ends)[len(upper_ends) // 2] + 0.04 if upper_ends else 0.3
    return Teeth(p, correction, min(max(share, 0.2), 0.6))


def _runs(row: list[bool]) -> list[tuple[int, int]]:
    """Where a row is true: (start, stop) pairs."""
    edges = [i for i in range(len(row) + 1) if (i > 0 and row[i - 1]) != (i < len(row) and row[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def darkest_line(outline: Outline, look: Look, unit: float) -> tuple[Tensor, Tensor]:
    """Where closed lips meet: the darkest smooth line near the landmarks, as p [n] and a correction of q [n]."""
    p = torch.linspace(-1.0, 1.0, 41, dtype=torch.float64) * outline.reach
    steps = torch.linspace(-1.0, 1.0, 25, dtype=torch.float64) * 0.06 * unit
    q = sum(outline.edges(p)) / 2
    q = q[:, None] + steps
    points = outline.from_axes(torch.stack([p[:, None].expand_as(q), q], dim=-1))
    brightness = look(points).mean(dim=-1)
    cost = (brightness - brightness.amin(dim=1, keepdim=True)) / (brightness.std(dim=1, keepdim=True) + 4.0)
    cost = cost + 0.35 * (steps / (0.03 * unit)) ** 2
    # The cheapest path from corner to corner (dynamic programming), each change of offset paid for.
    change = 60.0 * ((steps[:, None] - steps[None]) / (0.06 * unit)) ** 2
    total, back = cost[0], []
    for column in cost[1:]:
        best, choice = (total[:, None] + change).min(dim=0)
        total = column + best
        back.append(choice)
    path = [int(total.argmin())]
    for choice in reversed(back):
        path.append(int(choice[path[-1]]))
    return p, steps[torch.tensor(path[::-1])]


def _redness(colours: Tensor) -> Tensor:
    """How much redder than green, relative to brightness: about 0 for teeth, 0.1 and more for lips: [...] from [..., 3]."""
    return (colours[..., 0] - colours[..., 1]) / colours.sum(dim=-1).clamp(min=30.0)


def paint(
    outline: Outline, points: Tensor, unit: float, feather: float, white: Tensor, lips: Tensor, own: tuple[Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The inside of a mouth in the portrait's colours, as textures in the portrait's own place.

    A portrait that shows its teeth keeps them, the upper ones on the skull, what lies below them on the jaw. A closed mouth
    gets a row of teeth of average size, as white as the portrait's eyes.
    Args: points [h, w, 2] positions of the texture's pixels; feather as in `layer_masks`; white, lips [3] colours 0..255; own:
    the portrait's colours at `points` [h, w, 3] and the share of its upper teeth (see `Teeth`), when its lips are apart.
    Returns: head [1, 5, h, w] and jaw [1, 5, h, w]: colour and alpha of what the skull carries (upper teeth) and of what the
    jaw carries (lower teeth, tongue, the lip's wet side), and the light that their colours already hold; cavity [3]: the dark
    behind them.
    """
    white, lips = white.to(points), lips.to(points)
    p, q = outline.to_axes(points).unbind(dim=-1)
    upper_edge, lower_edge = outline.edges(p)
    top, bottom = (float(edge) for edge in outline.edges(torch.zeros((), dtype=torch.float64)))
    cavity = points.new_tensor(CAVITY) * white.mean() / 255.0
    tongue = _tongue(p, q, bottom, unit, 0.62 * lips + 0.2 * cavity)
    lower_row = _teeth(p, -q, -bottom, unit, 0.58 * white, cavity, scale=0.68)
    # The wet inside of the lower lip, which keeps a narrow gap under the teeth from looking like an outline.
    rim = smoothstep((q - lower_edge) / (0.05 * unit) + 1.0) * smoothstep((0.1 * unit - outline.beyond(p)) / (0.1 * unit))
    inner_lip = torch.cat([(0.55 * lips + 0.2 * cavity).expand(*p.shape, 3), 0.9 * rim[..., None]], dim=-1)
    jaw = over(inner_lip, over(lower_row, tongue))
    head_light = jaw_light = torch.ones_like(p)
    if own is None:
        head = _teeth(p, q, top + 0.05 * unit, unit, white, cavity)
    else:
        colours, upper_share = own
        # Above the teeth a strip of lip stands in for the gums, should the upper lip rise farther than in the portrait.
        depth = torch.minimum(q - upper_edge + 0.05 * unit, lower_edge - q)
        inside = (depth + 3.0 * feather + outline.beyond(p)).clamp(0.0, 1.0)
        inside = inside * smoothstep((0.08 * unit - outline.beyond(p)) / (0.03 * unit))
        # The portrait's own shadow is in its colours: the one drawn over them must not count twice.
        head_light = 1.0 - SHADOW * shadow_under(q - upper_edge, unit)
        head = torch.cat([colours, inside[..., None]], dim=-1)
        if upper_share < 1.0:
            below = (q - upper_edge - upper_share * (lower_edge - upper_edge)) / (2.0 * feather)
            head[..., 3] *= (0.5 - below).clamp(0.0, 1.0)
            jaw = torch.cat([colours, (inside * (1.5 + below).clamp(0.0, 1.0))[..., None]], dim=-1)
            jaw_light = head_light
    head = torch.cat([head, head_light[..., None]], dim=-1)
    jaw = torch.cat([jaw, jaw_light[..., None]], dim=-1)
    return head.permute(2, 0, 1)[None], jaw.permute(2, 0, 1)[None], cavity


def over(front: Tensor, back: Tensor) -> Tensor:
    """One straight-alpha layer [..., 4] over another."""
    cover = front[..., 3:] + back[..., 3:] * (1.0 - front[..., 3:])
    colour = front[..., :3] * front[..., 3:] + back[..., :3] * back[..., 3:] * (1.0 - front[..., 3:])
    return torch.cat([colour / cover.clamp(min=1e-6), cover], dim=-1)


def white_of(eyes: Tensor, skin: Tensor) -> Tensor:
    """The colour of teeth in a portrait, from colours of its eyeballs [n, 3] and cheeks [m, 3]: [3].

    As bright as the brighter tenth of the eyes, at least as bright as the skin, half of their tint, a little warmer.
    """
    brightness = eyes.mean(dim=-1)
    bright = eyes[brightness >= brightness.quantile(0.9)].mean(dim=0)
    level = torch.maximum(bright.mean(), 1.1 * skin.mean()).clamp(60.0, 235.0)
    tint = 0.5 + 0.5 * (bright / bright.mean()).clamp(0.8, 1.2)
    return level * tint * torch.tensor([1.03, 1.0, 0.95], dtype=eyes.dtype)


def lip_colour(look: Look, outline: Outline, unit: float) -> Tensor:
    """The colour of the lower lip: [3]."""
    p = torch.linspace(-0.5, 0.5, 21, dtype=torch.float64) * outline.reach
    below = outline.edges(p)[1] + 0.06 * unit
    return look(outline.from_axes(torch.stack([p, below], dim=-1))).median(dim=0).values


# Half a row of teeth from the middle outward: width, length, and how far the edge stands back, in units; seen from the
# front, so the outer ones are foreshortened. An inter-ocular distance is about 63 mm.
TEETH = (
    (0.130, 0.165, 0.000),
    (0.103, 0.150, 0.012),
    (0.098, 0.160, 0.006),
    (0.075, 0.135, 0.018),
    (0.060, 0.125, 0.026),
    (0.050, 0.120, 0.032),
)


def _teeth(p: Tensor, q: Tensor, edge: float, unit: float, white: Tensor, cavity: Tensor, scale: float = 1.0) -> Tensor:
    """An upper row whose middle teeth end at q = edge: [..., 4]."""
    x, y = p.abs() / (unit * scale), (edge - q) / (unit * scale)  # y grows from the biting edge towards the gum
    y = y - 0.10 * x**2
    pixel = 1.0 / (unit * scale)
    alpha, tone = torch.zeros_like(x), torch.zeros_like(x)
    start = 0.0
    for width, length, back in TEETH:
        centre, radius = start + width / 2, 0.02
        dx = (x - centre).abs() - (width / 2 - radius - 0.003)
        dy = (y - back - length / 2).abs() - (length / 2 - radius)
        distance = torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0) - radius
        body = (0.5 - distance / (1.4 * pixel)).clamp(0.0, 1.0)
        rim = torch.exp(distance / 0.012).clamp(max=1.0)
        alpha = torch.maximum(alpha, body)
        tone = torch.maximum(tone, body * (1.0 - 0.16 * rim) * (0.92 + 0.08 * smoothstep((y - back) / 0.05)))
        start += width
    sides = 1.0 - 0.75 * smoothstep((x - 0.12) / 0.42)
    gap = 0.55 * white * torch.tensor([1.0, 0.8, 0.75], dtype=white.dtype)
    # Between teeth, not past their edges, is a darker tone of themselves rather than the cavity.
    between = smoothstep((y - 0.012) / 0.02) * smoothstep((start - x) / 0.05)
    colour = (white * tone[..., None] + gap * (1.0 - tone[..., None])) * sides[..., None] + cavity * (1.0 - sides[..., None])
    return torch.cat([colour, torch.maximum(alpha, between)[..., None]], dim=-1)


def _tongue(p: Tensor, q: Tensor, rest: float, unit: float, colour: Tensor) -> Tensor:
    """A soft mound on the floor of the mouth, its top above q = rest, the lower lip's edge."""
    x, y = p / (0.34 * unit), (q - rest - 0.02 * unit) / (0.17 * unit)
    mound = 1.0 - torch.hypot(x, y)
    alpha = 0.95 * smoothstep(mound / 0.55)
    light = 0.6 + 0.25 * torch.exp(-((x / 0.6) ** 2) - ((y + 0.4) / 0.35) ** 2) - 0.15 * torch.exp(-((x / 0.07) ** 2))
    return torch.cat([colour * light[..., None], alpha[..., None]], dim=-1)
