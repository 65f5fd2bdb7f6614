"""Hooks of a run: callbacks, the optimizer, and matchers that are not ours."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conditional_detr import SetLoss
from conditional_detr.modeling.detection_transformer import Output
from conditional_detr.set_prediction.matcher import Matches
from conditional_detr.training import Callback, TrainConfig, train
from conditional_detr.training.checkpoints import STATE
from helpers.training_runs import Rectangles, small_model, steps_of

QUIET = {"progress": False}
SHORT = TrainConfig(epochs=2, batch_size=2, workers=0, ema=0.5)


class Recorder(Callback):
    """Counts steps, over resumed runs too, and measures a number of its own."""

    def __init__(self):
        self.calls, self.steps = [], torch.tensor(0)

    def begin(self, model, settings, folder):
        self.calls.append(("begin", settings["epochs"], folder.name))

    def step(self, entry):
        self.steps += 1
        self.calls.append(("step", entry["step"], set(entry)))

    def metrics(self, model, data):
        return {"images": len(data), "queries": model.config.num_queries}

    def epoch(self, model, entry):
        self.calls.append(("epoch", entry["epoch"], entry.get("images")))

    def end(self):
        self.calls.append("end")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"].clone()


def test_callbacks_see_steps_and_epochs_and_add_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder()
    data, val = Rectangles(4, noise=0.1), Rectangles(3, seed=1)
    result = train(small_model(), data, val, SHORT, folder=tmp_path / "run", callbacks=[recorder], **QUIET)
    numbers = {"step", "epoch", "loss", "class", "l1", "giou", "norm", "lr"}
    steps = [("step", i, numbers) for i in range(1, 5)]
    epochs = [("epoch", i, 3.0) for i in range(2)]
    begin = ("begin", 2, "run")
    assert recorder.calls == [begin, *steps[:2], epochs[0], *steps[2:], epochs[1], "end"]
    assert [(entry["images"], entry["queries"]) for entry in result.history] == [(3.0, 10.0)] * 2
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["images"] for entry in logged if "AP" in entry] == [3.0, 3.0]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("val/queries")] == [10.0, 10.0]
    train(small_model(), data, val, SHORT, folder=tmp_path / "plain", **QUIET)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "plain")


def test_the_state_of_callbacks_is_resumed_and_others_are_refused(tmp_path):
    one, data = replace(SHORT, epochs=1, schedule="constant"), Rectangles(4)
    train(small_model(), data, None, one, folder=tmp_path, callbacks=[Recorder()], **QUIET)
    two, again = replace(one, epochs=2), Recorder()
    with pytest.raises(ValueError, match=r"got callbacks \[\], not \['Recorder'\]"):
        train(small_model(), data, None, two, folder=tmp_path, resume=True, **QUIET)
    train(small_model(), data, None, two, folder=tmp_path, callbacks=[again], resume=True, **QUIET)
    assert (int(again.steps), sum(call[0] == "step" for call in again.calls)) == (4, 2)


def test_callbacks_end_after_an_error_and_its_message_has_the_checkpoint(tmp_path):
    class Failing(Recorder):
        def step(self, entry):
            if entry["step"] == 3:
                raise ValueError("no space on my board")

    failing, first = Failing(), Recorder()
    with pytest.raises(ValueError, match=r"no space on my board; the last good checkpoint is .*last, of step 2"):
        train(small_model(), Rectangles(4), None, SHORT, folder=tmp_path, callbacks=[first, failing], **QUIET)
    assert failing.calls[-1] == first.calls[-1] == "end"


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"AP": 1.0}, ValueError, "Recorder.metrics: expected names that are not in use, got 'AP'"),
        ({"mine": "much"}, TypeError, "Recorder.metrics: expected a number for 'mine', got 'much'"),
    ],
)
def test_wrong_metrics_are_refused(tmp_path, monkeypatch, metrics, error, message):
    monkeypatch.setattr(Recorder, "metrics", lambda *_: metrics)
    with pytest.raises(error, match=message):
        train(small_model(), Rectangles(2), Rectangles(2), SHORT, folder=tmp_path, callbacks=[Recorder()], **QUIET)


def test_what_is_no_callback_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"callbacks\[1\]: expected a Callback, got function"):
        train(small_model(), Rectangles(2), folder=tmp_path, callbacks=[Recorder(), lambda entry: None], **QUIET)


# ---- the optimizer


def test_sgd_takes_the_step_of_its_formula_and_is_resumed(tmp_path):
    """After one step: w - lr · gradient, the gradient by autograd of the loss of all images."""
    data, config = Rectangles(3), TrainConfig(epochs=1, batch_size=3, workers=0, lr=0.1, backbone_lr=0.01, clip=0)
    model, expected = small_model(dropout=0.0), small_model(dropout=0.0).train()

    def sgd(groups):
        return torch.optim.SGD(groups, momentum=0.9)

    train(model, data, None, replace(config, schedule="constant"), folder=tmp_path, optimizer=sgd, **QUIET)
    pixels = torch.stack([pixels for pixels, _ in data.samples])
    SetLoss()(expected(pixels), [target for _, target in data.samples])["total"].backward()
    for (name, got), before in zip(model.named_parameters(), expected.parameters(), strict=True):
        rate = 0.01 if name.startswith("backbone.") else 0.1
        change = torch.zeros(()) if before.grad is None else rate * before.grad
        torch.testing.assert_close(got.data, before.data - change, rtol=1e-4, atol=1e-6)
    again = replace(config, epochs=2, schedule="constant")
    with pytest.raises(ValueError, match="got optimizer 'AdamW', not 'SGD'"):
        train(small_model(dropout=0.0), data, None, again, folder=tmp_path, resume=True, **QUIET)
    train(small_model(dropout=0.0), data, None, again, folder=tmp_path, resume=True, optimizer=sgd, **QUIET)
    whole = tmp_path / "whole"
    train(small_model(dropout=0.0), data, None, again, folder=whole, optimizer=sgd, **QUIET)
    states = [torch.load(folder / "last" / STATE, weights_only=True)["optimizer"] for folder in (tmp_path, whole)]
    for i, moments in states[1]["state"].items():
        assert torch.equal(states[0]["state"][i]["momentum_buffer"], moments["momentum_buffer"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda groups: groups, TypeError, "optimizer: expected a function that returns a torch Optimizer, got"),
        (
            torch.optim.SGD([torch.zeros(1)]),
            TypeError,
            "optimizer: expected a function of parameter groups, got SGD",
        ),
        (lambda groups: torch.optim.SGD(groups[:1]), ValueError, "expected one of all parameters of the groups"),
        (
            lambda groups: torch.optim.SGD([p for group in groups for p in group["params"]], lr=0.1),
            ValueError,
            "optimizer: expected groups with initial_lr",
        ),
    ],
)
def test_wrong_optimizers_are_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        train(small_model(), Rectangles(2), folder=tmp_path / "run", optimizer=make, **QUIET)
    assert not (tmp_path / "run").exists()


# ---- matchers


class Given:
    """A matcher that always returns the same pairs."""

    def __init__(self, queries, targets, images):
        self.matches = Matches(*(torch.tensor(x) for x in (queries, targets, images)))

    def match(self, logits, boxes, targets):
        return self.matches

    def __repr__(self):
        return "Given()"


BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.5, 0.5, 0.4, 0.2], [0.1, 0.1, 0.2, 0.2]])


def one_layer():
    target = {"labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]])}
    return Output(torch.zeros(1, 1, 3, 2), BOXES[None, None].clone()), [target]


def test_the_pairs_of_another_matcher_decide_the_loss():
    """By hand: queries 0 and 1 for target 0, query 2 for target 1: L1 is 0, 0.2 and 0, over two targets.

    Query 1 is twice as wide as its target, and contains it: IoU and GIoU are 1/2.
    """
    output, targets = one_layer()
    losses = SetLoss(matcher=Given([[0, 1, 2]], [[0, 0, 1]], [0, 0, 0]))(output, targets)
    assert losses["l1"].tolist() == pytest.approx([0.2 / 2])
    assert losses["giou"].tolist() == pytest.approx([0.5 / 2])
    # focal terms of 6 logits of 0, p = 1/2: three are matched, alpha/4 · log 2, three are not, (1 - alpha)/4 · log 2
    assert losses["class"].tolist() == pytest.approx([3 * (0.25 + 0.75) / 4 * 0.6931472 / 2])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (([[0, 1]], [[0]], [0, 0]), r"expected queries and targets \(1, 2\), got \(1, 2\) and \(1, 1\)"),
        (([[0, 3]], [[0, 1]], [0, 0]), r"expected queries in 0\.\.2, got 0\.\.3"),
        (([[0, 1]], [[0, 2]], [0, 0]), r"expected targets in 0\.\.1, got 0\.\.2"),
        (([[0, 1]], [[0, 1]], [0, 1]), "expected pairs of a query and a target of the same image"),
        (([[1, 1]], [[0, 1]], [0, 0]), "expected each query in at most one pair, got one in several at layer 0"),
    ],
)
def test_wrong_pairs_are_refused(pairs, message):
    with pytest.raises(ValueError, match=f"matcher: {message}"):
        SetLoss(matcher=Given(*pairs))(*one_layer())


@pytest.mark.parametrize("kind", [tuple, lambda pairs: pairs._replace(queries=pairs.queries.float()), lambda _: None])
def test_what_is_no_matches_is_refused(kind):
    matcher = Given([[0, 1, 2]], [[0, 0, 1]], [0, 0, 0])
    matcher.matches = kind(matcher.matches)
    with pytest.raises(TypeError, match="matcher: expected Matches of int64 tensors on the CPU, got"):
        SetLoss(matcher=matcher)(*one_layer())


def test_a_run_with_another_matcher(tmp_path):
    """Each target with the query of the nearest centre, greedily; the check of the first epoch uses it, too."""

    class Nearest:
        calls = 0

        def match(self, logits, boxes, targets):
            Nearest.calls += 1
            queries = torch.zeros(len(boxes), len(targets.labels), dtype=torch.int64)
            for layer, of_layer in enumerate(boxes.cpu()):
                taken = set()
                for k, (image, box) in enumerate(zip(targets.images.tolist(), targets.boxes, strict=True)):
                    order = (of_layer[image, :, :2] - box[:2]).norm(dim=1).argsort().tolist()
                    queries[layer, k] = next(q for q in order if (image, q) not in taken)
                    taken.add((image, int(queries[layer, k])))
            return Matches(queries, torch.arange(len(targets.labels)).expand_as(queries), targets.images)

    criterion = SetLoss(matcher=Nearest())
    result = train(small_model(), Rectangles(4), None, SHORT, folder=tmp_path, criterion=criterion, **QUIET)
    assert (result.steps, Nearest.calls) == (4, 4 + 4)  # four images are checked after the first epoch
    assert result.first_epoch.targets == sum(len(target["labels"]) for _, target in Rectangles(4).samples)


# ---- what a callback must not return


class _Given(Callback):
    def __init__(self, metrics=None, state=None):
        self.given, self.state = metrics, state or {}

    def metrics(self, model, data):
        return self.given or {}

    def state_dict(self):
        return self.state


@pytest.mark.parametrize("state", [{"a": np.arange(3)}, {"a": Path("b")}, {"a": object}])
def test_a_state_that_could_not_be_read_again_is_refused_before_the_first_step(tmp_path, state):
    with pytest.raises(TypeError, match=r"^_Given\.state_dict: expected tensors, numbers"):
        train(small_model(), Rectangles(2), None, SHORT, folder=tmp_path, callbacks=[_Given(state=state)], **QUIET)
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize(
    ("metrics", "error", "message"),
    [
        ({"loss": 0.5}, ValueError, "expected names that are not in use, got 'loss'"),
        ({"waited": 0.5}, ValueError, "expected names that are not in use, got 'waited'"),
        ({3: 0.5}, TypeError, "expected a dict of names and numbers"),
        ([0.5], TypeError, "expected a dict of names and numbers"),
    ],
)
def test_metrics_that_the_log_could_not_tell_from_its_own(tmp_path, metrics, error, message):
    callbacks = [_Given(metrics)]
    with pytest.raises(error, match=message):
        train(small_model(), Rectangles(2), Rectangles(2), SHORT, folder=tmp_path, callbacks=callbacks, **QUIET)


def test_callbacks_may_come_from_an_iterator_but_not_alone(tmp_path):
    seen = []

    class Sees(Callback):
        def step(self, entry):
            seen.append(entry["step"])

    train(small_model(), Rectangles(2), None, SHORT, folder=tmp_path / "a", callbacks=iter([Sees()]), **QUIET)
    assert seen
    with pytest.raises(TypeError, match=r"expected a sequence of Callbacks, got one; pass \[callback\]"):
        train(small_model(), Rectangles(2), None, SHORT, folder=tmp_path / "b", callbacks=Sees(), **QUIET)
