"""Boxes: overlap compared with pixel counts, suppression compared with a plain loop, and outlines."""

import pytest
import torch

from unmask.nn.boxes import clip, giou, outline, pairwise_iou, suppress


def some(count, seed=0, side=20):
    """Boxes with whole-number corners, none of them empty."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(0, side, (count, 2), generator=draw)
    return torch.cat([start, start + torch.randint(1, side, (count, 2), generator=draw)], 1).float()


def pixels(box, side=40):
    x1, y1, x2, y2 = box.int().tolist()
    return {(x, y) for x in range(side) for y in range(side) if x1 <= x < x2 and y1 <= y < y2}


def test_iou_matches_pixel_counts():
    a, b = some(6), some(7, seed=1)
    want = [[len(pixels(p) & pixels(q)) / len(pixels(p) | pixels(q)) for q in b] for p in a]
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor(want))
    assert 0 < (torch.tensor(want) > 0).float().mean() < 1


def test_giou_subtracts_the_empty_share_of_the_hull():
    a, b = some(30), some(30, seed=1)
    want = []
    for p, q in zip(a, b, strict=True):
        hull = pixels(torch.cat([torch.minimum(p[:2], q[:2]), torch.maximum(p[2:], q[2:])]))
        union = pixels(p) | pixels(q)
        want.append(len(pixels(p) & pixels(q)) / len(union) - len(hull - union) / len(hull))
    torch.testing.assert_close(giou(a, b), torch.tensor(want))
    assert min(want) < 0 < max(want)
    torch.testing.assert_close(giou(a, a), torch.ones(30))
    uneven = torch.tensor([2.0, 0.5, 2.0, 0.5])
    torch.testing.assert_close(giou(a * uneven, b * uneven), giou(a, b))


def test_giou_gradient_moves_separate_boxes_together():
    box = torch.tensor([0.0, 0, 10, 10], requires_grad=True)
    giou(box, torch.tensor([50.0, 0, 60, 10])).backward()
    assert box.grad[2] > 0
    empty = torch.zeros(1, 4, requires_grad=True)
    giou(empty, torch.zeros(1, 4)).sum().backward()
    assert empty.grad.isfinite().all()


def naive(boxes, scores, labels, threshold):
    left, kept = sorted(range(len(boxes)), key=lambda n: -float(scores[n])), []
    while left:
        best, *left = left
        kept.append(best)
        left = [
            n
            for n in left
            if labels[n] != labels[best] or float(pairwise_iou(boxes[n : n + 1], boxes[best : best + 1])) <= threshold
        ]
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6])
def test_suppression_matches_the_greedy_loop(threshold):
    boxes, draw = some(60), torch.Generator().manual_seed(2)
    scores, labels = torch.rand(60, generator=draw), torch.randint(0, 3, (60,), generator=draw)
    kept = suppress(boxes, scores, labels, threshold)
    assert kept.tolist() == naive(boxes, scores, labels, threshold)
    assert len(kept) < 60


def test_suppressed_boxes_do_not_suppress_others():
    # The IoU is 0.62 for the first two boxes, 0.64 for the last two, and 0.4 for the first and the last.
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 16], [0, 0, 10, 25]])
    three = torch.tensor([0.9, 0.8, 0.7])
    assert suppress(boxes, three, torch.zeros(3, dtype=torch.int64), 0.5).tolist() == [0, 2]
    assert suppress(boxes, three, torch.tensor([0, 1, 2]), 0.5).tolist() == [0, 1, 2]
    nothing = suppress(boxes[:0], three[:0], torch.zeros(0, dtype=torch.int64), 0.5)
    assert nothing.shape == (0,)
    assert nothing.dtype == torch.int64


def test_clipping_distinguishes_height_and_width():
    assert clip(torch.tensor([[-5.0, -5, 90, 90]]), (30, 40)).tolist() == [[0, 0, 40, 30]]


def test_outline_draws_only_the_border():
    image = torch.zeros(2, 12, 16)
    drawn = outline(image, torch.tensor([[2.0, 3, 9, 8], [-4, -4, 99, 99]]), torch.tensor([[1.0, 5.0], [2.0, 6.0]]))
    want = torch.zeros(12, 16)
    want[3:8, 2:9] = 1
    want[4:7, 3:8] = 0
    want[[0, -1]], want[:, [0, -1]] = 2, 2
    assert torch.equal(drawn[0], want)
    assert torch.equal(drawn[1], torch.where(want > 0, want + 4, 0))
    assert not image.any()


def test_box_without_area_is_drawn_as_one_pixel():
    for corner in ([5.0, 5, 5, 5], [90.0, 90, 90, 90]):
        assert outline(torch.zeros(1, 12, 16), torch.tensor([corner]), torch.ones(1, 1)).sum() == 1
