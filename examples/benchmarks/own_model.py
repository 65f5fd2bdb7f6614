"""Compare engines on your own model: ``python examples/benchmarks/own_model.py --weights bccd``.

All engines run the same weights on the same pixels, alternating with the first engine, the reference. The names of all
engines are in ``conditional_detr.benchmark.engines.ENGINES``; ``conditional-detr benchmark`` runs all available ones.
"""

import argparse

from conditional_detr import ConditionalDETR
from conditional_detr.benchmark.measure import measure
from conditional_detr.benchmark.report import table


def main() -> None:
    """Measure the engines and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="shapes", help="folder, file, hub id or short name")
    parser.add_argument("--engines", nargs="+", default=["plain", "optimised"])
    parser.add_argument("--height", type=int, default=480, help="image height in pixels")
    parser.add_argument("--width", type=int, default=640, help="image width in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images per call")
    parser.add_argument("--rounds", type=int, default=7, help="timed calls per engine")
    options = parser.parse_args()

    model = ConditionalDETR.from_pretrained(options.weights)
    size = options.height, options.width
    measurements = measure(model, options.engines, size=size, batch=options.batch, rounds=options.rounds)
    print(table(measurements).markdown(), end="")
    best = min(measurements, key=lambda measurement: measurement.median)
    print(f"{best.engine}: {options.batch / best.median:.1f} images per second")


if __name__ == "__main__":
    main()
