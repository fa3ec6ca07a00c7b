"""Real-world box annotations: encodings, wrong types, fractions, and images with an EXIF orientation."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from unmask.data.annotations.box_annotations import BoxError, open_boxes
from unmask.data.annotations.orientation import turned_boxes
from unmask.data.decode.exif import apply_orientation

SIZE = (60, 80)  # as stored
BOX = (10, 20, 34, 44)


def photo(file, orientation=1, size=SIZE, box=BOX):
    """Write an image with a white box on black; `box` refers to the stored pixels."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, quality=95, exif=exif)


def around_white(file):
    """Return the white box in coordinates of the displayed image."""
    with Image.open(file) as image:
        ys, xs = np.nonzero(np.asarray(ImageOps.exif_transpose(image))[:, :, 0] > 128)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def coco(root, orientations, boxes=BOX, sizes=SIZE, **more):
    x1, y1, x2, y2 = boxes
    images, annotations = [], []
    for number, orientation in enumerate(orientations):
        photo(root / "images" / f"{number}.jpg", orientation)
        images.append({"id": number, "file_name": f"{number}.jpg"})
        if sizes is not None:
            images[-1] |= {"height": sizes[0], "width": sizes[1]}
        annotations.append({"image_id": number, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    said = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cat"}]} | more
    (root / "annotations.json").write_text(json.dumps(said))
    return root


@pytest.mark.parametrize("sizes", [SIZE, None])
def test_boxes_on_stored_pixels_are_rotated_with_their_image(tmp_path, sizes):
    """Without sizes in the file, a box that extends outside the displayed image reveals the orientation."""
    box = BOX if sizes else (50, 20, 78, 40)
    root = coco(tmp_path, range(1, 9), box, sizes)
    for number in range(8):
        photo(root / "images" / f"{number}.jpg", number + 1, box=box)
    found = open_boxes(root)
    for row in found.rows.tolist():
        wanted = around_white(root / "images" / f"{row}.jpg")
        assert np.abs(found.boxes[row][0] - wanted).max() <= 1, f"orientation {row + 1}"
    assert any(
        "7 images have an EXIF orientation, and their boxes, which refer to the stored" in line
        for line in found.lines()
    )
    some = open_boxes(root, only={2})
    assert some.boxes[2].tolist() == found.boxes[2].tolist(), "all images are examined, even if only some are opened"


def test_boxes_on_displayed_images_are_not_rotated(tmp_path):
    root = coco(tmp_path, [6, 3], sizes=None)
    said = json.loads((root / "annotations.json").read_text())
    said["images"][0] |= {"height": 80, "width": 60}
    (root / "annotations.json").write_text(json.dumps(said))
    found = open_boxes(root)
    assert [found.boxes[row][0].tolist() for row in (0, 1)] == [list(BOX)] * 2
    assert any("1 images have an EXIF orientation that does not change their size" in line for line in found.lines())


def test_undecidable_orientation_is_rejected(tmp_path):
    root = coco(tmp_path, [6, 6, 3])
    said = json.loads((root / "annotations.json").read_text())
    said["images"][0] |= {"height": 80, "width": 60}
    (root / "annotations.json").write_text(json.dumps(said))
    with pytest.raises(BoxError, match=r"2\.jpg, which has an EXIF orientation, this cannot be decided"):
        open_boxes(root)
    (root / "images" / "2.jpg").unlink()
    assert len(open_boxes(root).rows) == 2, "the orientation of the other images is known"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_are_rotated_like_pixels_in_pillow(orientation):
    ids = np.zeros(SIZE, np.uint8)
    ids[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 7
    image = Image.fromarray(ids)
    image.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(image))
    assert (apply_orientation(ids, orientation) == wanted).all()
    ((x1, y1, x2, y2),) = turned_boxes(np.array([BOX]), orientation, wanted.shape).tolist()
    assert (wanted[y1:y2, x1:x2] == 7).all()
    assert (wanted == 7).sum() == (y2 - y1) * (x2 - x1)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("gb2312", "汽车"), ("gbk", "汽車"), ("big5", "汽車"), ("euc-kr", "자동차"), ("shift_jis", "自動車"),
        ("utf-8", "Vögel"), ("utf-16", "Vögel"), ("iso-8859-1", "Vögel"), ("windows-1252", "Vögel"),
    ],
)  # fmt: skip
def test_voc_is_read_in_the_encoding_it_declares(tmp_path, encoding, name):
    photo(tmp_path / "a.jpg")
    text = (
        f'<?xml version="1.0" encoding="{encoding}"?>\n<annotation><object><name>{name}</name><bndbox><xmin>11</xmin>'
        "<ymin>21</ymin><xmax>34</xmax><ymax>44</ymax></bndbox></object></annotation>"
    )
    (tmp_path / "a.xml").write_bytes(text.encode(encoding))
    found = open_boxes(tmp_path)
    assert found.classes == (name,)
    assert found.boxes[0].tolist() == [list(BOX)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "declares the unknown encoding 'klingon'"),
        (b'<?xml version="1.0" encoding="utf-8"?><a>\xff\xfe</a>', "is not valid utf-8, the encoding it declares"),
        ("<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b 'x'>]><a/>".encode("utf-16"), "document type or entities"),
        (b"", "cannot be read"),
    ],
)
def test_undecodable_xml_is_rejected(tmp_path, content, said):
    photo(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_bytes(content)
    with pytest.raises(BoxError, match=said):
        open_boxes(tmp_path)


# --------------------------------------------------------------------------------------------------------- wrong types

IMAGE, CATEGORY = {"id": 0, "file_name": "0.jpg"}, {"id": 1, "name": "cat"}
OBJECT = {"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}
LONG = 10**400
WRONG = [None, [], {}, [1], True, 1.5, float("nan"), "", "text", LONG]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: repr(wrong)[:9])
@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("images", None), ("categories", None), ("annotations", None), ("images", "id"), ("images", "file_name"),
        ("images", "height"), ("categories", "id"), ("categories", "name"), ("annotations", "image_id"),
        ("annotations", "category_id"), ("annotations", "bbox"), ("annotations", "iscrowd"),
    ],
)  # fmt: skip
def test_unexpected_values_in_coco_are_read_or_rejected(tmp_path, part, key, wrong):
    root = coco(tmp_path, [1])
    good = {"images": [IMAGE], "categories": [CATEGORY], "annotations": [OBJECT]}
    if key is None:
        whole = good | {part: wrong}
        entry = good | {part: [wrong]}
    else:
        whole = entry = good | {part: [good[part][0] | {key: wrong}]}
    for content in (whole, entry):
        (root / "annotations.json").write_text(json.dumps(content))
        said = ""
        try:
            open_boxes(root)
        except BoxError as error:
            said = str(error)
        assert not said or "annotations.json" in said
        assert len(said) < 600


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"annotations": [OBJECT, OBJECT | {"image_id": [0]}]}, r"annotations\[1\] of .* has the image_id \[0\]"),
        ({"images": [IMAGE, {"id": 1, "file_name": ["a"]}]}, r"images\[1\] of .* has the file_name \['a'\]"),
        ({"categories": [CATEGORY, {"id": "x", "name": "dog"}]}, "both numbers and text as ids"),
        ({"annotations": {}}, r"'annotations' of .* is \{\}; expected a list"),
    ],
)
def test_error_names_the_wrong_entry(tmp_path, change, said):
    with pytest.raises(BoxError, match=said):
        open_boxes(coco(tmp_path, [1], **change))


def test_unicode_spellings_of_a_category_are_one_class(tmp_path):
    categories = [{"id": 1, "name": "Vögel"}, {"id": 2, "name": "Vo\u0308gel"}]
    found = open_boxes(coco(tmp_path, [1], categories=categories))
    assert found.classes == ("V\u00f6gel",)
    assert open_boxes(tmp_path, classes=("Vo\u0308gel",)).labels[0].tolist() == [0], (
        "earlier versions stored names unnormalised"
    )


def test_coco_boxes_in_fractions_are_rejected(tmp_path):
    boxes = [OBJECT | {"bbox": [0.25, 0.5, 0.5, 0.25]}, OBJECT | {"bbox": [0.1, 0.2, 0.3, 0.9]}]
    with pytest.raises(BoxError, match=r"2 of 2 boxes of .* are fractions .* 0\.jpg; expected pixels: multiply"):
        open_boxes(coco(tmp_path / "coco", [1], annotations=boxes, images=[IMAGE]))
    pixels = [OBJECT | {"bbox": [0.5, 0.5, 30.5, 40]}, OBJECT | {"bbox": [0, 0, 1, 1]}]
    assert len(open_boxes(coco(tmp_path / "pixels", [1], annotations=pixels)).boxes[0]) == 2


def test_voc_boxes_in_fractions_are_rejected(tmp_path):
    for name, corners in (("fractions", (0.25, 0.5, 0.5, 0.75)), ("pixels", (1, 1, 2, 2))):
        photo(tmp_path / name / "0.jpg")
        tags = "".join(
            f"<{tag}>{at}</{tag}>" for tag, at in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        )
        (tmp_path / name / "0.xml").write_text(
            f"<annotation><object><name>dog</name><bndbox>{tags}</bndbox></object></annotation>"
        )
    with pytest.raises(BoxError, match=r"1 of 1 boxes of .*fractions are fractions .* 0\.xml; expected pixels"):
        open_boxes(tmp_path / "fractions")
    assert open_boxes(tmp_path / "pixels").boxes[0].tolist() == [[0, 0, 2, 2]]


def test_coco_boxes_written_as_corners_are_reported(tmp_path):
    boxes = [OBJECT | {"bbox": [30, 20, 70, 50]}, OBJECT | {"bbox": [50, 30, 79, 59]}]
    found = open_boxes(coco(tmp_path, [1], annotations=boxes))
    assert any("would fit if they were corners" in line for line in found.lines())
