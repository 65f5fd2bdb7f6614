"""Files of exported models: whether they can be written, what they say of themselves, and how they get their place."""

import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from conditional_detr.inference.checksums import files_of
from conditional_detr.inference.exported import Description
from conditional_detr.inference.postprocessing import make_postprocessing
from conditional_detr.inference.runtimes import SUFFIXES
from conditional_detr.inference.thresholds import check_thresholds
from conditional_detr.modeling.detection_transformer import DetectionTransformer
from conditional_detr.system.atomic_files import publish, remove_unfinished
from conditional_detr.system.outputs import check_output

PACKAGES = {
    ".onnx": (("onnx", "onnxscript", "onnxruntime"), "onnx"),
    ".xml": (("openvino",), "openvino"),
    ".pt2": ((), ""),
}
"""Packages that each format needs, and the extra that installs them."""


def checked_target(target: str | Path) -> Path:
    """Return the target as a path after validation.

    Raises:
        ModuleNotFoundError: a package for the format is not installed.
        OSError: the folder does not exist, or is not writable.
        ValueError: the suffix is not that of an exported model.
    """
    target = Path(target)
    if target.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{target}: expected a file name that ends in one of {', '.join(SUFFIXES)}")
    if target.is_dir():
        raise IsADirectoryError(f"{target}: expected a file name, got a folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    try:
        with tempfile.TemporaryFile(dir=target.parent):  # before the long work
            pass
    except OSError as error:
        raise OSError(f"{target}: cannot be written: {error.strerror or error}") from error
    packages, extra = PACKAGES[target.suffix.lower()]
    if missing := [package for package in packages if find_spec(package) is None]:
        raise missing_packages(target, missing, extra)
    return target


def check_free(target: Path, *inputs: str | Path, overwrite: bool) -> None:
    """Check that the files of an exported model may be written; raises what ``check_output`` raises."""
    remove_unfinished(target.parent)
    for file in files_of(target):
        check_output(file, inputs=inputs, overwrite=overwrite)


def missing_packages(target: Path, packages: Sequence[str], extra: str) -> ModuleNotFoundError:
    """Return the error for packages that are not installed."""
    needs = f"needs {', '.join(packages)}, which is not installed: pip install 'conditional-detr[{extra}]'"
    return ModuleNotFoundError(f"{target}: {needs}")


def describe(
    model: DetectionTransformer,
    suffix: str,
    *,
    precision: str,
    top_k: int | None,
    thresholds: Mapping[str, float] | None,
) -> Description:
    """Return the description to store in an exported model, without its parity and other measurements.

    Raises:
        TypeError, ValueError: thresholds that a detector with this model could not use.
    """
    if thresholds is not None:
        make_postprocessing(model.metadata.class_names, threshold=thresholds, top_k=1, classes=None)
        thresholds = check_thresholds(thresholds)
    packages = ("conditional-detr", "torch", *PACKAGES[suffix][0])
    versions = {package: version_of(package) for package in packages}
    return Description(
        model.config, model.metadata, precision, top_k, (), "", versions, {}, model.architecture, thresholds
    )


def version_of(package: str) -> str:
    """Return the version of a package, also if its distribution has another name, as onnxruntime-gpu does."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(import_module(package).__version__)


def draft_of(target: Path, folder: Path) -> Path:
    """Return the path of a target's draft in a folder, with the lower-case suffix that the writers expect."""
    return folder / f"{target.stem}{target.suffix.lower()}"


def move(draft: Path, target: Path) -> None:
    """Move the files of a draft, in a temporary folder beside the target, to those of the target.

    Raises:
        OSError: they cannot be renamed.
    """
    publish(draft.parent, {file.name: to.name for file, to in zip(files_of(draft), files_of(target), strict=True)})
