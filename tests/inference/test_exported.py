"""Descriptions of exported models: what is stored in a file is read back, also from files of version 0.1.0."""

import json
from pathlib import Path

import pytest

from conditional_detr import Config, Metadata, Preprocessing
from conditional_detr.inference.exported import FORMAT, Description, Parity

STORED = (Path(__file__).parent / "files" / "description_0.1.0.json").read_text()


def test_a_description_that_version_0_1_0_stored():
    """In that version the image of the comparison had another key."""
    description = Description.from_json(STORED)
    sizes = {"num_classes": 2, "num_queries": 5, "width": 16, "heads": 2, "feedforward": 16, "dropout": 0.0}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    assert description.config == Config(**sizes, **layers, backbone="test_resnet", backbone_stage=1)
    assert description.metadata == Metadata(("cell, red", "cell, white"), (1, 7), Preprocessing(64, 96))
    assert description.image == "drawn"
    assert description.parity[1] == Parity(33, 44, 2.384185791015625e-07, 5.960464477539063e-08)
    assert Description.from_json(description.to_json()) == description
    assert json.loads(description.to_json())["format"] == FORMAT == 4
    assert description.thresholds is None
    assert description.architecture == "conditional_detr"  # the only one of that version


@pytest.mark.parametrize("format", [0, 5, None, "2"])
def test_other_formats_are_refused(format):
    text = json.dumps({**json.loads(STORED), "format": format})
    with pytest.raises(ValueError, match=rf"expected a description of format 4, got {format!r}, .* 0\.1\.0;"):
        Description.from_json(text)


def test_thresholds_are_stored_and_checked():
    """Format 3 has none; in format 4 those of classes that the model does not have are damage."""
    content = json.loads(Description.from_json(STORED).to_json())
    thresholds = {"cell, red": 0.25, "cell, white": 1}
    described = Description.from_json(json.dumps({**content, "thresholds": thresholds}))
    assert described.thresholds == thresholds
    assert Description.from_json(described.to_json()) == described
    before = {key: value for key, value in content.items() if key != "thresholds"}
    assert Description.from_json(json.dumps({**before, "format": 3})).thresholds is None
    for wrong in ({"cell": 0.5}, {"cell, red": 2}, [0.5]):
        with pytest.raises(ValueError, match="its description is damaged: thresholds: "):
            Description.from_json(json.dumps({**content, "thresholds": wrong}))
