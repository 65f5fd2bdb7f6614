import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from conditional_detr import Metadata, Preprocessing, from_pretrained
from conditional_detr.checkpoints.model_card import CardDetails, make_card, read_licence


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [detr]\n---\n\n# A detector", "apache-2.0"),
        ("---\nlicense: [mit, cc-by-4.0]\n---\n", "mit, cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: my-licence\n---\n", "my-licence"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [detr]\n---\n", None),
        ("# A detector\n\nlicense: mit", None),
        ("", None),
    ],
)
def test_the_licence_is_that_of_the_front_matter(tmp_path, content, licence):
    (tmp_path / "README.md").write_text(content)
    (tmp_path / "model.onnx").touch()
    assert read_licence(tmp_path) == licence
    assert read_licence(str(tmp_path / "model.onnx")) == licence


def test_weights_without_a_card_have_none(tmp_path):
    assert read_licence(tmp_path) is None
    assert read_licence("owner/name") is None


def test_front_matter_that_is_no_yaml_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: expected front matter in YAML"):
        read_licence(tmp_path)


@pytest.mark.parametrize("name", ["shapes", "bccd"])
def test_shipped_weights_state_theirs(name):
    assert read_licence(name) == "Apache-2.0, as far as we hold the rights (see the README)"


EVALUATION = {
    **{"AP": 0.5, "AP50": 0.75, "AP75": 0.6, "APs": -1, "APm": 0.4, "APl": 0.6, "AR100": 0.7},
    "per_class": {"LABEL_0": {"category_id": 1, "annotations": 3, "AP": 0.25, "AP50": 0.5, "AP75": -1, "AR100": 0.4}},
}


@pytest.fixture
def model(tiny):
    return from_pretrained(tiny.folder)


def test_a_card_says_what_it_was_told(model, tmp_path):
    """Read by huggingface_hub, and line by line."""
    (tmp_path / "plot.png").write_bytes(b"png")
    details = CardDetails(
        "cc-by-4.0", "12 images of cats", {"epochs": 50}, EVALUATION, {"LABEL_0": 0.35}, tmp_path / "plot.png"
    )
    model.save_pretrained(tmp_path / "cats", card=details)
    assert read_licence(tmp_path / "cats") == "cc-by-4.0"
    assert (tmp_path / "cats" / "curves.png").read_bytes() == b"png"
    card = ModelCard.load(tmp_path / "cats" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "conditional_detr",
        "license": "cc-by-4.0",
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "conditional-detr"],
    }
    lines = card.text.splitlines()
    for line in (
        "# cats",
        "| LABEL_0 | 3 | 0.250 | 0.500 | - | 0.400 | 0.350 |",
        "| LABEL_1 | - | - | - | - | - | - |",
        "| APs | - |",
        "| epochs | 50 |",
        "Data: 12 images of cats",
        "![Curves of the training](curves.png)",
        f"| parameters | {sum(p.numel() for p in model.parameters()):,} |",
    ):
        assert line in lines, line


def test_the_usage_of_a_card_runs(model, tmp_path, photograph, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model.metadata = Metadata(model.metadata.class_names, preprocessing=Preprocessing(96, 160))
    model.save_pretrained("it's cats", card=True)
    shutil.copy(photograph, "photo.jpg")
    text = Path("it's cats/README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("threshold=0.5", "threshold=0.1")
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_names_cannot_break_a_table(model):
    names = ["a|b", "<script>", "two\nlines", "*x*", "[y](z)", "plain"]
    model.metadata = Metadata((*names, *model.metadata.class_names[6:]))
    evaluation = {**EVALUATION, "per_class": {names[0]: {"AP": 0.5}}}
    lines = make_card(model, CardDetails(evaluation=evaluation), name="x").splitlines()
    start = lines.index("| class | annotations | AP | AP50 | AP75 | AR100 |")
    cells = [line.removeprefix("| ").split(" | ")[0] for line in lines[start + 2 : start + 8]]
    assert cells == ["a\\|b", "&lt;script>", "two lines", "\\*x\\*", "\\[y](z)", "plain"]


def test_a_written_card_is_not_replaced(model, tmp_path):
    model.save_pretrained(tmp_path / "x", card=True)
    model.save_pretrained(tmp_path / "x", card=CardDetails(licence="mit"))  # a generated one is
    assert read_licence(tmp_path / "x") == "mit"
    card = tmp_path / "x" / "README.md"
    card.write_text("My own words.")
    with pytest.raises(
        FileExistsError, match=r"README\.md: already exists; set overwrite, or --overwrite, to replace it"
    ):
        model.save_pretrained(tmp_path / "x", card=True)
    model.save_pretrained(tmp_path / "x")
    assert card.read_text() == "My own words."
    model.save_pretrained(tmp_path / "x", card=True, overwrite=True)
    assert card.read_text() != "My own words."


@pytest.mark.parametrize(
    ("details", "message"),
    [
        (CardDetails(thresholds={"nothing": 0.5}), "thresholds: expected classes of the model, got 'nothing'"),
        (CardDetails(evaluation={"AP": "high"}), "AP: expected a number, got 'high'"),
    ],
)
def test_details_that_do_not_fit_are_errors(model, tmp_path, details, message):
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "x", card=details)
    assert not (tmp_path / "x").exists()
