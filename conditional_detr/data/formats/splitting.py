"""Split a dataset at random, with the same share of each class everywhere and near-duplicates on one side."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from conditional_detr.data.coco import Annotations, image_paths
from conditional_detr.data.json_values import Id
from conditional_detr.inference.images import open_image, to_pil

NAMES = ("train", "val", "test")
NEAR = 32  # of the 256 bits of a fingerprint: compressed, resized or brighter copies differ in less
_BLOCK = 1024  # fingerprints that are compared with all at once
_SIDE = 16  # pixels of the smallest image that is compared
_THREADS = 8


def parse_fractions(text: str) -> dict[str, float]:
    """Return the share of each split: "0.8/0.1/0.1" of train, val and test, "0.8/0.2" of train and val.

    Raises:
        ValueError: they are not two or three positive numbers with the sum 1.
    """
    try:
        shares = [float(part) for part in str(text).split("/")]
    except ValueError:
        shares = []
    if not (2 <= len(shares) <= len(NAMES) and all(share > 0 for share in shares) and math.isclose(sum(shares), 1)):
        raise ValueError(f"split: expected two or three positive shares with the sum 1, as 0.8/0.1/0.1, got {text!r}")
    return dict(zip(NAMES, shares, strict=False))


def split_data(
    data: Annotations, images: Path, shares: Mapping[str, float], *, seed: int = 0
) -> dict[str, Annotations]:
    """Split a dataset.

    Images that look nearly the same, such as an image and a smaller or brighter copy of it, are in one split.

    Args:
        data: the annotations.
        images: the folder of the images, all of which are opened.
        shares: the share of each split, with the sum 1.
        seed: another seed gives another split. The same seed and images give the same one.

    Returns:
        The annotations of each split, each with all categories.

    Raises:
        OSError, ValueError: an image cannot be opened, seed is negative, or there are fewer different images than
            splits.
    """
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    paths = image_paths(data, images)
    with ThreadPoolExecutor(_THREADS) as pool:
        groups = near_duplicates(list(pool.map(fingerprint, paths.values())))
    if len(groups) < len(shares):
        raise ValueError(f"{data.name}: expected at least {len(shares)} different images to split, got {len(groups)}")
    ids = list(paths)
    classes: dict[Id, set[Id | None]] = {image_id: set() for image_id in ids}
    for annotation in data.annotations:
        classes[annotation["image_id"]].add(annotation["category_id"])
    counts = [Counter(c for i in group for c in classes[ids[i]] or {None}) for group in groups]
    chosen = _stratify(counts, [len(group) for group in groups], list(shares.values()), seed)
    return {
        name: _part(
            data, name, {ids[i] for group, of in zip(groups, chosen, strict=True) if of == split for i in group}
        )
        for split, name in enumerate(shares)
    }


def _part(data: Annotations, name: str, kept: set[Id]) -> Annotations:
    """Return the annotations of some images."""
    return replace(
        data,
        name=f"{data.name} ({name})",
        images={image_id: info for image_id, info in data.images.items() if image_id in kept},
        annotations=[annotation for annotation in data.annotations if annotation["image_id"] in kept],
    )


def fingerprint(path: Path) -> np.ndarray:
    """Return 256 bits of an image: where a small grey copy becomes brighter from left to right."""
    try:
        with Image.open(path) as image:
            image.draft("L", (4 * _SIDE, 4 * _SIDE))  # decodes only as much of a JPEG file as is needed
            grey = ImageOps.exif_transpose(image).convert("L")
    except Exception:  # open_image() opens more kinds, or raises the documented errors
        grey = to_pil(open_image(path, str(path))).convert("L")
    small = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    return (small[:, 1:] > small[:, :-1]).reshape(-1)


def near_duplicates(fingerprints: Sequence[np.ndarray]) -> list[list[int]]:
    """Group fingerprints that differ in at most ``NEAR`` bits, directly or through others."""
    signs = np.array(fingerprints, dtype=np.float32).reshape(len(fingerprints), -1) * 2 - 1
    own = group_of = np.arange(len(signs))
    for start in range(0, len(signs), _BLOCK):
        distances = (signs.shape[1] - signs[start : start + _BLOCK] @ signs.T) / 2
        i, j = np.nonzero(distances <= NEAR)
        rows, columns = np.append(start + i, own), np.append(j, group_of)
        links = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(own), len(own)))
        labels = connected_components(links, directed=False)[1]
        group_of = np.unique(labels, return_index=True)[1][labels]  # the first of each group
    groups = defaultdict(list)
    for index, group in enumerate(group_of.tolist()):
        groups[group].append(index)
    return list(groups.values())


def _stratify(
    counts: Sequence[Counter[Id | None]], sizes: Sequence[int], shares: Sequence[float], seed: int
) -> list[int]:
    """Return the split of each group of images, by iterative stratification (Sechidis et al., 2011).

    The rarest class that is left goes first, each of its groups to the split that lacks most images of it. A split
    that is full gets no more.

    Args:
        counts: the number of images of each class in each group.
        sizes: the number of images of each group.
        shares: the share of each split.
        seed: the order of groups of one size.
    """
    order = sorted(np.random.default_rng(seed).permutation(len(sizes)).tolist(), key=lambda i: -sizes[i])
    totals = sum(counts, Counter())
    lacking = {c: [share * total for share in shares] for c, total in totals.items()}
    room = [share * sum(sizes) for share in shares]
    chosen = [-1] * len(sizes)
    for rarest in sorted(totals, key=lambda c: (totals[c], str(c))):
        for i in order:
            if chosen[i] < 0 and counts[i][rarest]:
                open_splits = [s for s in range(len(shares)) if room[s] >= sizes[i] / 2] or range(len(shares))
                split = max(open_splits, key=lambda s: (lacking[rarest][s], room[s]))
                chosen[i] = split
                room[split] -= sizes[i]
                for c, n in counts[i].items():
                    lacking[c][split] -= n
    for empty in set(range(len(shares))) - set(chosen):  # of a dataset of a few images
        largest = Counter(chosen).most_common(1)[0][0]
        chosen[max(i for i, split in enumerate(chosen) if split == largest)] = empty
    return chosen
