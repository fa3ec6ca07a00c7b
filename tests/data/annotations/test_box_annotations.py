"""Box annotations: boxes follow their objects in every crop, COCO and VOC agree, and invalid boxes are rejected."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unmask.batch import NO_BOX, ImageSpec
from unmask.data.annotations.box_annotations import BoxError, open_boxes
from unmask.data.augment import CropConfig, cut_boxes
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, eval_batches, training_batches
from unmask.metrics import average_precision as average_precision_module
from unmask.metrics.average_precision import average_precision, true_boxes

SPEC = ImageSpec(3, (40, 48), "uint8", (0.0,) * 3, (1.0,) * 3)
SIZE = (60, 80)
OBJECTS = {  # (x1, y1, x2, y2), class
    "a": [((10, 20, 34, 44), "cat"), ((50, 5, 70, 15), "dog")],
    "b": [((0, 0, 80, 60), "dog")],
    "c": [],
}


def images(root, names=OBJECTS, folder="JPEGImages"):
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = np.zeros((*SIZE, 3), np.uint8)
        for (x1, y1, x2, y2), _ in OBJECTS.get(name, []):
            pixels[y1:y2, x1:x2] = 255
        Image.fromarray(pixels).save(root / folder / f"{name}.png")
    return root


def xml(objects, size=SIZE):
    parts = "".join(
        f"<object><name> {name} </name><bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for (x1, y1, x2, y2), name in objects
    )
    return f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>{parts}</annotation>"


def voc(root, objects=OBJECTS, folder="Annotations", **more):
    images(root)
    (root / folder).mkdir(exist_ok=True)
    for name, found in objects.items():
        (root / folder / f"{name}.xml").write_text(xml(found, **more))
    return root


def coco(root, objects=OBJECTS, **change):
    """Write a COCO data set. change: replaces parts of the file."""
    images(root, folder="images")
    number = {"cat": 7, "dog": 3}
    said = {
        "images": [{"id": i, "file_name": f"{name}.png", "height": 60, "width": 80} for i, name in enumerate(objects)],
        "categories": [{"id": one, "name": name} for name, one in number.items()],
        "annotations": [
            {"image_id": i, "category_id": number[name], "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for i, found in enumerate(objects.values())
            for (x1, y1, x2, y2), name in found
        ],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "x.json").write_text(json.dumps(said | change))
    return root


def by_name(boxes):
    return {
        boxes.source.names[row].rsplit("/")[-1][0]: [
            (tuple(box), boxes.classes[label])
            for box, label in zip(boxes.boxes[row].tolist(), boxes.labels[row], strict=True)
        ]
        for row in boxes.rows.tolist()
    }


@pytest.mark.parametrize("kind", ["random_resized", "random"])
def test_boxes_stay_around_their_object_in_every_crop(tmp_path, kind):
    voc(tmp_path, {"a": OBJECTS["a"][:1]})
    Image.fromarray(bright(SIZE, OBJECTS["a"][0][0])).save(tmp_path / "JPEGImages" / "a.png")
    boxes = open_boxes(tmp_path)
    data = ImageReader(boxes.source, boxes.rows, SPEC, CropConfig(kind=kind, eval_share=0.6), annotations=boxes)
    kept = places = 0
    for delivery in training_batches(data, MicroBatches(0, 20, 5), workers=0):
        batch = delivery.batch
        assert batch.boxes is not None
        assert batch.box_labels is not None
        assert batch.boxes.shape == (20, 1, 4)
        assert batch.boxes.dtype == torch.float32
        assert batch.box_labels.shape == (20, 1)
        for image, (box,), (label,) in zip(batch.images[:, 0], batch.boxes, batch.box_labels, strict=True):
            ys, xs = (image > 128).nonzero(as_tuple=True)
            if int(label) == NO_BOX:
                assert not box.any()
                continue
            kept += 1
            places += float(box[0]) < 1
            around = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (box - around).abs().max() < 1.1, "they differ only by the blur of the edge"
    assert kept > 50
    assert 0 < places < kept, "the edge cuts some boxes but not all"


def bright(size, box):
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def test_cut_boxes_agrees_with_hand_computed_boxes():
    boxes = np.array([[10.0, 20, 30, 40], [0, 0, 10, 10], [18, 10, 30, 20], [14, 28, 15, 34], [8, 10, 18.1, 20]])
    crop = np.array([10.0, 8, 20, 20])  # (top, left, height, width)
    found, keep = cut_boxes(boxes, crop, (40, 20), False)  # resampled to twice its height and the same width
    assert keep.tolist() == [True, False, True, True, True]
    assert found[0].tolist() == [2, 20, 20, 40]
    assert found[2].tolist() == [10, 0, 20, 20]
    turned, _ = cut_boxes(boxes, crop, (40, 20), True)
    assert turned[0].tolist() == [0, 20, 18, 40]
    assert turned[2].tolist() == [0, 0, 10, 20]
    _, keep = cut_boxes(np.array([[0.0, 0, 10, 10]] * 2 + [[0, 0, 4, 4]]), np.array([0, 7.9, 20, 20]), (20, 20), False)
    assert keep.tolist() == [True, True, False]
    _, keep = cut_boxes(np.array([[0.0, 0, 10, 10]]), np.array([0, 8.1, 20, 20]), (20, 20), False)
    assert not keep[0], "boxes with less than a fifth of their area in the crop are dropped"
    _, keep = cut_boxes(np.array([[0.0, 0, 3, 10], [0, 0, 5, 5]]), np.array([0, 0.0, 20, 20]), (5, 5), False)
    assert keep.tolist() == [False, True], "boxes of which less than a pixel is left are dropped"


def test_evaluation_uses_the_whole_image_and_all_boxes(tmp_path):
    boxes = open_boxes(coco(tmp_path))
    data = ImageReader(boxes.source, boxes.rows, SPEC, CropConfig(), training=False, annotations=boxes, whole=True)
    (batch,) = eval_batches(data, boxes.rows, batch=3)
    assert batch.boxes is not None
    assert batch.box_labels is not None
    scale = torch.tensor([48 / 80, 40 / 60] * 2)
    assert batch.box_labels.tolist() == [[1, 0], [0, NO_BOX], [NO_BOX, NO_BOX]]
    for (x1, y1, x2, y2), found in zip([one[0] for one in OBJECTS["a"]], batch.boxes[0], strict=True):
        torch.testing.assert_close(found, torch.tensor([x1, y1, x2, y2]) * scale)
    assert not batch.boxes[2].any()
    assert len(batch[1:]) == 2
    again = batch.join([batch[:1], batch[1:]])
    assert torch.equal(again.boxes, batch.boxes)
    assert again.maps is None


def test_coco_and_voc_give_the_same_boxes(tmp_path):
    one, two = open_boxes(coco(tmp_path / "coco")), open_boxes(voc(tmp_path / "voc"))
    assert by_name(one) == by_name(two) == OBJECTS
    assert one.classes == ("dog", "cat"), "classes have the order of COCO's ids"
    assert two.classes == ("cat", "dog"), "in alphabetical order"
    assert one.most == two.most == 2
    assert one.sizes == {0: SIZE, 1: SIZE, 2: SIZE}
    beside = voc(tmp_path / "beside", folder="JPEGImages")
    assert by_name(open_boxes(beside / "JPEGImages")) == OBJECTS
    named = open_boxes(tmp_path / "voc", tmp_path / "coco" / "annotations" / "x.json")
    assert by_name(named) == OBJECTS
    assert [line.strip() for line in one.lines()] == [
        "3 annotated images, 3 boxes (at most 2 in an image), 2 classes",
        "2 boxes in 2 images  dog",
        "1 boxes in 1 images  cat",
    ]


def test_split_selects_the_listed_images(tmp_path):
    root = voc(tmp_path)
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb 1\nc -1\ngone\n")
    found = open_boxes(root, split="train")
    assert list(by_name(found)) == ["a", "b"]
    assert found.missing == ["gone"]
    assert "1 images that are not annotated or not in split 'train' are left out: c.png" in found.lines()
    assert "1 images that are annotated or listed are missing: gone" in found.lines()
    with pytest.raises(BoxError, match=r"test\.txt does not exist .* choose one of train"):
        open_boxes(root, split="test")
    (lists / "train.txt").write_text("JPEGImages/a.png\n")
    with pytest.raises(BoxError, match="without folder and extension"):
        open_boxes(root, split="train")


def test_boxes_left_out_are_counted(tmp_path):
    objects = {
        "a": [
            ((-0.6, 0, 10, 10), "cat"),  # Clipped, not reported.
            ((-4, 0, 10, 10), "cat"),  # Clipped.
            ((-40, 0, 10, 10), "cat"),  # Mostly outside.
            ((90, 10, 95, 20), "dog"),  # Outside.
            ((10, 10, 10, 30), "dog"),  # No area.
            ((30, 30, 20, 40), "dog"),  # Corners in the wrong order.
        ],
        "c": [((1, 1, 5, 5), "dog")],
        "gone": [((0, 0, 9, 9), "dog")],
    }
    found = open_boxes(voc(tmp_path, objects))
    assert by_name(found) == {"a": [((0, 0, 10, 10), "cat")] * 2, "c": objects["c"]}
    assert dict(found.faults) == {"outside": 2, "empty": 2, "cut": 1}
    said = found.lines()
    assert "1 images without annotation are left out: b.png" in said
    assert "1 images that are annotated or listed are missing: gone.xml" in said
    assert "1 boxes extend outside their image and are clipped to it: a.png" in said
    crowd = [
        {"image_id": 0, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 0},
    ]
    crowded = open_boxes(coco(tmp_path / "coco", annotations=crowd))
    assert by_name(crowded) == {"a": [], "b": [((0, 0, 9, 9), "dog")], "c": []}
    assert {row: ([tuple(box) for box in boxes.tolist()], labels.tolist()) for row, (boxes, labels) in
            crowded.aside.items()} == {0: ([(0, 0, 9, 9)], [0])}  # fmt: skip
    said = "1 boxes of crowds or difficult objects are used neither for training nor for evaluation: a.png"
    assert said in [line.replace("images/", "") for line in crowded.lines()]


def test_difficult_objects_of_voc_affect_neither_training_nor_score(tmp_path):
    root = voc(tmp_path)
    file = root / "Annotations" / "a.xml"
    first, rest = file.read_text().split("</object>", 1)
    file.write_text(f"{first}<difficult>1</difficult></object>{rest}")
    found = open_boxes(root)
    assert by_name(found) == OBJECTS | {"a": OBJECTS["a"][1:]}
    row = found.source.names.index("a.png")
    true = true_boxes(found, row)
    assert true.boxes.tolist() == [[50, 5, 70, 15], [10, 20, 34, 44]]
    assert true.crowd is not None
    assert true.crowd.tolist() == [False, True]
    dog, cat = (found.classes.index(name) for name in ("dog", "cat"))
    assert true.labels.tolist() == [dog, cat]
    easy = np.array([[50, 5, 70, 15]], float)
    for boxes, labels in ((easy, [dog]), (true.boxes, [dog, cat])):  # predictions without and with the difficult object
        answer = average_precision_module.ImageBoxes(boxes, np.array(labels), np.linspace(0.5, 0.9, len(labels)))
        assert average_precision([true], [answer], found.classes).ap == pytest.approx(1.0)


def test_unreadable_image_is_skipped(tmp_path):
    root = voc(tmp_path)
    (root / "JPEGImages" / "a.png").write_bytes(b"text")
    assert open_boxes(root).rows.tolist() == [1, 2]


# ------------------------------------------------------------------------------------------------------------- refusals

CASES = {
    "size": (lambda root: voc(root, size=(30, 40)), r"a\.png has 60 x 80 pixels .* expects 30 x 40"),
    "no box": (lambda root: voc(root, {"c": []}), "has no box for the 1 images"),
    "no pair": (
        lambda root: voc(root, {"x": []}),
        r"none of 1 annotated images .* name x\.xml, but the images are a\.png",
    ),
    "nothing": (images, "found no boxes for .*, or a file or folder named with --annotations"),
    "two files": (lambda root: second(coco(root)), r"2 JSON files .*annotations/x\.json, .*annotations/y\.json"),
    "no categories": (lambda root: coco(root, categories=[]), "category_id 7, at least one of which"),
    "no image": (lambda root: coco(root, images=[]), "has image_id 0"),
    "no bbox": (
        lambda root: coco(root, annotations=[{"image_id": 0, "category_id": 3}]),
        r"annotations\[0\] of .* has no 'bbox'; expected COCO's",
    ),
    "not numbers": (
        lambda root: coco(root, annotations=[{"image_id": 0, "category_id": 3, "bbox": [1, 2, None, 4]}]),
        r"annotations\[0\] of .*, for a\.png, has the box \[1, 2, None, 4\]; expected four numbers",
    ),
    "a list": (lambda root: text(coco(root), "annotations/x.json", "[1]"), "got a list, perhaps of predictions"),
    "no JSON": (lambda root: text(coco(root), "annotations/x.json", "{"), "cannot be read .*JSONDecodeError"),
    "no XML": (lambda root: text(voc(root), "Annotations/a.xml", "<a>"), r"a\.xml cannot be read"),
    "entities": (
        lambda root: text(voc(root), "Annotations/a.xml", '<!DOCTYPE a [<!ENTITY b "cat">]><annotation/>'),
        r"a\.xml declares a document type or entities",
    ),
    "no name": (
        lambda root: text(voc(root), "Annotations/a.xml", "<annotation><object/></annotation>"),
        r"a\.xml has an object without name or bndbox",
    ),
    "twice": (
        lambda root: images(coco(root), ["a"], "more"),
        r"a\.png of .* matches several images, images/a\.png or more/a\.png",
    ),
}


def second(root):
    return text(root, "annotations/y.json", "{}")


def text(root, name, content):
    (root / name).write_text(content)
    return root


@pytest.mark.parametrize("name", CASES)
def test_invalid_box_annotations_are_rejected(tmp_path, name):
    make, said = CASES[name]
    with pytest.raises(BoxError, match=said):
        open_boxes(make(tmp_path))


def test_a_coco_file_beside_the_folder_of_images_is_found(tmp_path):
    root = coco(tmp_path)
    assert by_name(open_boxes(root / "images")) == by_name(open_boxes(root))
    (root / "annotations" / "x.json").rename(root / "instances.json")
    assert len(open_boxes(root / "images").rows) == 3


def test_class_unknown_to_the_model_is_rejected(tmp_path):
    root = voc(tmp_path)
    assert open_boxes(root, classes=("bird", "dog", "cat")).labels[0].tolist() == [2, 1]
    with pytest.raises(BoxError, match=r"unknown class 'dog'; expected one of 2 classes \(bird, cat\)"):
        open_boxes(root, classes=("bird", "cat"))
    with pytest.raises(BoxError, match="do not exist"):
        open_boxes(root, root / "none.json")


def test_voc_splits_of_blood_cells_are_read(tmp_path):
    """Uses the layout of BCCD: Annotations, JPEGImages and the lists in ImageSets/Main."""
    classes, rng = ("Platelets", "RBC", "WBC"), np.random.default_rng(0)
    cells = {
        f"BloodImage_{number:05d}": [
            ((x, y, x + 12, y + 10), classes[kind])
            for kind, (x, y) in enumerate(rng.integers(0, 45, (3, 2)).tolist())
        ]
        for number in range(15)
    }  # fmt: skip
    root, names = voc(tmp_path, cells), sorted(cells)
    images(root, cells)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, part in {"train": names[:9], "val": names[9:11], "test": names[11:]}.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(part) + "\n")
    train, test = open_boxes(root, split="train"), open_boxes(root, split="test")
    assert train.classes == test.classes == classes
    assert (len(train.rows), len(test.rows)) == (9, 4)
    assert not set(train.rows) & set(test.rows)
    assert not train.faults
