"""Drawing: label positions, pixels that must not change, and heat maps that match the attention."""

import math
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFont

from conditional_detr.inference.drawing import (
    BOX_COLOUR,
    class_colour,
    draw_attention,
    draw_boxes,
    heat_colours,
    overlay_heat,
)
from conditional_detr.inference.label_placement import _candidates, fit_label, place_labels


def noise(width: int, height: int) -> Image.Image:
    """Return an image of random pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """Return where two images differ, (H, W) bool."""
    return (np.asarray(before) != np.asarray(after)).any(-1)


def lab(colours: np.ndarray) -> np.ndarray:
    """Convert colours (K, 3) in 0..255 to CIELAB by PIL's colour management."""
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    image = ImageCms.applyTransform(Image.fromarray(colours.astype(np.uint8)[None]), transform)
    lightness, a, b = np.asarray(image)[0].T
    return np.stack([lightness * (100 / 255), a.view(np.int8), b.view(np.int8)], axis=-1)


def shared_area(first, second) -> int:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def test_each_class_has_its_own_colour():
    colours = lab(np.array([class_colour(label) for label in range(91)]))
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + np.diag(np.full(91, np.inf))
    assert apart.min() > 8  # 2.3 is a just noticeable difference
    for steps in range(1, 6):
        assert np.diag(apart, steps).min() > 17
    assert apart[:7, :7].min() > 45
    assert colours[:, 0].min() > 30
    assert np.ptp(colours[:, 0]) > 45
    assert class_colour(3) == class_colour(3) == class_colour(3 + 91)


def test_text_has_contrast_on_every_colour():
    """The contrast of a label's text is at least 4.5, as WCAG requires."""
    for label in range(91):
        image = np.asarray(draw_boxes(Image.new("RGB", (200, 100)), [[20, 60, 180, 90]], [label], ["III"], [1]))
        text = image[44:58, 22:50]
        (ink,) = (value for value in (0, 255) if (text == value).all(-1).any())
        shares = np.array([(ink, ink, ink), class_colour(label)]) / 255
        linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
        dark, light = sorted(linear @ (0.2126, 0.7152, 0.0722))
        assert (light + 0.05) / (dark + 0.05) > 4.5


SIZE = (60, 14)


@pytest.mark.parametrize(
    "boxes",
    [
        [(0, 0, 400, 300), (0, 0, 400, 300), (0, 0, 400, 300)],
        [(100, 100, 101, 200)] * 6,
        [(0, 0, 9, 9), (391, 0, 400, 9), (0, 291, 9, 300), (391, 291, 400, 300)],
        [(x, y, x + 70, y + 50) for x in range(5, 330, 75) for y in range(5, 250, 55)],
        [(100 + 8 * i, 100 + 8 * i, 200 + 8 * i, 180 + 8 * i) for i in range(10)],
    ],
)
def test_labels_are_inside_the_image_and_do_not_overlap(boxes):
    placed = place_labels(boxes, [[SIZE]] * len(boxes), (400, 300))
    assert len(placed) == len(boxes)
    assert {chosen for chosen, _ in placed} == {0}
    positions = [position for _, position in placed]
    for i, (x0, y0, x1, y1) in enumerate(positions):
        assert (x1 - x0, y1 - y0) == SIZE
        assert x0 >= 0
        assert y0 >= 0
        assert x1 <= 400
        assert y1 <= 300
        assert all(shared_area(positions[i], other) == 0 for other in positions[:i])
        grown = (boxes[i][0] - 60, boxes[i][1] - 14, boxes[i][2] + 60, boxes[i][3] + 14)
        assert shared_area(positions[i], grown) == 60 * 14  # at its own box


def test_first_labels_are_placed_first_and_later_ones_give_way():
    """All 15 places at a box are used, none twice; the others have nothing, or the smaller size that finds a place."""
    boxes = [(100, 100, 300, 180)] * 60
    placed = place_labels(boxes, [[SIZE]] * 60, (400, 300))
    assert placed[0] == (0, (100, 86, 160, 100))
    assert place_labels(boxes[:1], [[SIZE]], (400, 300)) == placed[:1]
    used = [position for chosen, position in placed if chosen == 0]
    assert len(used) == len(set(used)) == 15
    assert not any(shared_area(a, b) for i, a in enumerate(used) for b in used[:i])
    assert {(chosen, position) for chosen, position in placed if position not in used} == {
        (None, (100, 100, 100, 100))
    }
    # inside, a wide label hides 12 of the box's 20 rows; a narrow one fits once beside it and once inside
    smaller = place_labels([(5, 5, 35, 25)] * 3, [[(60, 12), (20, 12)]] * 3, (60, 26))
    assert smaller == [(1, (35, 5, 55, 17)), (1, (5, 5, 25, 17)), (None, (5, 5, 5, 5))]


def test_labels_do_not_hide_small_boxes():
    large, small = (100, 100, 220, 180), (110, 88, 120, 98)
    assert place_labels([large], [[SIZE]], (400, 300)) == [(0, (100, 86, 160, 100))]
    (_, position), _ = place_labels([large, small], [[SIZE], [SIZE]], (400, 300))
    assert shared_area(position, small) == 0


def test_placing_equals_a_comparison_of_all_with_all():
    """By the definition: no area of earlier labels and at most half of a box, then the smallest shares of boxes."""
    random = np.random.default_rng(1)
    corners = random.integers((0, 0), (380, 280), (80, 2))
    boxes = [(x, y, min(x + w, 400), min(y + h, 300)) for x, y, w, h in np.hstack([corners, corners[::-1] // 4 + 1])]
    sizes = [(int(w), 14) for w in random.integers(1, 90, 80)]
    placed: list = []
    for box, size in zip(boxes, sizes, strict=True):
        ratings = []
        for i, candidate in enumerate(_candidates(box, size, (400, 300)).tolist()):
            shares = [shared_area(candidate, b) / max((b[2] - b[0]) * (b[3] - b[1]), 1) for b in boxes]
            if max(shares) <= 0.5 and not any(shared_area(candidate, label) for _, label in placed):
                ratings.append((sum(shares) + 0.05 * i, tuple(candidate)))
        placed.append((0, min(ratings)[1]) if ratings else (None, (*box[:2], *box[:2])))
    assert place_labels(boxes, [[size] for size in sizes], (400, 300)) == placed
    assert 0 < sum(chosen is None for chosen, _ in placed) < 40


def test_time_of_placing_is_proportional_to_the_number_of_boxes():
    """Four times the boxes, on four times the area: comparing all with all takes 16 times as long."""

    def seconds(count: int, side: int) -> float:
        corners = np.random.default_rng(0).integers(0, side - 60, (count, 2)).tolist()
        boxes = [(x, y, x + 40, y + 40) for x, y in corners]
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            place_labels(boxes, [[(50, 12)]] * count, (side, side))
            best = min(best, time.process_time() - start)
        return best

    assert seconds(4000, 4000) < 7 * seconds(1000, 2000)


def test_a_wide_label_gets_a_smaller_font_then_loses_its_score_then_is_shortened():
    def measure(text, size):
        return len(text) * size

    assert fit_label("wine glass", 0.934, 300, 20, measure) == ("wine glass 0.93", 20)
    assert fit_label("wine glass", 0.934, 299, 20, measure) == ("wine glass 0.93", 19)
    assert fit_label("wine glass", 0.934, 165, 20, measure) == ("wine glass 0.93", 11)
    assert fit_label("wine glass", 0.934, 164, 20, measure) == ("wine glass", 11)
    assert fit_label("wine glass", 0.934, 110, 20, measure) == ("wine glass", 11)
    assert fit_label("wine glass", 0.934, 109, 20, measure) == ("wine gla…", 11)
    assert fit_label("wine glass", 0.934, 70, 20, measure) == ("wine…", 11)
    assert fit_label("wine glass", 0.934, 11, 20, measure) == ("…", 11)
    assert fit_label("wine glass", 0.934, 10, 20, measure) == ("", 11)
    assert fit_label(" two\nlines ", 1, 300, 20, measure) == ("two lines 1.00", 20)
    assert fit_label("", 0.5, 300, 20, measure) == ("0.50", 20)


@pytest.mark.parametrize("background", ["noise", "black", "white"])
def test_only_lines_and_labels_change(background):
    image = noise(400, 300) if background == "noise" else Image.new("RGB", (400, 300), background)
    before = image.copy()
    drawn = draw_boxes(image, [[100, 100, 200, 180]], [1], ["person"], [0.93])
    assert image == before
    assert (drawn.size, drawn.mode) == ((400, 300), "RGB")
    here = changed(image, drawn)
    assert not here[101:179, 101:199].any()  # inside the box
    here[98:182, 98:202] = False  # a line of one pixel around it, and a halo
    ys, xs = here.nonzero()
    assert ys.max() < 98
    assert ys.min() > 80
    assert xs.min() >= 99
    assert xs.max() < 180
    assert {drawn.getpixel(at) for at in [(99, 140), (200, 140), (150, 180), (190, 99)]} == {class_colour(1)}
    # on a background of the line's own colour its halo shows
    same = Image.new("RGB", (400, 300), class_colour(1))
    assert changed(same, draw_boxes(same, [[100, 100, 200, 180]], [1], [""], [1]))[140].sum() == 4


def test_first_boxes_are_on_top():
    drawn = draw_boxes(noise(400, 300), [[100, 100, 200, 180]] * 2, [1, 2], ["a", "b"], [0.9, 0.8])
    assert drawn.getpixel((99, 140)) == class_colour(1)


@pytest.mark.parametrize(
    "size", [(1, 1), (3, 500), (500, 3), (30, 600), (600, 12), (64, 64), (128, 96), (1333, 800), (3000, 2000)]
)
def test_any_size_and_any_box(size):
    width, height = size
    boxes = [
        [0, 0, width, height],
        [width, height, width, height],
        [0, 0, 0, 0],
        [width / 2, 0, width / 2, height],
        [-50, -50, width + 50, height + 50],
        [width + 9, height + 9, width + 10, height + 10],
    ]
    drawn = draw_boxes(noise(*size), boxes, range(6), ["a name", "", "x" * 300, "ä", "name\nof two", "b"], [0.5] * 6)
    assert drawn.size == size
    assert drawn.getpixel((0, height // 2)) == class_colour(0)


def test_lines_and_fonts_scale_with_the_image():
    thickness, tallness = [], []
    for width, height in [(64, 64), (640, 480), (1333, 800), (6000, 4000)]:
        box = [width / 4, height / 2, 3 * width / 4, 7 * height / 8]
        drawn = np.asarray(draw_boxes(Image.new("RGB", (width, height)), [box], [1], ["a"], [1]))
        here = (drawn == class_colour(1)).all(-1)
        thickness.append(int(here[3 * height // 4, : width // 2].sum()))
        tallness.append(int(here[: height // 2 - 15, width // 4].sum()))
    assert thickness == [1, 2, 3, 14]
    assert tallness == sorted(tallness)
    assert tallness[-1] > 100


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr"])
def test_every_mode(mode):
    image = noise(60, 50).convert(mode)
    assert draw_boxes(image, [], [], [], []) == image.convert("RGB")
    assert draw_attention(image, *[torch.ones(1, 3, 4)] * 3).mode == "RGB"


def test_a_hundred_boxes_take_little_time():
    random = np.random.default_rng(0)
    corners = random.uniform(0, (1200, 700), (100, 2))
    boxes = np.concatenate([corners, corners + random.uniform(10, 300, (100, 2))], axis=1).tolist()
    image, names = noise(1333, 800), [f"a class {i}" for i in range(100)]
    seconds = []
    for _ in range(5):
        start = time.process_time()
        draw_boxes(image, boxes, range(100), names, [0.5] * 100)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2


def test_another_font(tmp_path):
    path = tmp_path / "font.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)
    image = noise(400, 300)
    drawn = draw_boxes(image, [[100, 100, 200, 180]], [1], ["person"], [0.93], font=path)
    assert changed(image, drawn)[85:95, 105:140].all()
    assert draw_attention(image, *[torch.ones(1, 3, 4)] * 3, title="person", font=str(path)).width > 240


def test_invalid_fonts(tmp_path):
    text = tmp_path / "text.ttf"
    text.write_text("no font")
    for path in [tmp_path / "missing.ttf", text, tmp_path]:
        for draw in [
            lambda path: draw_boxes(noise(9, 9), [], [], [], [], font=path),
            lambda path: draw_attention(noise(9, 9), *[torch.ones(1, 3, 4)] * 3, font=path),
        ]:
            with pytest.raises(OSError, match=rf"^{path}: expected a TrueType font file that can be read, got: "):
                draw(path)


def test_invalid_boxes():
    image = noise(40, 30)
    with pytest.raises(
        ValueError, match=r"expected equal numbers of boxes, labels, names and scores, got \[1, 1, 0, 1\]"
    ):
        draw_boxes(image, [[0, 0, 1, 1]], [1], [], [0.5])
    for box in [[0, 0, 1], [0, 0, 1, float("nan")], [0, 0, 1, float("inf")]]:
        with pytest.raises(ValueError, match=r"expected a box of four finite numbers x0 y0 x1 y1, got \[0, 0, 1"):
            draw_boxes(image, [box], [1], ["a"], [0.5])
        with pytest.raises(ValueError, match="expected a box of four finite numbers"):
            draw_attention(image, *[torch.ones(1, 3, 4)] * 3, box=box)


@pytest.mark.parametrize("peak", [(0, 0), (3, 7), (9, 15), (5, 0)])
def test_heat_is_at_the_peak_of_the_map(peak):
    attention = torch.full((10, 16), 0.001)
    attention[peak] = 0.5
    heat = np.asarray(overlay_heat(noise(160, 100), attention)).astype(int)
    warmth = heat[..., 0] - heat[..., 2]  # the grey image has none
    y, x = np.unravel_index(heat.sum(-1).argmax(), warmth.shape)
    assert (y // 10, x // 10) == peak
    assert warmth[y, x] > 40
    far = np.hypot(*np.indices(warmth.shape) - np.array([[[y]], [[x]]])) > 25
    assert np.abs(warmth[far]).max() < 10


def test_each_map_is_scaled_by_its_own_maximum():
    image, attention = noise(80, 60), torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    assert overlay_heat(image, attention) == overlay_heat(image, attention / 512)
    assert overlay_heat(image, attention.bfloat16().requires_grad_()).size == (80, 60)
    nothing = np.asarray(overlay_heat(image, torch.zeros(6, 8)))
    assert (nothing == nothing[..., :1]).all()  # grey


def test_heat_gets_lighter_in_even_steps():
    lightness = lab(heat_colours(np.linspace(0, 1, 21)))[:, 0]
    assert np.diff(lightness).min() > 2
    assert np.diff(lightness).max() < 8


def find(cell: Image.Image, sheet: Image.Image) -> tuple[int, int]:
    """Return the position (x, y) of a cell in a sheet; it must occur exactly once."""
    inner, outer = (np.asarray(image).astype(np.int32) @ (1, 256, 65536) for image in (cell, sheet))
    height, width = inner.shape
    corners = np.argwhere((outer[:-1, :-1] == inner[0, 0]) & (outer[:-1, 1:] == inner[0, 1]))
    found = [(x, y) for y, x in corners if np.array_equal(outer[y : y + height, x : x + width], inner)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("heads", "columns"), [(1, 1), (3, 3), (8, 8), (12, 6), (48, 8)])
def test_rows_are_the_parts_and_columns_the_heads(heads, columns):
    image = noise(240, 60)  # as large as a cell: it is not resized
    generator = torch.Generator().manual_seed(0)
    maps = [torch.rand(heads, 5, 7, generator=generator) for _ in range(3)]
    sheet = draw_attention(image, *maps, title="person 0.93")

    def positions(head):
        """Return the positions of the head's three cells, (3, 2) x y."""
        return np.array([find(overlay_heat(image, part[head]), sheet) for part in maps])

    first = positions(0)
    assert (first - first[0]).tolist() == [[0, 0], [0, 66], [0, 132]]
    block = np.array([0, 198 + 22 + 6])  # three rows, a line of type, a gap
    for head in {heads // 2, heads - 1}:
        row, column = divmod(head, columns)
        expected = first + row * block + (246 * column, 0)
        assert np.abs(positions(head) - expected).max() <= 4 * row  # versions of PIL's font differ in height


def test_the_box_is_outlined_on_each_map():
    image, maps = noise(480, 320), [torch.ones(2, 5, 7)] * 3
    without = draw_attention(image, *maps)
    sheet = draw_attention(image, *maps, box=[100, 100, 300, 200])
    assert sheet.size == without.size
    here = (np.asarray(sheet) == BOX_COLOUR).all(-1)
    # a line of two pixels around 100 x 50, on six cells
    assert here.sum() == 6 * (104 * 54 - 100 * 50)
    assert changed(without, sheet).sum() == 6 * (106 * 56 - 98 * 48)


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (30, 900), (2000, 40), (3000, 4000)])
@pytest.mark.parametrize("heads", [1, 8])
def test_attention_on_any_size(size, heads):
    maps = [torch.ones(heads, 5, 7)] * 3
    sheet = draw_attention(Image.new("RGB", size), *maps, box=[0, 0, *size], title="a long title " * 50)
    assert 340 < sheet.width < 2200
    assert 100 < sheet.height < 1100


def test_invalid_maps():
    image, good = noise(40, 30), torch.ones(8, 3, 4)
    for bad in [torch.ones(3, 4), torch.ones(8, 3, 5), torch.ones(7, 3, 4)]:
        shape = str(tuple(bad.shape))[1:-1]
        with pytest.raises(ValueError, match=rf"spatial: expected \(M, h, w\), .* got \({shape}\)"):
            draw_attention(image, good, bad, good)
    with pytest.raises(ValueError, match=r"content: expected \(M, h, w\), .* got \(0, 3, 4\)"):
        draw_attention(image, *[torch.ones(0, 3, 4)] * 3)
    with pytest.raises(ValueError, match=r"combined: expected finite values of at least 0, got -1.0..-1.0"):
        draw_attention(image, good, good, -good)
    with pytest.raises(ValueError, match="content: expected finite values"):
        draw_attention(image, good * torch.nan, good, good)
