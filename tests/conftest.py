"""What the tests share: checkpoints in the published format with weights that tell every part apart."""

import atexit
import logging
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from PIL import Image

from helpers.models import LEAST, TINY, Published

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants a hub makes its own

os.environ["XDG_CACHE_HOME"] = mkdtemp(prefix="conditional_detr_cache_")  # not the developer's
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # they share the cores, and so do the processes that tests start
    THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
    torch.set_num_threads(THREADS)
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

DATA = Path(__file__).parent.parent.parent / "shared"
LONGEST = ["test_quantize.py", "deploy/test_export.py", "test_benchmark.py", "test_docs.py", "test_loading.py"]
LONGEST += ["test_notebooks.py", "test_small_finetuning.py", "training/test_surroundings.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker has one left when the others have finished."""

    def order(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((i for i, name in enumerate(LONGEST) if path.endswith(name)), len(LONGEST))

    items.sort(key=order)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return the number of workers of ``-n auto``: more than four would wait for the longest file."""
    return min(4, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def _no_closed_log_streams() -> None:
    """Remove handlers that another package made in an earlier test: they write to its standard error, now closed."""
    for logger in (logging.getLogger(), logging.getLogger("conditional_detr")):
        for handler in [*logger.handlers]:
            if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
                logger.removeHandler(handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and reference tables that lies beside a developer's checkout."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here: it holds images whose licences keep them out of the repository")
    return DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Published:
    return Published(tmp_path_factory.mktemp("tiny"), **TINY)


@pytest.fixture(scope="session")
def tiny_detr(tmp_path_factory) -> Published:
    return Published(tmp_path_factory.mktemp("tiny_detr"), architecture="detr", **TINY)


@pytest.fixture(scope="session")
def small(tiny, tmp_path_factory) -> Path:
    """The tiny checkpoint, for images that are resized to little: what runs it in a moment."""
    from conditional_detr import ConditionalDETR, Metadata, Preprocessing

    model = ConditionalDETR.from_pretrained(tiny.folder)
    model.metadata = Metadata(model.metadata.class_names, preprocessing=Preprocessing(96, 160))
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def least(tmp_path_factory) -> Path:
    """A checkpoint with one layer of each kind, for images that are resized to little: what is soon exported."""
    from conditional_detr import ConditionalDETR, Metadata, Preprocessing

    model = ConditionalDETR.from_pretrained(Published(tmp_path_factory.mktemp("published"), **LEAST).folder)
    model.metadata = Metadata(model.metadata.class_names, preprocessing=Preprocessing(96, 160))
    folder = tmp_path_factory.mktemp("least")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shapes_onnx(tmp_path_factory) -> Path:
    """The checkpoint "shapes" exported to ONNX in float32, without post-processing."""
    from conditional_detr import ConditionalDETR
    from conditional_detr.deploy.export import export

    path = tmp_path_factory.mktemp("shapes") / "shapes.onnx"
    export(ConditionalDETR.from_pretrained("shapes"), path)
    return path


@pytest.fixture(scope="session")
def r50(tmp_path_factory) -> Published:
    return Published(tmp_path_factory.mktemp("r50"))


@pytest.fixture(scope="session")
def dc5(tmp_path_factory) -> Published:
    return Published(tmp_path_factory.mktemp("dc5"), dc5=True, seed=1)


@pytest.fixture(scope="session")
def r50_detr(tmp_path_factory) -> Published:
    return Published(tmp_path_factory.mktemp("r50_detr"), architecture="detr", num_queries=100)


@pytest.fixture(scope="session")
def photograph(tmp_path_factory) -> Path:
    """An image file that looks like something, made here: gradients, edges and noise, 96 x 128."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, 96), torch.linspace(0, 1, 128), indexing="ij")
    values = torch.stack([y, x, (x - 0.5).hypot(y - 0.5) < 0.3]) * 0.8 + 0.2 * torch.rand(
        3, 96, 128, generator=generator
    )
    path = tmp_path_factory.mktemp("images") / "photograph.png"
    Image.fromarray((values * 255).to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return path
