import pytest

from conditional_detr.checkpoints.model_card import read_licence


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
