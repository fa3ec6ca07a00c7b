"""The detector: assignment of boxes to cells, the loss against values computed by hand, and overfitting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from unmask.batch import Batch, ImageSpec
from unmask.config import Config as Root
from unmask.config import method_class, method_names
from unmask.engine.device import autocast
from unmask.errors import UserError
from unmask.method import Clock
from unmask.metrics.average_precision import ImageBoxes, average_precision
from unmask.nn.vit import ViTConfig
from unmask.optim import OptimConfig, make_optimizer, update
from unmask.rng import Draws
from unmask.tasks import detect
from unmask.tasks.detect import Config, Detector, Found, Guess

SIDE = 64
NAMES = ("rectangle", "disc")
INF = float("inf")


def spec(channels=3, size=(SIDE, SIDE), dtype="uint8"):
    return ImageSpec(channels, size, dtype, (60.0,) * channels, (60.0,) * channels)


def config(last_blocks=None, **more):
    encoder = ViTConfig(width=32, depth=2, heads=2, patch=(8, 8))
    return Config(**{"encoder": encoder, "classes": NAMES, "last_blocks": last_blocks, "width": 24, "convs": 1} | more)


def make(last_blocks=None, *, images=None, seed=0, **more):
    torch.manual_seed(seed)
    return Detector(config(last_blocks, **more), images or spec())


def drawn(count=8, *, channels=3, size=(SIDE, SIDE), dtype="uint8"):
    """Return images with one bright object on noise, alternately a rectangle and a disc, padded to two boxes."""
    rng, (high, wide) = np.random.default_rng(0), size
    images = rng.integers(0, 60, (count, channels, high, wide))
    y, x = np.mgrid[:high, :wide]
    boxes = np.zeros((count, 2, 4), np.float32)
    for number in range(count):
        h, w = rng.integers(10, 28, 2) if number % 2 == 0 else (2 * rng.integers(6, 14),) * 2
        top, left = rng.integers(0, high - h), rng.integers(0, wide - w)
        inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
        if number % 2:
            inside &= (y + 0.5 - top - h / 2) ** 2 + (x + 0.5 - left - w / 2) ** 2 < (h / 2) ** 2
        images[number][:, inside] += 150
        boxes[number, 0] = left, top, left + w, top + h
    labels = torch.stack([torch.arange(count) % 2, torch.full((count,), -1)], 1)
    which = torch.arange(count)
    images = torch.from_numpy(images.astype(dtype))
    return Batch(images, which, torch.zeros_like(which), boxes=torch.from_numpy(boxes), box_labels=labels)


def clock(of):
    return Clock(0, 1, Draws(0, of.epoch, of.index))


def loss(method, of):
    return method(of, clock(of))


def learn(method, of, steps, lr=2e-3):
    optimizer, losses = make_optimizer(method, OptimConfig()), []
    for _ in range(steps):
        value = loss(method, of).value
        value.backward()
        update(optimizer, lr, value.detach(), None)
        losses.append(float(value.detach()))
    return losses


def precision(method, of):
    truth = [ImageBoxes(b[y >= 0].numpy(), y[y >= 0].numpy()) for b, y in zip(of.boxes, of.box_labels, strict=True)]
    method.eval()
    found = [ImageBoxes(one.boxes.numpy(), one.labels.numpy(), one.scores.numpy()) for one in method.predict(of.images)]
    return average_precision(truth, found, NAMES)


def cells_of(strides, size):
    """Return the cells of an image of (H, W) pixels, and the rows and columns of each level."""
    shapes = [torch.Size((size[0] // high, size[1] // wide)) for high, wide in strides]
    strides = tuple((float(high), float(wide)) for high, wide in strides)
    return detect.make_cells(strides, shapes, torch.device("cpu")), shapes


def naive_truth(strides, shapes, boxes, labels):
    """Compute label, sides in cells and centreness of each cell of one image with plain loops."""
    claims, cell = [], 0  # (cell, box, whether the level fits, target of the cell)
    for number, ((high, wide), (rows, cols)) in enumerate(zip(strides, shapes, strict=True)):
        least, most = (4 if number else 0), (8 if number < len(strides) - 1 else INF)
        for row, col in np.ndindex(rows, cols):
            x, y = (col + 0.5) * wide, (row + 0.5) * high
            for box, ((x1, y1, x2, y2), label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
                left, up, right, down = sides = (x - x1) / wide, (y - y1) / high, (x2 - x) / wide, (y2 - y) / high
                near = abs(x - (x1 + x2) / 2) < 1.5 * wide and abs(y - (y1 + y2) / 2) < 1.5 * high
                if label >= 0 and near and min(sides) > 0:
                    middle = min(left, right) / max(left, right) * min(up, down) / max(up, down)
                    learned = ((x2 - x1) * (y2 - y1), label, list(sides), middle**0.5)
                    claims.append((cell, box, least < max(sides) <= most, learned))
            cell += 1
    fitted = {box for _, box, fits, _ in claims if fits}
    best = {}
    for cell_, box, fits, learned in claims:
        if (fits or box not in fitted) and learned[0] < best.get(cell_, (INF,))[0]:
            best[cell_] = learned
    return [best.get(n, (INF, -1, [1.0] * 4, 0.0))[1:] for n in range(cell)]


@pytest.mark.parametrize("strides", [((4, 4), (8, 8), (16, 16)), ((4, 8), (8, 16), (16, 32)), ((16, 16),)])
def test_assignment_of_boxes_to_cells_matches_plain_loops(strides):
    rng = np.random.default_rng(0)
    cells, shapes = cells_of(strides, (128, 192))
    length = rng.integers(1, 120, (3, 12, 2))
    length[:, 0], length[:, 1], length[:, 2] = 126, (150, 6), (5, 120)
    start = rng.integers(0, (192, 128) - length)
    boxes = torch.from_numpy(np.concatenate([start, start + length], 2)).float()
    labels = torch.from_numpy(rng.integers(-1, 2, (3, 12)))
    truth = detect.assign(cells, boxes, labels)
    for number in range(3):
        label, sides, centreness = zip(*naive_truth(strides, shapes, boxes[number], labels[number]), strict=True)
        assert truth.label[number].tolist() == list(label)
        torch.testing.assert_close(truth.sides[number], torch.tensor(sides))
        torch.testing.assert_close(truth.centreness[number], torch.tensor(centreness))
    level = torch.repeat_interleave(torch.arange(len(shapes)), torch.tensor([r * c for r, c in shapes]))
    assert set(level[(truth.label >= 0).any(0)].tolist()) == set(range(len(shapes))), "every level has boxes"


def test_every_box_above_a_size_is_assigned_to_a_cell():
    """The size ranges of the levels have no gap, wherever a box lies; a cell of the finest level is 4 x 4 pixels."""
    cells, _ = cells_of(((4, 4), (8, 8), (16, 16)), (256, 256))
    rng = np.random.default_rng(0)
    length = rng.integers(5, 200, (400, 2))
    start = rng.integers(0, 256 - length + 1)
    boxes = torch.from_numpy(np.concatenate([start, start + length], 1)).float()[:, None]
    truth = detect.assign(cells, boxes, torch.zeros(400, 1, dtype=torch.int64))
    assert (truth.label == 0).any(1).all()


def test_the_loss_matches_a_value_computed_by_hand():
    truth = detect.Truth(
        torch.tensor([[1, -1, 0]]),
        torch.tensor([[[1.0, 2, 3, 4], [1, 1, 1, 1], [2, 2, 2, 2]]]),
        torch.tensor([[0.4, 0.0, 1.0]]),
    )
    torch.manual_seed(0)
    guess = Guess(torch.randn(1, 3, 2), torch.rand(1, 3, 4) + 0.5, torch.randn(1, 3))
    p, c = guess.classes[0].double().sigmoid(), guess.centreness[0].double().sigmoid()
    classes = 0.0
    for cell, label in enumerate([1, -1, 0]):
        for k in range(2):
            q = p[cell, k]
            classes += -0.25 * (1 - q) ** 2 * q.log() if k == label else -0.75 * q**2 * (1 - q).log()
    centreness = -(0.4 * c[0].log() + 0.6 * (1 - c[0]).log()) - c[2].log()

    def giou(a, b):
        """Compute the GIoU of boxes given by the distances from one cell to their sides: the overlap has the smaller of
        each pair of distances, the hull the larger.
        """
        size, low, high = (lambda s: (s[0] + s[2]) * (s[1] + s[3])), torch.minimum(a, b), torch.maximum(a, b)
        union = size(a) + size(b) - size(low)
        return size(low) / union - (size(high) - union) / size(high)

    sides = sum(w * (1 - giou(guess.sides[0, n], truth.sides[0, n])) for n, w in ((0, 0.4), (2, 1.0))) / 1.4
    got = detect.error(guess, truth)
    want = {"classes": classes / 2, "boxes": sides, "centreness": centreness / 2}
    assert {k: float(v) for k, v in got.logs.items()} == {k: pytest.approx(float(v), rel=1e-5) for k, v in want.items()}
    assert float(got.value) == pytest.approx(float(sum(want.values())), rel=1e-5)


def test_selected_box_is_the_one_predicted_by_the_cell():
    """Three cells of 4 x 8 pixels predict a box: a confident one in row 1, column 2, a neighbour with nearly the same
    box, and a less confident cell elsewhere.
    """
    cells, _ = cells_of(((4, 8),), (16, 32))
    guess = Guess(torch.full((16, 3), -9.0), torch.ones(16, 4), torch.zeros(16))
    for cell, logit, sides in ((6, 2.0, (1, 0.5, 4, 1)), (7, 1.0, (2, 0.5, 3, 1)), (12, 0.0, (0.5, 0.5, 0.5, 0.5))):
        guess.classes[cell, 2 if cell > 5 else 0] = logit
        guess.sides[cell] = torch.tensor(sides)
    found = detect.select(guess, cells, (16, 32))
    assert isinstance(found, Found)
    assert found.labels.tolist() == [2, 2]
    assert found.boxes.tolist() == [[12, 4, 32, 10], [0, 12, 8, 16]]
    torch.testing.assert_close(found.scores, (torch.tensor([2.0, 0.0]).sigmoid() * 0.5).sqrt())


def test_loss_has_fixed_shapes_and_never_synchronises():
    """On the meta device tensors have no values, so a loss that reads a value or has a value-dependent shape would
    fail.
    """
    method, of = make().to("meta"), drawn().to("meta")
    value = loss(method, of).value
    value.backward()
    assert value.device.type == "meta"


@pytest.mark.parametrize("last_blocks", [0, 0.5, 1, 2, None])
def test_last_blocks_selects_the_trained_parameters(last_blocks):
    method, of = make(last_blocks), drawn(16)
    of.boxes[0, 1], of.box_labels[0, 1] = torch.tensor([0.0, 0, 64, 60]), 0  # so that the second level has a box
    of.boxes[1, 1], of.box_labels[1, 1] = torch.tensor([0.0, 0, 64, 50]), 1
    stays = {name: value.clone() for name, value in method.state_dict().items()}
    learn(method, of, 3)
    loss(method, of).value.backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert reached == trained
    assert {name for name, now in method.state_dict().items() if not torch.equal(stays[name], now)} == trained
    blocks = {0: set(), 0.5: {1}, 1: {1}, 2: {0, 1}, None: {0, 1}}[last_blocks]
    inside = {name for name in trained if name.startswith("encoder.")}
    assert {int(name.split(".")[2]) for name in inside if ".blocks." in name} == blocks
    assert ("encoder.cls_token" in inside) == (last_blocks in (2, None))
    assert not any(name.startswith("encoder.norm.") for name in inside), (
        "detection does not use the norm of the encoder"
    )
    assert {name.split(".")[0] for name in trained} == {"pyramid", "head"} | ({"encoder"} if inside else set())


def test_padded_boxes_do_not_change_the_loss():
    method, of = make(), drawn()
    more = replace(
        of,
        boxes=torch.cat([of.boxes, torch.tensor([0.0, 0, 60, 60]).expand(8, 3, 4)], 1).flip(1),
        box_labels=torch.cat([of.box_labels, torch.full((8, 3), -1)], 1).flip(1),
    )
    want = loss(method, of).value
    torch.testing.assert_close(loss(method, more).value, want)
    torch.testing.assert_close(
        loss(method, replace(of, boxes=of.boxes[:, :1], box_labels=of.box_labels[:, :1])).value, want
    )
    assert loss(method, replace(more, box_labels=more.box_labels.clamp(min=0))).value != want


@pytest.mark.parametrize("room", [0, 2])
def test_images_without_a_box_are_all_background(room):
    method, of = make(), drawn()
    none = replace(of, boxes=torch.zeros(8, room, 4), box_labels=torch.full((8, room), -1))
    found = loss(method, none)
    assert found.value.isfinite()
    assert float(found.logs["classes"]) > 0
    assert float(found.logs["boxes"]) == float(found.logs["centreness"]) == 0
    losses = learn(method, none, 20)
    assert losses[-1] < 0.5 * losses[0]
    loss(method, none).value.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert method.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    assert all(len(one.boxes) == 0 for one in method.predict(none.images))
    with torch.no_grad():
        picture = method.picture(none, clock(none))
    assert torch.equal(picture.panels["true boxes"], none.images.float())
    assert all(number.isfinite() for number in picture.numbers.values())


def test_images_without_box_annotations_are_rejected():
    with pytest.raises(UserError, match=r"got images without boxes.*pass the file of boxes"):
        loss(make(), replace(drawn(), boxes=None))


def test_detector_overfits_and_the_picture_shows_its_boxes():
    pytest.importorskip("pycocotools")
    method, of = make(), drawn()
    assert precision(method, of).ap50 < 0.1
    losses = learn(method, of, 100, 4e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert precision(method, of).ap50 > 0.9
    best = [one.boxes[0] for one in method.predict(of.images)]
    assert (torch.stack(best) - of.boxes[:, 0]).abs().mean() < 4
    with torch.no_grad():
        picture = method.picture(of, clock(of))
    first, true, found = picture.panels.values()
    assert list(picture.panels) == ["original", "true boxes", "found boxes"]
    assert torch.equal(first, of.images.float())
    x1, y1, x2, y2 = of.boxes[0, 0].int().tolist()
    red = torch.tensor([255.0, 0, 0])[:, None]
    assert torch.equal(true[0, :, y1, x1:x2], red.expand(3, x2 - x1))
    assert torch.equal(true[0, :, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1], first[0, :, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1])
    assert (found != first).any()
    assert picture.note.startswith("8 true boxes; ")
    assert float(picture.numbers["loss"]) < 0.6 * float(picture.numbers["same_everywhere"])


def test_baseline_is_the_best_constant_prediction():
    method, of = make(), drawn()
    with torch.no_grad():
        guess, cells = method.guess(of.images)
    truth = detect.assign(cells, of.boxes, of.box_labels)
    trivial = float(detect.same_everywhere(truth, 2))
    mean = truth.sides[truth.label >= 0].mean(0)
    centreness = truth.centreness[truth.label >= 0].mean().logit()
    others = [
        Guess(
            torch.full_like(guess.classes, logit), mean.expand_as(guess.sides), centreness.expand_as(guess.centreness)
        )
        for logit in np.linspace(-8, 2, 41)
    ]
    best = min(float(detect.error(other, truth).value) for other in others)
    assert best == pytest.approx(trivial, rel=0.02)


def test_same_seed_gives_the_same_loss_and_weights_can_be_loaded():
    of, first, other = drawn(), make(), make(seed=1)
    learn(first, of, 2)
    again = make()
    learn(again, of, 2)
    want = loss(first, of)
    assert torch.equal(loss(again, of).value, want.value)
    assert loss(other, of).value != want.value
    other.load_state_dict(first.state_dict())
    assert torch.equal(loss(other, of).value, want.value)
    assert want.value.shape == ()
    assert all(log.shape == () and not log.requires_grad for log in want.logs.values())


@pytest.mark.parametrize(
    ("channels", "dtype", "size"),
    [(1, "uint8", (64, 64)), (5, "uint16", (64, 96)), (3, "float32", (96, 64)), (3, "uint8", (40, 56))],
)
def test_all_channels_dtypes_and_shapes_are_supported(channels, dtype, size):
    images = ImageSpec(channels, size, dtype, (60.0,) * channels, (60.0,) * channels)
    method, of = make(images=images), drawn(4, channels=channels, dtype=dtype, size=size)
    method.head.to_classes.bias.data.fill_(1.0)  # so that many boxes are found
    assert loss(method, of).value.isfinite()
    with torch.no_grad():
        picture = method.picture(of, clock(of))
    low, high = images.value_range
    for panel in picture.panels.values():
        assert panel.shape == of.images.shape
        assert panel.dtype == torch.float32
        assert panel.min() >= min(*low, float(of.images.float().min()))
        assert panel.max() <= max(*high, float(of.images.float().max()))
    assert (picture.panels["true boxes"] != picture.panels["original"]).any((1, 2, 3)).all()
    for one in method.predict(of.images):
        assert 0 < len(one.boxes) == len(one.scores) == len(one.labels) <= 100
        assert (one.scores[:-1] >= one.scores[1:]).all()
        assert (one.boxes >= 0).all()
        assert (one.boxes <= torch.tensor([size[1], size[0]] * 2)).all()


def test_larger_images_than_in_training_are_accepted():
    method, of = make(), drawn(2, size=(96, 128))
    assert loss(method, of).value.isfinite()
    guess, cells = method.guess(of.images)
    assert cells.centre.amax(0).tolist() == [126, 94]
    assert guess.classes.shape == (2, 24 * 32 + 12 * 16 + 6 * 8, 2)


def test_bf16_works_with_a_float32_loss():
    method, of = make(), drawn()
    want = float(loss(method, of).value.detach())
    with autocast("bf16", "cpu"):
        found = loss(method, of).value
        assert {part.dtype for part in method.guess(of.images)[0]} == {torch.float32}
        assert {one.boxes.dtype for one in method.predict(of.images)} == {torch.float32}
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(want, rel=0.03)
    found.backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("last_blocks", [-1, 0.25, 3])
def test_impossible_numbers_of_blocks_are_rejected(last_blocks):
    with pytest.raises(ValidationError, match=r"encoder of 2 blocks; expected 0 .* 0.5 .* whole number up to 2"):
        config(last_blocks)


def test_task_is_found_by_name_and_is_not_a_pre_training_method():
    assert method_class("detect") is Detector
    assert "detect" not in method_names()
    root = Root(method=config(1, classes=("one",)))
    assert Root.model_validate_json(root.model_dump_json()) == root


def test_initial_scores_are_low():
    method = make()
    with torch.no_grad():
        guess, _ = method.guess(drawn().images)
    assert float(guess.classes.sigmoid().mean()) == pytest.approx(0.01, rel=0.3)
    assert float(guess.sides.mean()) == pytest.approx(1, rel=0.1)


def test_stochastic_depth_applies_to_training_only():
    of, plain, method = drawn(), make(), make(drop_path=0.5)
    assert method.load_state_dict(plain.state_dict())
    assert loss(method, of).value != loss(plain, of).value
    assert torch.equal(loss(method, of).value, loss(method, of).value)
    other = method(of, Clock(0, 1, Draws(1, of.epoch, of.index)))
    assert other.value != loss(method, of).value
    with torch.no_grad():
        assert torch.equal(method.picture(of, clock(of)).numbers["loss"], loss(plain, of).value)
