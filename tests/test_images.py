"""Images of any source in batches: found, read, quarantined, cut."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from corpora import jsonl, png, tar

from earlyfusion.data.images import (
    CropConfig,
    ImageBatches,
    JoinedImages,
    centre_crops,
    hold_out,
    open_images,
    random_crop,
    to_pixels,
)
from earlyfusion.data.mixture import PrefetchedStream
from earlyfusion.data.rows import Quarantine, RowSettings
from earlyfusion.errors import DataError, SettingError
from earlyfusion.train.folder import check_same_data


def opened(tmp_path: Path, *sources: object) -> JoinedImages:
    return open_images([str(s) for s in sources], tmp_path / "cache", RowSettings())


def same(image: PIL.Image.Image, seed: int) -> bool:
    with PIL.Image.open(io.BytesIO(png(seed))) as file:
        return np.array_equal(np.asarray(image), np.asarray(file.convert("RGB")))


def folder_of(path: Path, count: int) -> Path:
    (path / "deep").mkdir(parents=True)
    for number in range(count):
        (path / ("deep" if number % 2 else ".") / f"{number:03}.png").write_bytes(png(number))
    (path / "notes.txt").write_text("no picture")
    return path


def test_a_folder_a_glob_and_a_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 5)
    full = opened(tmp_path, folder)
    assert len(full) == 5 and full.is_random
    assert [same(full.read(n, 0.0), s) for n, s in enumerate((0, 2, 4, 1, 3))] == [True] * 5
    some = opened(tmp_path, folder / "*.png", folder / "deep" / "001.png")
    assert len(some) == 4 and same(some.read(3, 0.9), 1)
    assert some.find(3) == (folder / "deep" / "001.png", 0)


def test_rows_of_all_forms(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 4)
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    typed = [{"type": "image", "path": "3.png"}, {"type": "text", "text": "What is this?"}]
    rows = [
        {"image": "0.png", "caption": "a pear"},
        {"file_name": "1.png"},
        {"texts": ["a", None, None], "images": [None, "0.png", "2.png"]},
        {
            "messages": [
                {"role": "user", "content": typed},
                {"role": "assistant", "content": "A pear."},
            ]
        },
    ]
    table = jsonl(tmp_path / "rows.jsonl", rows)
    archive = tar(tmp_path / "some.tar", {"a.png": png(7), "b.png": png(8), "b.txt": b"a plum"})
    result = opened(tmp_path, table, archive, folder)
    assert len(result) == 4 + 2 + 4
    first = [result.read(number, 0.0) for number in range(6)]
    assert [same(p, s) for p, s in zip(first, (0, 1, 0, 3, 7, 8), strict=True)] == [True] * 6
    assert same(result.read(2, 0.6), 2)  # the second image of that row
    assert result.find(5) == (archive, 1)


def test_parquet_is_read_group_by_group(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": png(number), "path": None} for number in range(6)]
    table = pyarrow.table({"image": images, "label": list(range(6))})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    result = opened(tmp_path, tmp_path / "rows.parquet")
    assert result.groups == [2, 2, 2] and not result.is_random
    assert all(same(result.read(number, 0.0), number) for number in range(6))


def batches(
    tmp_path: Path,
    found: JoinedImages,
    size: int = 4,
    seed: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tuple[ImageBatches, Quarantine]:
    def crop(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        return random_crop(image, 16, CropConfig(), rng)

    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 1.0)
    return ImageBatches(found, None, size, crop, seed, quarantine, share), quarantine


def test_a_batch_follows_from_seed_and_step(tmp_path: Path) -> None:
    result = opened(tmp_path, folder_of(tmp_path / "photos", 9))
    (one, _), (two, _), (other, _) = (batches(tmp_path, result, seed=s) for s in (0, 0, 1))
    assert one(5).shape == (4, 3, 16, 16) and one(5).dtype == torch.float32
    assert torch.equal(one(5), two(5)) and not torch.equal(one(5), one(6))
    assert not torch.equal(one(5), other(5))
    halves = [batches(tmp_path, result, share=(rank, 2))[0](5) for rank in range(2)]
    assert torch.equal(torch.cat(halves), one(5))
    ahead = PrefetchedStream(one, workers=2, depth=3)
    assert all(torch.equal(ahead(step), one(step)) for step in (0, 1, 2, 7))
    ahead.close()


def test_an_epoch_has_every_image_once(tmp_path: Path) -> None:
    result = opened(tmp_path, folder_of(tmp_path / "photos", 8))
    created, _ = batches(tmp_path, result)
    shown: list[int] = []
    read = result.read
    result.read = lambda number, which: shown.append(number) or read(number, which)  # type: ignore
    for step in range(4):
        created(step)
    assert sorted(shown[:8]) == sorted(shown[8:]) == list(range(8)) and shown[:8] != shown[8:]


def test_broken_images_give_way_and_are_counted(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 4)
    for number in range(30):
        (folder / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff no picture")
    result = opened(tmp_path, folder)
    stream, quarantine = batches(tmp_path, result)
    for step in range(20):
        assert torch.isfinite(stream(step)).all()
    assert quarantine.broken > 30 and quarantine.good == 80
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    filed = [json.loads(line) for line in lines]
    assert len(filed) == len({entry["file"] for entry in filed}) <= 30
    assert all("broken" in entry["file"] and entry["reason"] for entry in filed)


def test_nothing_but_broken_images_ends_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no")
    result, _ = batches(tmp_path, opened(tmp_path, tmp_path / "photos"))
    with pytest.raises(DataError, match=r"quarantine\.jsonl"):
        result(0)
    with pytest.raises(SettingError, match="data is empty"):
        open_images([], tmp_path, RowSettings())
    with pytest.raises(DataError, match="there is no"):
        opened(tmp_path, tmp_path / "nothing")


def test_held_out_images_are_trained_on_by_no_run(tmp_path: Path) -> None:
    result = opened(tmp_path, folder_of(tmp_path / "photos", 40))
    held, rest = hold_out(result, 64)
    assert len(held) == 4 and sorted([*held, *rest]) == list(range(40))
    quarantine = Quarantine(None, 1.0)
    squares = centre_crops(result, held, 8, quarantine)
    assert squares.shape == (4, 3, 8, 8) and squares.abs().max() <= 1


def test_crops_lie_within_and_do_not_enlarge() -> None:
    rng = np.random.default_rng(0)
    wide = PIL.Image.new("RGB", (90, 40), "white")
    wide.paste("red", (0, 0, 45, 40))
    shares = []
    for _ in range(40):
        crop = random_crop(wide, 16, CropConfig(smallest=0.4), rng)
        pixels = to_pixels([crop])[0]
        assert crop.size == (16, 16) and (pixels[0] > 0.9).all()
        shares.append(float((pixels[1] < 0).float().mean()))
    assert min(shares) < 0.1 and max(shares) > 0.9
    small = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    upright = random_crop(small, 8, CropConfig(smallest=0.1, mirror=0.0), rng)
    assert np.array_equal(np.asarray(upright), np.asarray(small))
    mirrored = random_crop(small, 8, CropConfig(smallest=0.1, mirror=1.0), rng)
    assert np.array_equal(np.asarray(mirrored), np.asarray(small)[:, ::-1])
    for wrong in ({"smallest": 0.0}, {"mirror": 2.0}):
        with pytest.raises(SettingError, match="share"):
            CropConfig(**wrong)


def test_other_images_in_the_same_run_are_refused(tmp_path: Path) -> None:
    check_same_data(tmp_path, "a", "the images are")
    check_same_data(tmp_path, "b", "the images are")  # nothing is trained yet
    (tmp_path / "step-00000001").mkdir()
    check_same_data(tmp_path, "b", "the images are")
    with pytest.raises(DataError, match="another out folder"):
        check_same_data(tmp_path, "a", "the images are")
