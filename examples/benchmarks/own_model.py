"""Time a model of one's own in several ways: ``python examples/benchmarks/own_model.py --weights bccd``.

Every engine runs the same weights on the same pixels, in turn; all are compared with the first. More engines than
here are in ``conditional_detr.benchmark.engines.ENGINES``; ``conditional-detr benchmark`` times all that can run.
"""

import argparse

from conditional_detr import ConditionalDETR
from conditional_detr.benchmark.measure import measure
from conditional_detr.benchmark.report import table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="shapes", help="a folder, a file, a hub id or a short name")
    parser.add_argument("--engines", nargs="+", default=["plain", "optimised"])
    parser.add_argument("--height", type=int, default=480, help="of the images, in pixels")
    parser.add_argument("--width", type=int, default=640, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images a call")
    parser.add_argument("--rounds", type=int, default=7, help="how often each engine is timed")
    options = parser.parse_args()

    model = ConditionalDETR.from_pretrained(options.weights)
    size = options.height, options.width
    readings = measure(model, options.engines, size=size, batch=options.batch, rounds=options.rounds)
    print(table(readings).markdown(), end="")
    best = min(readings, key=lambda reading: reading.median)
    print(f"{best.engine}: {options.batch / best.median:.1f} images a second")


if __name__ == "__main__":
    main()
