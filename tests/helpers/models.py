"""Models, inputs and comparisons shared by the tests."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from conditional_detr import Config

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "weights"


def transformers_model(
    *, architecture="conditional_detr", num_labels=91, dc5=False, backbone="resnet50", stage=4, seed=0, **options
):
    """Return a transformers model with random weights for which queries, positions and every projection matter."""
    from transformers import AutoConfig, AutoModelForObjectDetection

    backbone_config = {
        "model_type": "timm_backbone",
        "backbone": backbone,
        "out_indices": [stage],
        "output_stride": 2 ** (stage if dc5 else stage + 1),
        "features_only": True,
        "use_pretrained_backbone": False,
    }
    options |= {"backbone_config": backbone_config, "dilation": dc5, "num_labels": num_labels}
    torch.manual_seed(seed)
    model = AutoModelForObjectDetection.from_config(AutoConfig.for_model(architecture, **options)).eval()
    randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Initialise weights at random so that queries and positions stay different.

    With default initialisation all queries and all memory positions become similar: attention is uniform, and its
    output hides the differences in the residual stream. Half of the projections could then be zero without effect.
    Therefore queries and keys get large weights, residual branches small ones, and features vary over the image.
    """
    for name, module in model.named_modules():
        part = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear):
            gain = 0.5 if part in ("o_proj", "fc2", "v_proj") else 2.0 if part[:2] in ("q_", "k_") else 1.0
            nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif hasattr(module, "running_var"):
            last = part in ("bn3", "bn2") and "layer" in name
            nn.init.uniform_(module.weight, *((0.3, 0.6) if last else (0.8, 1.2)))
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    pixels, padding = two_images()
    (features, _), *_ = model.model.backbone(pixels, (~padding).long())[-1:]
    projection = model.model.input_projection
    nn.init.normal_(projection.weight)
    projection.weight /= projection(features).std((2, 3)).mean()
    projection.bias -= projection(features).mean((0, 2, 3))


TINY = {
    "backbone": "resnet18",
    "stage": 3,
    "num_labels": 7,
    "num_queries": 11,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


TINY_CONFIG = Config(
    num_classes=7,
    num_queries=11,
    width=32,
    heads=4,
    encoder_layers=2,
    decoder_layers=3,
    feedforward=48,
    backbone="resnet18",
    backbone_stage=3,
)

# One layer of each kind: the decoder's first has positions in its queries, and the later ones λ_q. For exporters,
# which take a fixed time for each operation
LEAST = {**TINY, "encoder_layers": 1, "decoder_layers": 2}
LEAST_CONFIG = replace(TINY_CONFIG, encoder_layers=1, decoder_layers=2)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """Assert that all parameters and buffers are bitwise equal."""
    state, other = a.state_dict(), b.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


def assert_same_detections(one, other, threshold: float) -> None:
    """Assert equal detections, each matched to the nearest of its class, except scores within 1e-4 of the threshold.

    Kernels differ in the last digits between batch sizes and runtimes, so that near-equal scores may change order.
    """
    for found, expected in ((one, other), (other, one)):
        for box, score, name in found:
            if score > threshold + 1e-4:
                same = expected.filter(classes=[name])
                distances = (same.boxes - torch.tensor(box)).abs().amax(dim=1)
                assert distances.min() < 1e-2
                assert (same.scores[distances < 1e-2] - score).abs().min() < 1e-4


def run_example(name, *arguments, folder, python=(sys.executable,)) -> list[str]:
    """Run one of the examples in a folder and return the lines that it prints."""
    script = [*python, ROOT / "examples" / f"{name}.py", *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=True, cwd=folder).stdout.splitlines()


_FORKS = """
import json, os, sys, tempfile, traceback
imports, programs = json.loads(sys.argv[1])
exec(imports)
ended = []
for program in programs:
    files = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    child = os.fork()
    if not child:
        for descriptor, file in enumerate(files, 1):
            os.dup2(file.fileno(), descriptor)
        code = 1
        try:
            exec(program)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    ended.append((code, *(file.read() for file in files)))
print(json.dumps(ended))
"""


def run_forks(imports: str, *programs: str) -> list[subprocess.CompletedProcess]:
    """Run programs one after another, each in its own process: a fork of one that has only executed the imports."""
    command = [sys.executable, "-c", _FORKS, json.dumps((imports, programs))]
    *_, line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        subprocess.CompletedProcess(program, *one) for program, one in zip(programs, json.loads(line), strict=True)
    ]


class Published:
    """A checkpoint folder in the published format, and the transformers model that was saved there."""

    def __init__(self, folder: Path, **options) -> None:
        self.folder = folder
        self.transformers = transformers_model(**options)
        self.transformers.save_pretrained(folder)


def two_images(height=160, width=224, seed=0):
    """Return pixels (2, 3, H, W) and padding (2, H, W); the second image is smaller in both dimensions."""
    torch.manual_seed(seed)
    pixels = torch.randn(2, 3, height, width)
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, :, 3 * width // 5 :] = True
    padding[1, 3 * height // 4 :] = True
    return pixels.masked_fill(padding[:, None], 0), padding


def pixels_of(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@torch.no_grad()
def differences(fast, plain, pixels, padding=None):
    """Return the largest differences of logits and boxes of a one-layer model from the plain model's last layer."""
    found, expected = fast(pixels, padding), plain(pixels, padding)
    assert found.logits.shape == (1, *expected.logits.shape[1:])
    assert found.boxes.shape == (1, *expected.boxes.shape[1:])
    assert found.logits.dtype == found.boxes.dtype == torch.float32
    return [(a[-1] - b[-1]).abs().max().item() for a, b in zip(found, expected, strict=True)]


def card_metric(name, metric):
    """Return a metric from the table of a model card."""
    return float(re.search(rf"^\| {metric} \| ([\d.]+) \|", (WEIGHTS / name / "README.md").read_text(), re.M)[1])
