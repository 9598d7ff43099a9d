"""Builds the emoji data from public npm packages.

    python -m earlyfusion.mini.emoji.build --out DIR

Takes two minutes on two CPU cores, plus the downloads, and 300 MB on disk. Needs the `npm` client
(only for `npm pack NAME@VERSION`: no package code is run) and `pip install 'earlyfusion[data]'`.

The manifest in this folder fixes the package versions, the images and their splits. Images that it
does not list are duplicates, unsuitable, held out for tests, or of share-alike styles. The same
versions of Pillow, numpy and resvg_py give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from os import cpu_count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from earlyfusion.errors import DataError
from earlyfusion.mini.emoji.catalogue import STYLES, Concept, load_concepts
from earlyfusion.mini.emoji.phrases import STYLE_WORDS
from earlyfusion.mini.emoji.render import KOREAN_COLOURS, Rendered, Thumbnail, render
from earlyfusion.mini.emoji.sources import find_sources

HERE = Path(__file__).parent
EPOCH = (1980, 1, 1, 0, 0, 0)  # a fixed time, so that archives can be compared


def build(out: Path, packages: Path, manifest: dict[str, Any], workers: int) -> int:
    """Write the data to `out`, downloading to `packages`; returns the number of images. Raises
    DataError if a package cannot be fetched or lacks an image that the manifest lists."""
    versions: dict[str, str] = manifest["packages"]
    splits: dict[str, str] = manifest["images"]
    for name, version in versions.items():
        fetch(packages, name, version)
    folder = partial(package_folder, packages, versions)
    annotations = [
        (folder("cldr-annotations-derived-full"), "annotationsDerived"),
        (folder("cldr-annotations-full"), "annotations"),
    ]
    concepts = load_concepts(folder("emojibase-data"), annotations)
    sources = [s for s in find_sources(concepts, folder) if s.id in splits]
    if len(sources) < len(splits):
        missing = sorted(set(splits) - {s.id for s in sources})
        raise DataError(
            f"{len(missing)} of {len(splits)} images have no source, {missing[0]} first: "
            "use the package versions that the manifest was made with"
        )
    with ProcessPoolExecutor(workers) as pool:
        rendered = list(pool.map(render, sources, chunksize=32))
    write(out, rendered, concepts, manifest)
    return len(rendered)


# ---- packages


def package_folder(packages: Path, versions: dict[str, str], name: str) -> Path:
    return packages / f"{name.replace('@', '').replace('/', '-')}-{versions[name]}"


def fetch(packages: Path, name: str, version: str) -> None:
    """Download and unpack one package, unless it is there."""
    folder = package_folder(packages, {name: version}, name)
    if (folder / "package.json").is_file():
        return
    packages.mkdir(parents=True, exist_ok=True)
    print(f"npm pack {name}@{version}", file=sys.stderr, flush=True)
    command = ["npm", "pack", "--silent", f"{name}@{version}"]
    try:
        done = subprocess.run(command, cwd=packages, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise DataError("npm is not installed: install Node.js, which brings it") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no message"]
        raise DataError(f"npm cannot fetch {name}@{version}: {lines[-1]}") from None
    archive = packages / done.stdout.strip().splitlines()[-1]
    partial_folder = folder.with_name(folder.name + ".partial")
    unpack(archive, partial_folder)
    partial_folder.rename(folder)
    archive.unlink()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the plain files of a package without their first folder."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[1:]
            content = tar.extractfile(member) if member.isfile() else None
            if content is None or not parts or ".." in parts:
                continue
            path = folder.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


# ---- writing


def write(
    out: Path,
    rendered: list[Rendered],
    concepts: dict[str, Concept],
    manifest: dict[str, Any],
) -> None:
    """Write archives, metadata.jsonl, concepts.jsonl, styles.json, manifest.json and NOTICE.md."""
    by_style: dict[str, list[Rendered]] = defaultdict(list)
    for item in rendered:
        by_style[item.source.style].append(item)
    neighbours = nearest_in_train(rendered, manifest["images"])
    designs = {
        (r.source.concept, STYLES[r.source.style]["design"])
        for r in rendered
        if manifest["images"][r.source.id] == "train"
    }
    rows = []
    (out / "images").mkdir(parents=True, exist_ok=True)
    for style in STYLES:
        items = by_style[style]
        items.sort(key=lambda r: (concepts[r.source.concept]["order"], r.source.variant))
        write_archive(out / f"images/{style}.zip", items)
        for item in items:
            row = metadata(item, concepts[item.source.concept], manifest)
            if row["split"] != "train":
                row["sibling_in_train"] = (row["codepoints"], row["design"]) in designs
                row["nn_train"], row["nn_train_id"] = neighbours[row["id"]]
            rows.append(row)
    write_lines(out / "metadata.jsonl", rows)
    used = {r.source.concept for r in rendered}
    private = {"name_en", "keywords_en", "name_ko", "keywords_ko", "label"}
    write_lines(
        out / "concepts.jsonl",
        [
            {k: v for k, v in c.items() if k not in private}
            for c in concepts.values()
            if c["id"] in used
        ],
    )
    styles = {
        style: {
            **about,
            **{f"word_{lang}": words[style] for lang, words in STYLE_WORDS.items()},
            "source": f"{about['package']}@{manifest['packages'][about['package']]}",
            "images": len(by_style[style]),
        }
        for style, about in STYLES.items()
    }
    write_json(out / "styles.json", styles, indent=1)
    write_json(out / "manifest.json", manifest, indent=0)
    shutil.copyfile(HERE / "NOTICE.md", out / "NOTICE.md")


def metadata(item: Rendered, concept: Concept, manifest: dict[str, Any]) -> dict[str, Any]:
    """The row of one image in metadata.jsonl."""
    source, style = item.source, STYLES[item.source.style]
    return {
        "id": source.id,
        "split": manifest["images"][source.id],
        "style": source.style,
        "file": f"images/{source.style}.zip",
        "member": source.member + ".webp",
        "codepoints": source.concept,
        "variant": source.variant,
        **{k: concept[k] for k in ("emoji", "group", "subgroup")},
        **{k: concept[k] for k in ("name_en", "keywords_en", "name_ko", "keywords_ko")},
        "colours": [word for word, _ in item.colours],
        "colour_shares": [share for _, share in item.colours],
        "colours_ko": [KOREAN_COLOURS[word] for word, _ in item.colours],
        "family": concept["family"],
        "design": style["design"],
        "licence": style["licence"],
        "source": f"{style['package']}@{manifest['packages'][style['package']]}",
    }


def nearest_in_train(
    rendered: list[Rendered], splits: dict[str, str]
) -> dict[str, tuple[float, str]]:
    """For every image outside train: the distance to the nearest image of train, and its id.
    Distance: mean absolute RGB difference, 0 to 1, of the 32 x 32 thumbnails."""
    train = [r for r in rendered if splits[r.source.id] == "train"]
    fine = np.stack([r.thumbnail.ravel() for r in train])
    coarse = np.stack([_coarse(r.thumbnail) for r in train])
    neighbours = {}
    for item in rendered:
        if splits[item.source.id] != "train":
            distance, index = _nearest(fine, coarse, item.thumbnail)
            neighbours[item.source.id] = (round(distance, 4), train[index].source.id)
    return neighbours


def _nearest(fine: Thumbnail, coarse: Thumbnail, thumbnail: Thumbnail) -> tuple[float, int]:
    # The 8 x 8 distance is a lower bound of the 32 x 32 one: try candidates in its order.
    bounds = np.abs(coarse - _coarse(thumbnail)).mean(1)
    order = np.argsort(bounds, kind="stable")
    best, at = 9.0, -1
    for start in range(0, len(order), 64):
        candidates = order[start : start + 64]
        if bounds[candidates[0]] > best + 1e-6:
            break
        distances = np.abs(fine[candidates] - thumbnail.ravel()).mean(1)
        if distances.min() < best:
            best, at = float(distances.min()), int(candidates[distances.argmin()])
    return best, at


def _coarse(thumbnail: Thumbnail) -> Thumbnail:
    means: Thumbnail = thumbnail.reshape(8, 4, 8, 4, 3).mean((1, 3)).ravel()
    return means


def write_archive(path: Path, items: list[Rendered]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for item in items:
            archive.writestr(zipfile.ZipInfo(item.source.member + ".webp", EPOCH), item.webp)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, value: Any, indent: int) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Any]:
    """Package versions and splits; DataError if the file is missing or malformed."""
    try:
        data = path.read_bytes()
        manifest = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        return {"packages": dict(manifest["packages"]), "images": dict(manifest["images"])}
    except FileNotFoundError:
        raise DataError(
            f"no manifest at {path}: leave --manifest out for the packaged one"
        ) from None
    except (ValueError, KeyError, TypeError, gzip.BadGzipFile):
        raise DataError(
            f"{path} is not a manifest: it needs `packages` and `images`, as in manifest.json"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m earlyfusion.mini.emoji.build",
        description="Build the emoji data from public npm packages.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--packages", type=Path, help="folder for downloads [OUT-packages]")
    parser.add_argument("--manifest", type=Path, default=HERE / "manifest.json.gz")
    parser.add_argument("--workers", type=int, default=cpu_count() or 1)
    args = parser.parse_args(arguments)
    packages = args.packages or args.out.with_name(args.out.name + "-packages")
    try:
        count = build(args.out, packages, read_manifest(args.manifest), args.workers)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} images in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
