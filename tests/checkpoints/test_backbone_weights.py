"""Classifier weights loaded into the backbone: torchvision's ResNet gives the same feature maps."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18, resnet34
from torchvision.models.feature_extraction import create_feature_extractor

from conditional_detr import ConditionalDETR, Config, optimize
from conditional_detr.checkpoints.backbone_weights import load_backbone_weights

SMALL = {"num_classes": 2, "num_queries": 4, "width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1}
PIXELS = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def classifier():
    """torchvision's ResNet-18 with BatchNorm statistics that change the result."""
    torch.manual_seed(0)
    model = resnet18().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def fresh(stage=3, backbone="resnet18"):
    return ConditionalDETR(Config(backbone=backbone, backbone_stage=stage, **SMALL)).eval()


def folded(classifier):
    """The state dict with BatchNorm folded into the convolutions, by the definition of BatchNorm."""
    modules, state = dict(classifier.named_modules()), {}
    for path, module in modules.items():
        if isinstance(module, nn.BatchNorm2d):
            before = path.replace("bn", "conv").replace("downsample.1", "downsample.0")
            scale = module.weight / (module.running_var + module.eps).sqrt()
            state[f"{before}.weight"] = (modules[before].weight * scale[:, None, None, None]).detach()
            state[f"{before}.bias"] = (module.bias - module.running_mean * scale).detach()
    return {**state, "fc.weight": classifier.fc.weight.detach(), "fc.bias": classifier.fc.bias.detach()}


@torch.no_grad()
def maps(classifier, stage):
    return create_feature_extractor(classifier, {f"layer{stage}": "map"})(PIXELS)["map"]


@pytest.mark.parametrize("kind", ["pth", "safetensors", "npz", "folded pth", "folded npz"])
@pytest.mark.parametrize("stage", [2, 3])
def test_maps_equal_torchvisions(classifier, tmp_path, kind, stage):
    state = folded(classifier) if "folded" in kind else classifier.state_dict()
    path = tmp_path / f"backbone.{kind.split()[-1]}"
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    elif path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    model = fresh(stage)
    others = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("backbone")}
    report = load_backbone_weights(model, path)
    with torch.no_grad():
        features, _ = model.backbone(PIXELS)
    torch.testing.assert_close(features, maps(classifier, stage), rtol=1e-4, atol=1e-5)
    assert set(report.loaded) == set(model.backbone.body.state_dict())
    unused = {name for name in state if name.startswith(("fc", *(f"layer{i}" for i in range(stage + 1, 5))))}
    assert set(report.unused) == {name for name in unused if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in others.items())


def test_names_with_underscores_for_dots(tmp_path):
    """timm's feature extractor has stages_0 where the classifier has stages.0."""
    import timm

    torch.manual_seed(0)
    classifier = timm.create_model("convnext_atto").eval()
    torch.save(classifier.state_dict(), tmp_path / "backbone.pth")
    model = fresh(1, "convnext_atto")
    report = load_backbone_weights(model, tmp_path / "backbone.pth")
    assert any(name.startswith("stages.3") for name in report.unused)
    with torch.no_grad():
        expected = classifier.stages[1](classifier.stages[0](classifier.stem(PIXELS)))
        torch.testing.assert_close(model.backbone(PIXELS)[0], expected)


def test_weights_of_a_deeper_network_are_an_error(tmp_path):
    torch.save(resnet34().state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"unexpected, in stages that the backbone has: layer1\.2\.conv1\.weight, "):
        load_backbone_weights(fresh(), tmp_path / "backbone.pth")
    with pytest.raises(TypeError, match="expected a ConditionalDETR or DETR, got Linear"):
        load_backbone_weights(nn.Linear(2, 2), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="expected a plain model, got one whose backbone is not from timm"):
        load_backbone_weights(optimize(fresh()), tmp_path / "backbone.pth")


def test_tensors_that_do_not_fit_are_listed_and_nothing_is_loaded(classifier, tmp_path):
    state = dict(classifier.state_dict())
    del state["layer2.0.conv1.weight"], state["bn1.bias"]
    state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    state["layer3.1.bn2.running_mean"] = torch.full((256,), torch.nan)
    torch.save(state, tmp_path / "backbone.pth")
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit the backbone 'resnet18'") as error:
        load_backbone_weights(model, tmp_path / "backbone.pth")
    assert "missing: bn1.bias, layer2.0.conv1.weight\n" in str(error.value)
    assert "wrong shape: layer1.0.conv1.weight: expected (64, 64, 3, 3)" in str(error.value)
    assert "not finite: layer3.1.bn2.running_mean" in str(error.value)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("backbone.npz", b"PK\x03\x04 and no more", ValueError, "truncated, or not an npz file"),
        ("backbone.npz", b"nothing", ValueError, "truncated, or not an npz file"),
        ("backbone.pth", b"nothing", ValueError, "truncated, not a torch file"),
        ("backbone.onnx", b"nothing", ValueError, r"expected a \.safetensors, \.bin, \.pth, \.pt or \.npz file"),
        ("missing.npz", None, FileNotFoundError, "missing.npz"),
        ("missing.pth", None, FileNotFoundError, "missing.pth"),
    ],
)
def test_files_of_the_wrong_kind(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        load_backbone_weights(fresh(), tmp_path / name)


def test_objects_in_an_npz_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "backbone.npz", x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="truncated, or not an npz file of numeric arrays"):
        load_backbone_weights(fresh(), tmp_path / "backbone.npz")
