"""Test fine-tuning on labels, masks and boxes, held-out test images, stopping and resuming, and prediction."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import pretrain
from faults import error_before
from PIL import Image
from safetensors.torch import load_file

from unmask.config import ConfigError, override
from unmask.console import Console
from unmask.data.annotations.segmentation_masks import MaskOptions
from unmask.data.files.csv_cells import unmarked
from unmask.engine import resolve
from unmask.engine.load import load, read_config, read_plan
from unmask.errors import UserError
from unmask.finetuning import choose_recipe, configure, final_test, finetune_run, paper_linear_probe
from unmask.finetuning.choose_recipe import task_for
from unmask.finetuning.finetune_run import FinetuneOptions
from unmask.finetuning.predict_images import PredictOptions, predict
from unmask.recipes.catalogue import find
from unmask.results import TestIdentity, read_results, read_score
from unmask.run import Run
from unmask.tasks.classify import Classifier

SIZE = 16
SMALL = [
    "data.size=16", "method.encoder.width=32", "method.encoder.depth=2", "method.encoder.heads=2",
    "method.decoder.width=16", "method.decoder.depth=1", "method.decoder.heads=1", "train.steps=4",
    "train.batch_size=8", "data.workers=0",
]  # fmt: skip
QUICK = ["train.steps=40", "train.batch_size=16", "data.workers=0", "train.test_every=20", "optim.base_lr=0.05"]

ON_CPU = PredictOptions(device="cpu")
QUIET = Console(quiet=True)


def coloured(folder, each=12, seed=0):
    """Two classes that differ in colour."""
    random = np.random.default_rng(seed)
    for name, colour in (("blue", (40, 60, 200)), ("red", (200, 60, 40))):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            noise = random.integers(-40, 40, (20, 24, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    return coloured(tmp_path_factory.mktemp("data") / "test", each=6, seed=1)


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory):
    return pretrain(data, recipe="mae_nano", out=tmp_path_factory.mktemp("runs") / "pre", settings=SMALL)


def tune(pretrained, data, out, *more, **options):
    options, how = dict(options), {name: options.pop(name) for name in ("budget", "console") if name in options}
    asked = FinetuneOptions(settings=[*QUICK, *more], **options)
    return finetune_run.finetune(pretrained.path, str(data), asked, out=out, **how)


@pytest.fixture(scope="module")
def tuned(pretrained, data, tests, tmp_path_factory):
    return tune(pretrained, data, tmp_path_factory.mktemp("runs") / "tuned", test=str(tests))


def test_fine_tuning_learns_and_reports_its_test_accuracy(tuned, tests):
    found = read_score(tuned)
    assert (found.metric, found.value, found.numbers) == ("accuracy", 1.0, {"accuracy": 1.0})
    assert (found.correct, found.test_images) == (12, 12)
    assert found.low < 1 == found.high
    assert found.test.images.name == str(tests)
    assert found.best.step in (20, 40)
    assert [row["step"] for row in tuned.metrics() if "test_accuracy" in row] == [20, 40]


def test_report_shows_the_test_accuracy(tuned):
    from unmask.report.run_page import write_report

    page = write_report(tuned.path).read_text("utf-8")
    assert "accuracy 100.0% on 12 test images" in page
    assert "Quality of the features" not in page
    assert page.count("<svg") == 2, "one chart shows the loss and one the tests"


def test_without_test_images_a_fifth_is_held_out_from_training(pretrained, data, tmp_path):
    run = tune(pretrained, data, tmp_path / "run")
    plan = read_plan(run)
    assert len(plan.test_rows) == 4
    assert set(plan.test_rows) <= set(plan.excluded)
    assert plan.num_images == 20
    assert read_score(run).test_images == 4
    assert read_score(run).test == TestIdentity(held_out=0.2, seed=0)


def test_shots_limit_the_labels_and_choose_the_recipe(pretrained, data, tests, tmp_path):
    run = tune(pretrained, data, tmp_path / "run", test=str(tests), shots=3)
    assert read_plan(run).num_images == 6
    assert read_config(run).recipe == "finetune_few"
    assert read_config(run).optim.layer_decay < 1


@pytest.mark.parametrize("recipe", ["scratch_few", "scratch_base", "finetune_few", "finetune_base"])
def test_initial_head_is_small_only_on_pre_trained_weights(pretrained, recipe):
    classes = ("one", "other")
    assert configure.config_from_run(pretrained, classes, recipe, from_scratch=True).method.head_std == 0.02
    assert configure.config_from_run(pretrained, classes, "finetune_few").method.head_std is None


@pytest.mark.parametrize(("size", "share"), [(224, 0.875), (384, 1.0), (448, 1.0)])
def test_evaluation_crop_follows_maes_protocol_at_every_size(size, share):
    """MAE's util/datasets.py uses the central 224 of 256 pixels for sizes up to 224, else the whole square."""
    tuned = find("finetune_base").model_copy(update={"recipe": "finetune_base"})
    asked = [f"data.size={size}", "method.encoder.patch=16"]
    assert resolve.resolve_config(tuned, asked).data.crop.eval_share == share
    assert resolve.resolve_config(find("mae_base"), [f"data.size={size}"]).data.crop.eval_share == share
    assert resolve.resolve_config(tuned, [*asked, "data.crop.eval_share=0.9"]).data.crop.eval_share == 0.9
    larger = override(find("mae_base"), [f"data.size={size}"])
    assert configure.finetuning_config(larger, ("one", "other"), "finetune_base").data.crop.eval_share == share
    assert resolve.resolve_config(find("dvae_dalle"), []).data.crop.eval_share == 0.875, (
        "DALL-E's value for a size of 256"
    )


@pytest.mark.parametrize(
    ("width", "labelled", "from_scratch", "name"),
    [
        (192, 500, False, "finetune_few"), (192, 5_000, False, "finetune_some"), (192, 50_000, False, "finetune_nano"),
        (192, 50_000, True, "scratch_nano"), (768, 500, False, "finetune_few"), (768, 50_000, False, "finetune_base"),
        (1024, 50_000, False, "finetune_large"), (1280, 50_000, False, "finetune_huge"),
        (1280, 50_000, True, "scratch_large"), (192, 100, True, "scratch_few"),
    ],
)  # fmt: skip
def test_recipe_is_chosen_by_encoder_and_number_of_labels(width, labelled, from_scratch, name):
    from unmask.nn.vit import ViTConfig

    encoder = ViTConfig(width=width, depth=1, heads=1)
    assert choose_recipe.choose_recipe(Classifier, encoder, labelled, from_scratch=from_scratch)[0] == name
    assert name in choose_recipe.finetuning_recipes()


def test_from_scratch_starts_from_random_weights_and_averages_them(pretrained, data, tests, tmp_path):
    run = tune(pretrained, data, tmp_path / "run", "train.steps=2", test=str(tests), from_scratch=True)
    assert read_config(run).method.head_std == 0.02, "a std of 2e-5 is only for pre-trained weights"
    assert read_config(run).graft == ()
    found = read_score(run)
    assert found.initial_run is None
    assert 0 <= found.averaged <= 1


def test_only_the_last_blocks_are_trained(pretrained, data, tests, tmp_path):
    run = tune(pretrained, data, tmp_path / "run", "train.steps=2", test=str(tests), last_blocks=1)
    before, after = load(pretrained.path).method.state_dict(), load(run.path).method.state_dict()
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    assert "encoder.blocks.0.attn.qkv.weight" in same
    assert "encoder.blocks.1.attn.qkv.weight" not in same


def test_resumed_run_equals_the_uninterrupted_run(tuned, pretrained, data, tests, tmp_path):
    with error_before(25, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        tune(pretrained, data, tmp_path / "run", "train.checkpoint_every=10", test=str(tests))
    run = finetune_run.resume(tmp_path / "run")
    whole, again = load(tuned.path).method.state_dict(), load(run.path).method.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [row["step"] for row in run.metrics() if "test_accuracy" in row] == [20, 40]


@pytest.mark.parametrize("with_test", [False, True])
def test_unreadable_images_are_left_out_of_training_and_test(pretrained, data, tests, tmp_path, with_test):
    mixed = coloured(tmp_path / "mixed")
    for number in range(8):  # some of them are among the images that are held out for the test
        (mixed / "blue" / f"broken{number}.png").write_bytes(b"nothing")
    more, settings = {"test": str(tests)} if with_test else {}, ("data.max_bad_fraction=0.5", "train.steps=10")
    with error_before(5, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        tune(pretrained, mixed, tmp_path / "run", *settings, **more)
    run = finetune_run.resume(tmp_path / "run")
    plan = read_plan(run)
    names = [file.name for file in sorted(mixed.rglob("*.png"))]
    assert run.finished
    assert plan.num_images + len(plan.test_rows) == 24
    assert not [row for row in plan.test_rows if names[row].startswith("broken")]
    assert read_score(run).test_images == (12 if with_test else len(plan.test_rows)) > 0


def test_resumed_run_repeats_every_kind_of_augmentation(pretrained, data, tests, tmp_path):
    everything = [
        "method.mixup=0.8", "method.cutmix=1", "method.rand_augment=9", "method.erasing=0.5", "method.drop_path=0.3",
        "optim.average=0.9", "train.steps=6", "train.checkpoint_every=3", "train.test_every=6",
    ]  # fmt: skip
    whole = tune(pretrained, data, tmp_path / "whole", *everything, test=str(tests))
    with error_before(5, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        tune(pretrained, data, tmp_path / "run", *everything, test=str(tests))
    run = finetune_run.resume(tmp_path / "run")
    want, got = load(whole.path).method.state_dict(), load(run.path).method.state_dict()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert read_score(whole).averaged == read_score(run).averaged
    kept = load_file(run.checkpoints / "step-00000006" / "optim.safetensors")
    assert {"head.weight/average", "head.weight/exp_avg"} <= kept.keys(), "earlier versions read these names"


@pytest.mark.parametrize("name", ["out.csv", "out.json", "out.parquet"])
def test_predictions_use_the_class_names(tuned, tests, tmp_path, name):
    summary = predict(tuned.path, [str(tests)], tmp_path / name, options=ON_CPU, console=QUIET)
    assert summary.images == 12
    assert summary.classes == {"blue": 6, "red": 6}
    if name == "out.csv":
        rows = list(csv.DictReader((tmp_path / name).read_text().splitlines()))
    elif name == "out.json":
        rows = json.loads((tmp_path / name).read_text())
    else:
        rows = pq.read_table(tmp_path / name).to_pylist()
    assert [row["path"].split("/")[0] for row in rows] == [row["class"] for row in rows]
    assert float(rows[0]["p(blue)"]) + float(rows[0]["p(red)"]) == pytest.approx(1, abs=1e-5)


def test_csv_table_contains_no_spreadsheet_formulas(tuned, tests, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(("=cmd|'x'!A1.png", "-1.png", "plain.png")):
        (images / name).write_bytes((tests / "red" / f"{number}.png").read_bytes())
    predict(tuned.path, [str(images)], tmp_path / "a.csv", options=ON_CPU, console=QUIET)
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["path"] for row in rows] == ["'-1.png", "'=cmd|'x'!A1.png", "plain.png"]
    assert [unmarked(row["path"]) for row in rows] == ["-1.png", "=cmd|'x'!A1.png", "plain.png"]


def test_unwritable_output_is_reported_before_images_are_read(tuned, tests, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "unmask.finetuning.predict_images.open_images", lambda images: pytest.fail("the images were opened")
    )
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match="which is a folder; give the name of a file"):
        predict(tuned.path, [str(tests)], tmp_path / "folder.csv", options=ON_CPU, console=QUIET)
    with pytest.raises(UserError, match="does not exist; create it"):
        predict(tuned.path, [str(tests)], tmp_path / "no" / "a.csv", options=ON_CPU, console=QUIET)


def test_commands_that_do_not_apply_to_a_classifier_are_rejected(tuned, tests, tmp_path):
    from unmask.evals.reconstruct_images import reconstruct_images

    quiet = Console(quiet=True)
    with pytest.raises(UserError, match=r"was fine-tuned to classify and cannot reconstruct; use `unmask predict"):
        reconstruct_images(tuned.path, [str(tests)], tmp_path / "a.png", step=None, seed=0, device="cpu", console=quiet)
    with pytest.raises(UserError, match=r"got --min-score 0.3; only boxes have scores"):
        predict(tuned.path, [str(tests)], tmp_path / "a.csv", PredictOptions(device="cpu", min_score=0.3), quiet)


def test_predict_rejects_a_run_that_is_not_fine_tuned(pretrained, tests, tmp_path):
    with pytest.raises(UserError, match=r"expected a fine-tuned run; fine-tune it first"):
        predict(pretrained.path, [str(tests)], tmp_path / "x.csv", options=ON_CPU, console=QUIET)


def test_invalid_options_are_rejected_before_training(pretrained, data, tests, tmp_path):
    with pytest.raises(ConfigError, match="pre-trains without labels"):
        tune(pretrained, data, tmp_path / "a", recipe="mae_nano")
    with pytest.raises(ConfigError, match=r"got --task detect and recipe segment_nano, which is for --task segment"):
        tune(pretrained, data, tmp_path / "a", task="detect", recipe="segment_nano")
    with pytest.raises(ConfigError, match="got --last-blocks 1 with --task linear_probe, which cannot train the last"):
        tune(pretrained, data, tmp_path / "a", task="linear_probe", last_blocks=1)
    with pytest.raises(ConfigError, match=r"method.values cannot be set: .*--mask-values"):
        tune(pretrained, data, tmp_path / "a", "method.values=[1,2]", task="segment")
    with pytest.raises(ConfigError, match=r"method.head=linear, which has no width"):
        tune(pretrained, data, tmp_path / "a", "method.head=linear", "method.width=8", task="segment")
    with pytest.raises(ConfigError, match="frozen random blocks"):
        tune(pretrained, data, tmp_path / "a", from_scratch=True, last_blocks=1)
    with pytest.raises(ConfigError, match="encoder of 2 blocks"):
        tune(pretrained, data, tmp_path / "a", last_blocks=7)
    with pytest.raises(UserError, match="got --shots 5000"):
        tune(pretrained, data, tmp_path / "a", shots=5000)
    with pytest.raises(UserError, match="at least two classes"):
        tune(pretrained, data / "red", tmp_path / "a")
    with pytest.raises(ConfigError, match="give --test"):
        tune(pretrained, data, tmp_path / "a", "data.test=elsewhere")
    with pytest.raises(ConfigError, match=r"got both --last-blocks and method.last_blocks"):
        tune(pretrained, data, tmp_path / "a", "method.last_blocks=1", last_blocks=1)
    assert not (tmp_path / "a").exists()


def test_the_task_follows_from_the_recipe_unless_it_is_given():
    assert task_for(None, "auto") == "classify"
    assert task_for(None, "segment_nano") == "segment"
    assert task_for("detect", "auto") == "detect"
    with pytest.raises(ConfigError, match="pre-trains without labels"):
        task_for(None, "mae_nano")


def test_test_images_of_unknown_classes_are_rejected(pretrained, data, tmp_path):
    other = coloured(tmp_path / "other")
    (other / "red").rename(other / "green")
    with pytest.raises(UserError, match="green"):
        tune(pretrained, data, tmp_path / "a", test=str(other))


def test_pretrain_rejects_supervised_recipes_and_runs(tuned, data, tmp_path):
    with pytest.raises(ConfigError, match="finetune_few learns from labels"):
        pretrain(data, recipe="finetune_few", out=tmp_path / "a")
    with pytest.raises(ConfigError, match="is a run of classify, which learns from labels"):
        pretrain(data, from_run=tuned.path, out=tmp_path / "a")
    small = [setting for setting in SMALL if not setting.startswith("data.size")]
    again = pretrain(data, from_run=tuned.path, recipe="mae_nano", out=tmp_path / "a", settings=small)
    assert read_config(again).graft[0].source == "encoder."


def test_pretrain_rejects_test_every(data, tmp_path):
    with pytest.raises(ConfigError, match="is not tested on annotated images"):
        pretrain(data, recipe="mae_nano", out=tmp_path / "a", settings=["train.test_every=3"])
    assert Run(tmp_path / "a").path.exists() is False


# Masks and boxes


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Images that are dark left and bright right of a random column, with masks of the two parts; id 7 is void."""
    root, random = tmp_path_factory.mktemp("street"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for number in range(count):
            edge = random.integers(6, 18)
            mask = np.zeros((20, 24), np.uint8)
            mask[:, edge:] = 1
            pixels = np.where(mask[..., None] == 1, 200, 50) + random.integers(-20, 20, (20, 24, 3))
            mask[:2] = 7
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / part / f"{number}.png")
            Image.fromarray(mask).save(root / "labels" / part / f"{number}.png")
    (root / "labels" / "classes.txt").write_text("dark\nbright\n")
    return root


def test_segmentation_trains_tests_resumes_and_predicts(pretrained, street, tmp_path):
    options = {"task": "segment", "test": str(street / "images" / "test"), "ignored": (7,)}
    more = ["method.head=linear", "train.steps=60", "train.test_every=60", "data.size=[16,24]", "optim.base_lr=0.2"]
    run = tune(pretrained, street / "images" / "train", tmp_path / "run", *more, **options)
    found = read_score(run)
    assert found.value > 0.9
    assert found.classes == ("dark", "bright")
    assert set(found.by_class) == {"dark", "bright"}
    assert found.metric == "mean_iou"
    assert np.sum(found.confusion) > 0
    assert load(run.path).method.encoder.grid == (4, 6), "positions were resized from 4 x 4"
    summary = predict(run.path, [str(street / "images" / "test")], tmp_path / "out", options=ON_CPU, console=QUIET)
    assert summary.images == 4
    truth = np.array(Image.open(street / "labels" / "test" / "0.png"))
    with Image.open(tmp_path / "out" / "0.png") as picture:
        given = np.array(picture)
        assert picture.mode == "P"
    assert (given == truth)[truth != 7].mean() > 0.9
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["dark", "bright"]
    table = {"image": [(street / "images" / "test" / f"{number}.png").read_bytes() for number in range(4)] * 2}
    table["path"] = ["..", ".", "x" * 300 + ".png", "a:b\\c.png", "/etc/x.png", "a.png/x.png", "a.png", "A.png"]
    pq.write_table(pa.table(table), tmp_path / "odd.parquet")
    odd = predict(run.path, [str(tmp_path / "odd.parquet")], tmp_path / "odd", options=ON_CPU, console=QUIET)
    assert odd.images == 8
    files = json.loads((tmp_path / "odd" / "files.json").read_text())
    assert set(files) == {"..", ".", "x" * 300 + ".png", "a:b\\c.png", "/etc/x.png", "A.png"}
    written = {file.relative_to(tmp_path / "odd").as_posix() for file in (tmp_path / "odd").rglob("*.png")}
    written -= {"a.png"}  # a folder
    assert len(written) == 8
    assert set(files.values()) <= written
    with pytest.raises(UserError, match="is not empty"):
        predict(run.path, [str(street)], tmp_path / "out", options=ON_CPU, console=QUIET)


def test_segmentation_with_mask_values_0_and_255_resumes_and_predicts(pretrained, tmp_path):
    random, root = np.random.default_rng(0), tmp_path / "binary"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for number in range(12):
        mask = np.zeros((20, 28), np.uint8)
        mask[:, : random.integers(8, 20)] = 255
        pixels = np.where(mask[..., None] == 255, 200, 50) + random.integers(-20, 20, (20, 28, 3))
        exif = Image.Exif()
        exif[0x0112] = (1, 6)[number % 2]
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"{number}.png", exif=exif)
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    more = ["method.head=linear", "train.steps=60", "data.size=16", "optim.base_lr=0.2"]
    with pytest.raises(UserError, match="--mask-values 0,255"):
        tune(pretrained, root, tmp_path / "run", *more, task="segment")
    run = tune(pretrained, root, tmp_path / "run", *more, task="segment", mask_options=MaskOptions((0, 255)))
    settings = read_config(run).method
    assert settings.values == (0, 255)
    assert settings.stored_pixels
    assert read_score(run).value > 0.8, "an image rotated differently from its mask would have a far lower score"
    assert final_test.measure_run(run) == read_score(run), "a reopened run has the same score"
    predict(run.path, [str(root / "images")], tmp_path / "out", options=ON_CPU, console=QUIET)
    with Image.open(tmp_path / "out" / "1.png") as picture:
        found = np.asarray(picture)
    assert found.shape == (28, 20)
    assert set(np.unique(found).tolist()) == {0, 255}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Images of one bright square on noise, with its box in COCO's format."""
    root, random = tmp_path_factory.mktemp("cells"), np.random.default_rng(0)
    images, annotations = [], []
    for number in range(12):
        pixels = random.integers(0, 60, (48, 64, 3))
        top, left, side = random.integers(0, 24), random.integers(0, 40), random.integers(14, 24)
        pixels[top : top + side, left : left + side] = 220
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        box = [int(left), int(top), int(side), int(side)]
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "area": int(side) ** 2})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}
    (root / "boxes.json").write_text(json.dumps(content))
    return root


def test_detection_trains_tests_and_predicts_in_pixels_of_the_file(pretrained, cells, tmp_path):
    pytest.importorskip("pycocotools", reason="average precision is pycocotools'")
    more = [
        "method.width=32", "method.convs=1", "train.steps=150", "train.test_every=150", "data.size=[32,32]",
        "optim.base_lr=0.06", "data.crop.scale=[0.8,1]",
    ]  # fmt: skip
    run = tune(pretrained, cells, tmp_path / "run", *more, task="detect")
    found = read_score(run)
    assert found.value > 0.5
    assert found.test_images == 2
    assert found.by_class == {"square": found.numbers["ap50"]}
    out = tmp_path / "out.json"
    predict(run.path, [str(cells)], out, options=ON_CPU, console=QUIET)
    given, truth = json.loads(out.read_text()), json.loads((cells / "boxes.json").read_text())
    sure = predict(run.path, [str(cells)], out, PredictOptions(device="cpu", min_score=0.5), QUIET)
    kept = json.loads(out.read_text())["annotations"]
    assert kept == [{**a, "id": i} for i, a in enumerate(a for a in given["annotations"] if a["score"] >= 0.5)]
    assert 0 < sum(sure.classes.values()) == len(kept) < len(given["annotations"])
    best = max((a for a in given["annotations"] if a["image_id"] == 0), key=lambda a: a["score"])
    name = given["images"][0]["file_name"]
    wanted = truth["annotations"][int(name.removesuffix(".png"))]["bbox"]
    assert best["bbox"] == pytest.approx(wanted, abs=8)
    assert given["categories"] == [{"id": 0, "name": "square"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "describe"}, "expected one of classify, detect, linear_probe, segment"),
        ({"split": "train"}, "only boxes have lists"),
        ({"annotations": "x"}, "reads classes from sub-folders"),
        ({"ignored": (3,)}, "only masks have ids"),
        ({"test_split": "test"}, "without --test"),
        ({"task": "segment"}, "found no masks"),
        ({"task": "detect", "data": "cells", "shots": 100}, "got --shots 100; expected 1 to"),
        ({"task": "detect"}, "found no boxes"),
        ({"task": "detect", "recipe": "finetune_few", "data": "cells"}, "is for --task classify"),
        (
            {"task": "segment", "data": "cells", "settings": ["method.head=linear", "method.width=8"]},
            "linear, which has no width",
        ),
        ({"settings": ["data.size=100000"]}, "625,000,000 patches of 4 x 4 pixels; expected at most 262,144"),
        ({"settings": ["data.size=33"]}, "patch size 4 of the initial weights; use 32 or 36"),
        ({"settings": ["train.micro_batch=1", "method.mixup=0.8", "train.steps=1"]}, "cutmix mix at least two"),
    ],
)
def test_task_that_does_not_fit_the_data_is_rejected(pretrained, data, cells, tmp_path, options, message):
    options = dict(options)
    data = cells if options.pop("data", None) else data
    settings = options.pop("settings", [])
    with pytest.raises(UserError, match=message):
        tune(pretrained, data, tmp_path / "a", *settings, **options)
    assert not (tmp_path / "a").exists() or settings, "a fault that only a training step reveals leaves a failed run"


def test_paper_linear_probe_is_a_run_inside_the_run(pretrained, data, tests, tmp_path):
    import shutil

    run = tmp_path / "pre"
    shutil.copytree(pretrained.path, run)
    summary = paper_linear_probe.paper_linear(
        run, str(data), test=str(tests), settings=["train.steps=60", "data.workers=0"]
    )
    assert (summary.rows[0].value, summary.rows[0].pool) == (1.0, "cls")
    inner = Run(run / summary.run)
    assert read_config(inner).optim.name == "lars"
    assert read_plan(inner).batch_size == 16, "16384 is only used for larger data sets"
    before, after = load(run).method.state_dict(), load(inner.path).method.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("encoder."))
    assert after["norm.running_mean"].abs().sum() > 0
    assert (run / "evals/probe-paper-linear-train.json").exists()
    assert "60 steps" in summary.protocol
    assert summary in read_results(Run(run)).probes
    again = paper_linear_probe.paper_linear(
        run, str(data), test=str(tests), settings=["train.steps=2", "data.workers=0"]
    )
    assert again.run == "paper-linear-train-2", "the second probe gets a folder of its own"
    assert len(list((run / "evals").glob("probe-paper-linear-*.json"))) == 2


def test_shared_training_and_test_images_cause_a_warning_or_an_error(pretrained, data, tests, tmp_path, capsys):
    import shutil

    with pytest.raises(ConfigError, match="all 24 test images are also training images"):
        tune(pretrained, data, tmp_path / "a", test=str(data))
    mixed = tmp_path / "mixed"
    shutil.copytree(tests, mixed)
    shutil.copy(data / "red" / "3.png", mixed / "red" / "leaked.png")
    run = tune(pretrained, data, tmp_path / "a", "train.steps=1", test=str(mixed))
    assert any("1 test images are also training images" in reason for reason in read_plan(run).reasons)
    assert "red/leaked.png" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["method.classes=[1,2]", "data.mean=[1,2,3]", "data.std=[1,2,3]"])
def test_settings_determined_by_data_or_weights_are_rejected(pretrained, data, tmp_path, key):
    with pytest.raises(ConfigError, match="cannot be set"):
        tune(pretrained, data, tmp_path / "a", key)


def test_resume_rejects_changed_masks(pretrained, street, tmp_path):
    import shutil

    root = tmp_path / "street"
    shutil.copytree(street, root)
    more = [
        "method.head=linear",
        "train.steps=6",
        "train.test_every=6",
        "data.size=[16,24]",
        "train.checkpoint_every=2",
    ]
    with error_before(4, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        tune(pretrained, root / "images" / "train", tmp_path / "run", *more, task="segment", ignored=(7,))
    mask = np.zeros((20, 24), np.uint8)
    mask[5] = 1
    Image.fromarray(mask).save(root / "labels" / "train" / "0.png")
    with pytest.raises(UserError, match=r"masks or boxes .* have changed"):
        finetune_run.resume(tmp_path / "run")
    shutil.copy(street / "labels" / "train" / "0.png", root / "labels" / "train" / "0.png")
    assert read_score(finetune_run.resume(tmp_path / "run")).step == 6


def test_classes_outside_the_split_are_ignored(pretrained, cells, tmp_path):
    pytest.importorskip("pycocotools", reason="average precision is pycocotools'")
    root = tmp_path / "voc"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for number in range(6):
        Image.open(cells / f"{number}.png").save(root / "JPEGImages" / f"{number}.png")
        name = "other" if number == 5 else "square"
        (root / "Annotations" / f"{number}.xml").write_text(
            f"<annotation><filename>{number}.png</filename><size><width>64</width><height>48</height></size><object>"
            f"<name>{name}</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>"
            "</annotation>"
        )
    (root / "ImageSets/Main/train.txt").write_text("0\n1\n2\n3\n4\n")
    more = ["method.width=16", "method.convs=1", "train.steps=1", "data.size=[32,32]"]
    run = tune(pretrained, root, tmp_path / "run", *more, task="detect", split="train")
    assert read_score(run).classes == ("square",)


# Tests of how image files are decoded


def banded(folder, pages=0):
    """TIFFs of two classes, either with four bands (the last tagged as alpha) or with several gray pages."""
    tifffile = pytest.importorskip("tifffile")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            values = random.integers(20, 230, (pages, 24, 24) if pages else (24, 24, 4), np.uint8)
            how = {"photometric": "minisblack"} if pages else {"photometric": "rgb", "extrasamples": ["unassalpha"]}
            tifffile.imwrite(folder / name / f"{number}.tif", values, **how)
    return folder


def test_predict_decodes_files_like_the_training(tmp_path):
    before = pretrain(banded(tmp_path / "bands"), recipe="mae_nano", out=tmp_path / "pre", settings=[*SMALL])
    tuned = tune(before, tmp_path / "bands", tmp_path / "tuned", "train.steps=1")
    assert read_plan(before).reading.tagged == "band"
    assert read_plan(tuned).reading.alpha == "band", "the encoder was trained with this setting"
    one = tmp_path / "one.tif"  # without the run's settings, the last band would be read as alpha
    values = np.full((24, 24, 4), 255, np.uint8)
    pytest.importorskip("tifffile").imwrite(one, values, photometric="rgb", extrasamples=["unassalpha"])
    done = predict(tuned.path, [str(one)], tmp_path / "classes.csv", options=ON_CPU, console=QUIET)
    assert (done.images, done.left_out) == (1, 0)


def test_pages_as_samples_are_rejected_for_labelled_files(tmp_path):
    data = banded(tmp_path / "pages", pages=3)
    before = pretrain(data, recipe="mae_nano", out=tmp_path / "pre", settings=[*SMALL, "data.pages=samples"])
    assert read_plan(before).num_images == 36
    tuned = tune(before, data, tmp_path / "tuned", "train.steps=2", "train.test_every=2")
    assert (read_config(tuned).data.pages, read_plan(tuned).reading.pages) == ("first", "first")
    assert any(
        "12 TIFF files with 3 pages each: only the first page is read" in why for why in read_plan(tuned).reasons
    )
    with pytest.raises(ConfigError, match=r"got data\.pages=samples; expected first or channels"):
        tune(before, data, tmp_path / "refused", "data.pages=samples")
