"""The loader: random draws depend only on (seed, epoch, image), and bad files are always reported."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
from corpus import Memory, file_of, noisy, npy, smooth
from PIL import Image

from unmask.batch import ImageSpec
from unmask.data import image_reader
from unmask.data.augment import CropConfig
from unmask.data.decode.bad_image import BadImage
from unmask.data.image_reader import ImageReader
from unmask.data.loader import MicroBatches, choose_workers, eval_batches, training_batches
from unmask.data.order import Order, SampleIndices, places

COUNT = 20


def spec(size=(8, 8), channels=3, dtype="uint8"):
    return ImageSpec(channels, size, dtype, (0.0,) * channels, (1.0,) * channels)


def source(count=COUNT, **bad):
    """Return a source of images of different sizes; bad: content of bad files by row, for example r3=b"..."."""
    files = {f"{i:03d}.png": file_of(noisy(12 + i % 5, 10 + i % 3, seed=i), "PNG") for i in range(count)}
    for row, data in bad.items():
        files[f"{int(row[1:]):03d}.png"] = data
    made = Memory(files)
    made.label_by([str(i % 4) for i in range(count)])
    return made


def images(origin=None, *, size=(8, 8), seed=0, **more):
    origin = origin if origin is not None else source()
    return ImageReader(origin, np.arange(len(origin)), spec(size), CropConfig(), seed, **more)


def drawn(data, *, start=0, batch=8, batches=5, workers=0):
    """Return (row, epoch, label, digest of the pixels) of each sample."""
    digests = []
    for delivery in training_batches(data, MicroBatches(start, batch, batches), workers=workers):
        got = delivery.batch
        assert got.labels is not None
        for pixels, index, epoch, label in zip(got.images, got.index, got.epoch, got.labels, strict=True):
            digest = hashlib.sha256(pixels.numpy().tobytes() + bytes([int(epoch)])).hexdigest()
            digests.append((int(index), int(epoch), int(label), digest))
    return digests


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    assert drawn(images(), workers=workers) == drawn(images())


@pytest.mark.parametrize(("batch", "batches"), [(1, 40), (4, 10), (20, 2), (40, 1)])
def test_samples_do_not_depend_on_the_batch_size(batch, batches):
    assert drawn(images(), batch=batch, batches=batches) == drawn(images())


def test_jitter_is_reproducible_and_only_applied_in_training():
    jittered = images()
    jittered.crop = CropConfig(jitter=0.4)
    assert drawn(jittered, batch=4, batches=10, workers=2) == drawn(jittered)
    assert drawn(jittered) != drawn(images())
    taken = SampleIndices(np.arange(4), np.zeros(4, np.int64))
    jittered.training = False
    assert torch.equal(jittered[taken].batch.images, images(training=False)[taken].batch.images)


@pytest.mark.parametrize("start", [1, 8, 19, 20, 33])
def test_starting_later_continues_the_same_stream(start):
    stream = drawn(images(), batches=8)
    assert drawn(images(), start=start, batches=3) == stream[start : start + 24]
    assert (
        drawn(images(), start=start + 1, batches=3) != stream[start : start + 24]
    )  # check that the comparison can fail


def test_every_epoch_has_every_image_once_in_a_new_order():
    stream = drawn(images(), batch=COUNT, batches=3)
    epochs = [stream[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert [{epoch for _, epoch, _, _ in part} for part in epochs] == [{0}, {1}, {2}]
    orders = [[row for row, _, _, _ in part] for part in epochs]
    assert all(sorted(order) == list(range(COUNT)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_crops_depend_on_epoch_and_seed():
    by_row = {}
    for row, epoch, _, digest in drawn(images(), batch=COUNT, batches=2):
        by_row.setdefault(row, {})[epoch] = digest
    assert all(seen[0] != seen[1] for seen in by_row.values())
    assert drawn(images(seed=1)) != drawn(images(seed=0))
    assert drawn(images(seed=2**40)) != drawn(images(seed=0))


def test_a_batch_may_be_larger_than_the_data_set():
    stream = drawn(images(source(3)), batch=10, batches=2)
    assert [epoch for _, epoch, _, _ in stream] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6]
    assert sorted(row for row, epoch, _, _ in stream if epoch == 2) == [0, 1, 2]


def test_only_the_usable_rows_are_drawn():
    data = images()
    data.rows = np.array([3, 7, 11])
    assert {row for row, _, _, _ in drawn(data)} == {3, 7, 11}
    assert len(data) == 3


def test_order_caches_few_epochs_and_starts_anywhere():
    order = Order(np.arange(5), 0)
    far = order.take(5_000_000, 12)
    assert far.epoch.tolist() == [1_000_000] * 5 + [1_000_001] * 5 + [1_000_002] * 2
    assert len(order._cache) <= 3
    assert (Order(np.arange(5), 0).take(5_000_003, 2).index == far.index[3:5]).all()


def test_global_random_state_is_not_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn(images(), batches=1)
    list(eval_batches(images(training=False), np.arange(4), batch=2))
    assert (torch.get_rng_state() == before).all()


def test_images_can_be_sent_to_other_processes():
    assert drawn(pickle.loads(pickle.dumps(images()))) == drawn(images())


@pytest.mark.parametrize("size", [(8, 8), (6, 14), (14, 6), (40, 50)])
def test_batches_have_the_shape_and_dtype_of_the_data_set(size):
    delivery = next(training_batches(images(size=size), MicroBatches(0, 4, 1), workers=0))
    assert delivery.batch.images.shape == (4, 3, *size)
    assert delivery.batch.images.dtype == torch.uint8
    assert delivery.batch.images.is_contiguous(memory_format=torch.channels_last)
    assert delivery.bad == ()


def test_small_images_are_enlarged_and_one_pixel_is_enough():
    origin = Memory({"a.png": file_of(np.full((1, 1, 3), 9, np.uint8), "PNG")})
    got = next(training_batches(images(origin, size=(16, 24)), MicroBatches(0, 2, 1), workers=0)).batch.images
    assert (got == 9).all()


def test_gray_and_colour_images_can_be_mixed():
    origin = Memory({"a.png": file_of(np.full((9, 9, 1), 50, np.uint8), "PNG"), "b.png": file_of(noisy(9, 9), "PNG")})
    got = next(eval_batches(images(origin, training=False), np.array([0, 1]), batch=2))
    assert (got.images[0] == 50).all()
    gray = ImageReader(origin, np.arange(2), spec(channels=1), CropConfig(), training=False)
    assert next(eval_batches(gray, np.array([0, 1]), batch=2)).images.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(("dtype", "channels"), [("uint16", 1), ("uint16", 3), ("float32", 1), ("float32", 6)])
def test_other_dtypes_and_channel_counts_are_unchanged(dtype, channels):
    values = noisy(8, 8, channels).astype(dtype) * 3
    data = ImageReader(
        Memory({"a.npy": npy(values)}), np.arange(1), spec((8, 8), channels, dtype), CropConfig(), training=False
    )
    got = next(eval_batches(data, np.array([0]), batch=1)).images
    assert (got[0].permute(1, 2, 0).numpy() == values).all()


def test_evaluation_crops_are_centred_unflipped_and_in_order():
    values = noisy(8, 12)
    data = images(Memory({"a.png": file_of(values, "PNG"), "b.png": file_of(values[:, ::-1], "PNG")}), training=False)
    batches = list(eval_batches(data, np.array([1, 0, 1]), batch=2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert batches[0].index.tolist() == [1, 0]
    assert (batches[0].images[1].permute(1, 2, 0).numpy() == values[:, 2:10]).all()


def large_jpegs(size=(600, 800)):
    made = {}
    for i in range(3):
        picture = Image.fromarray(noisy(6, 8, seed=i)).resize(size[::-1], Image.Resampling.BICUBIC)
        made[f"{i}.jpg"] = file_of(picture, "JPEG", quality=95)
    return Memory(made)


def test_scaled_decoding_agrees_with_full_decoding(monkeypatch):
    seen = []
    true_decode = image_reader.decode.decode
    monkeypatch.setattr(image_reader.decode, "decode", lambda *a, **k: seen.append(true_decode(*a, **k)) or seen[-1])
    scaled = images(large_jpegs(), size=(32, 32))
    cached = images(large_jpegs(), size=(32, 32))
    cached.keep_decoded()
    seen.clear()
    taken = Order(scaled.rows, 0).take(0, 30)
    one = scaled[taken].batch.images.float()
    assert max(image.shape[0] for image in seen) < 600
    difference = (one - cached[taken].batch.images.float()).abs()
    assert 0 < difference.mean() < 1.0
    assert difference.max() < 16


def test_cached_images_give_the_same_pixels_without_scaled_decoding():
    cached = images()
    cached.keep_decoded()
    cached.source.files = [b""] * COUNT  # type: ignore[attr-defined]
    assert drawn(cached) == drawn(images())


def test_cached_large_jpegs_are_reproducible():
    pair = [images(large_jpegs(), size=(32, 32)) for _ in range(2)]
    for data in pair:
        data.keep_decoded()
    taken = Order(pair[0].rows, 0).take(0, 6)
    assert (pair[0][taken].batch.images == pair[1][taken].batch.images).all()


def test_rotated_jpeg_is_cropped_as_displayed():
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = smooth(160, 120)
    stored = Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90)
    data = Memory({"a.jpg": file_of(stored, "JPEG", exif=exif, quality=98), "b.png": file_of(shown, "PNG")})
    got = next(eval_batches(images(data, size=(20, 15), training=False), np.array([0, 1]), batch=2)).images.int()
    assert (got[0] - got[1]).abs().max() < 8


def test_repeats_are_different_crops_of_one_image():
    once, twice = drawn(images(), batches=10), drawn(images(repeats=2), batches=10)
    assert [row for row, _, _, _ in twice[::2]] == [row for row, _, _, _ in twice[1::2]]
    assert [row for row, _, _, _ in twice[::2]] == [row for row, _, _, _ in once[:40]]
    assert [epoch for _, epoch, _, _ in twice[:40]] == [0, 1] * 20  # during the first pass over the images
    assert [epoch for _, epoch, _, _ in twice[40:]] == [2, 3] * 20
    assert all(a[3] != b[3] for a, b in zip(twice[::2], twice[1::2], strict=True))
    assert len({(row, epoch) for row, epoch, _, _ in twice}) == len(twice)


def test_repeats_are_samples_that_also_occur_without_repeats():
    known = {sample[:2]: sample for sample in drawn(images(), batches=10)}
    shared = [known.get(sample[:2]) == sample for sample in drawn(images(repeats=4), batches=10) if sample[1] < 4]
    assert len(shared) == 80
    assert all(shared)


@pytest.mark.parametrize("workers", [0, 2])
def test_repeats_do_not_depend_on_workers_and_start(workers):
    whole = drawn(images(repeats=4), batches=10)
    assert drawn(images(repeats=4), batches=10, workers=workers) == whole
    assert drawn(images(repeats=4), start=24, batches=7, workers=workers) == whole[24:]
    assert drawn(images(repeats=4), batch=4, batches=20, workers=workers) == whole


def test_repeats_are_read_and_decoded_once(monkeypatch):
    count = [0]
    true_decode = image_reader.decode.decode

    def decode(*arguments, **more):
        count[0] += 1
        return true_decode(*arguments, **more)

    monkeypatch.setattr(image_reader.decode, "decode", decode)
    assert len(drawn(images(repeats=4), batch=16, batches=5)) == 80
    assert count[0] == 20


def test_repeats_of_large_jpegs_are_decoded_at_the_largest_needed_size():
    data = images(large_jpegs(), size=(32, 32), repeats=3)
    together = data[Order(data.rows, 0, 3).take(0, 9)].batch
    kept = images(large_jpegs(), size=(32, 32), repeats=3)
    kept.keep_decoded()
    exact = kept[Order(data.rows, 0, 3).take(0, 9)].batch
    assert (together.images.float() - exact.images.float()).abs().mean() < 1.0


def test_repeats_of_a_bad_file_are_replaced_and_evaluation_has_no_repeats():
    got = drawn(images(source(r3=b""), repeats=2), batches=10)
    assert len(got) == 80
    assert 3 not in {row for row, _, _, _ in got}
    looked_at = list(eval_batches(images(repeats=4, training=False), np.arange(3), batch=3))
    assert looked_at[0].index.tolist() == [0, 1, 2]


def test_bad_file_is_reported_and_replaced_reproducibly():
    origin = source(r3=b"gone bad", r7=b"")
    one, two = drawn(images(origin), batches=5), drawn(images(origin), batch=4, batches=10, workers=2)
    assert one == two
    assert not {3, 7} & {row for row, _, _, _ in one}
    assert len(one) == 40
    sound = drawn(images())
    changed = [i for i, (a, b) in enumerate(zip(one, sound, strict=True)) if a != b]
    assert {sound[i][0] for i in changed} == {3, 7}
    told = [bad for d in training_batches(images(origin), MicroBatches(0, 20, 1), workers=0) for bad in d.bad]
    assert sorted((bad.name, bad.code) for bad in told) == [("003.png", "NOT_IMAGE"), ("007.png", "EMPTY")]


def test_replacement_has_its_own_label():
    for row, _, label, _ in drawn(images(source(r3=b""))):
        assert label == row % 4


def test_bad_files_are_reported_for_cached_images():
    data = images(source(r3=b""))
    data.keep_decoded()
    assert drawn(data) == drawn(images(source(r3=b"")))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_raises_instead_of_replacing(workers):
    data = images(source(r3=b"", r4=b"text"), training=False)
    stream = eval_batches(data, np.arange(8), batch=2, workers=workers)
    assert len(next(stream)) == 2
    with pytest.raises(BadImage, match=r"003\.png") as caught:
        list(stream)
    assert caught.value.code == "EMPTY"


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_data_set_stops_the_run(workers):
    origin = source(3, r0=b"", r1=b"", r2=b"")
    with pytest.raises(BadImage, match="seems to be gone") as caught:
        drawn(images(origin), workers=workers)
    assert caught.value.code == "VANISHED"


def test_batch_has_few_undecoded_files_in_memory():
    most, held = [0], [0]

    class Watched(Memory):
        def read(self, i):
            held[0] += 1
            most[0] = max(most[0], held[0])
            return super().read(i)

    data = images(Watched(dict(zip(source().names, source().files, strict=True))))
    true_take = data._take

    def take(*arguments, **options):
        held[0] -= 1
        return true_take(*arguments, **options)

    data._take = take  # type: ignore[method-assign]
    data[SampleIndices(np.tile(np.arange(COUNT), 5), np.zeros(5 * COUNT, np.int64))]
    assert most[0] <= image_reader.READ_AHEAD


def test_closing_the_iterator_ends_its_workers():
    import multiprocessing

    before = set(multiprocessing.active_children())
    stream = training_batches(images(), MicroBatches(0, 4, 1000), workers=2)
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    next(stream)
    del stream
    for child in started:
        child.join(10)
    assert not [child for child in started if child.is_alive()]


@pytest.mark.parametrize(
    ("device", "cached", "cores", "expected"),
    [("cpu", True, 8, 0), ("cpu", False, 1, 0), ("cpu", False, 8, 2), ("cuda", False, 8, 7), ("cuda", True, 64, 12)],
)
def test_the_number_of_workers_is_chosen_with_a_reason(monkeypatch, device, cached, cores, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    workers, why = choose_workers(device, cached=cached)
    assert workers == expected
    assert str(workers) in why


def parts(ranks, *, batch, repeats=1, workers=0, rank_of=lambda rank: rank):
    """Return the samples of three micro-batches put together from the parts of all ranks, and all ranks' places."""
    data, whole = images(repeats=repeats), {}
    taken = [places(batch, rank_of(rank), ranks, repeats) for rank in range(ranks)]
    for rank, own in enumerate(taken):
        stream = training_batches(data, MicroBatches(batch, batch, 3, rank, ranks), workers=workers)
        for number, delivery in enumerate(stream):
            got = delivery.batch
            assert len(got) == batch // ranks
            for place, row, epoch, pixels in zip(own, got.index, got.epoch, got.images, strict=True):
                digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
                whole[number * batch + int(place)] = (int(row), int(epoch), digest)
    return [whole.get(number) for number in range(3 * batch)], np.sort(np.concatenate(taken))


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("batch", [8, 16])
def test_the_parts_of_all_ranks_are_the_whole_batch_once(batch, ranks, repeats):
    alone, every = parts(1, batch=batch, repeats=repeats)
    assert None not in alone
    assert every.tolist() == list(range(batch))
    together, every = parts(ranks, batch=batch, repeats=repeats)
    assert every.tolist() == list(range(batch))
    assert together == alone
    duplicated, every = parts(ranks, batch=batch, repeats=repeats, rank_of=lambda rank: max(0, rank - 1))
    assert every.tolist() != list(range(batch)), "two ranks with the same part are noticed"
    assert duplicated != alone


def test_a_part_is_the_same_with_workers():
    assert parts(2, batch=8, workers=2)[0] == parts(1, batch=8)[0]


@pytest.mark.parametrize(("batch", "ranks", "repeats"), [(8, 2, 1), (16, 4, 2), (24, 3, 1), (48, 4, 3), (8, 1, 1)])
def test_a_rank_takes_pairs_of_mirrored_places(batch, ranks, repeats):
    for rank in range(ranks):
        own = places(batch, rank, ranks, repeats)
        assert own.dtype == np.int64
        assert (np.diff(own) > 0).all()
        assert (own[::-1] == batch - 1 - own).all()
        assert (own.reshape(-1, repeats) % repeats == np.arange(repeats)).all(), "all samples of an image are together"


def test_a_part_that_cannot_be_halved_is_one_slice():
    assert [places(6, rank, 2).tolist() for rank in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert [places(8, rank, 4, 2).tolist() for rank in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(("batch", "ranks", "repeats"), [(9, 2, 1), (8, 4, 4), (4, 8, 1)])
def test_a_batch_that_cannot_be_divided_is_rejected(batch, ranks, repeats):
    with pytest.raises(AssertionError, match="expected a multiple"):
        places(batch, 0, ranks, repeats)
