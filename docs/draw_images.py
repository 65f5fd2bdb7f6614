"""Draw ``docs/images/detections.jpg``: shapes that the library draws, and what the shipped weights detect on them."""

from pathlib import Path

from PIL import Image

from conditional_detr import Detector
from conditional_detr.data.synthetic import draw_image

SIZE = 300, 400
IMAGES = (1, 7), (2, 22), (1, 20)


def main() -> None:
    """Write three images side by side."""
    detector = Detector.from_pretrained("shapes")
    sheet = Image.new("RGB", (3 * SIZE[1] + 16, SIZE[0]), "white")
    for column, (seed, index) in enumerate(IMAGES):
        image, _, _ = draw_image(seed, index, size=SIZE)
        sheet.paste(detector(image).draw(), (column * (SIZE[1] + 8), 0))
    sheet.save(Path(__file__).parent / "images" / "detections.jpg", quality=88)


if __name__ == "__main__":
    main()
