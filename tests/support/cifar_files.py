"""CIFAR-10 as published, with random images: the files of its Python version."""

import pickle

import numpy as np


def pictures(n, seed, num_classes=10):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (n, 3072), np.uint8), [int(k) for k in random.permutation(n) % num_classes]


def write_cifar10(parent, dumps=pickle.dumps, rows=(30, 20, 10, 25, 15, 40)):
    folder = parent / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for seed, (name, n) in enumerate(zip(names, rows, strict=True)):
        data, labels = pictures(n, seed)
        batch = {
            "batch_label": name,
            "labels": labels,
            "data": data,
            "filenames": [f"{i}.png" for i in range(n)],
        }
        (folder / name).write_bytes(dumps(batch))
    meta = {"label_names": [f"class {k}" for k in range(10)], "num_cases_per_batch": 10000, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(dumps(meta))
    return folder
