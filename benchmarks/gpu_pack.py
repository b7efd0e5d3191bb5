"""Prepares .gpu/ for a GPU machine without a network, and uses it there (benchmarks/on_gpu.sh).

``make gpu-pack`` runs ``python benchmarks/gpu_pack.py pack``. Copy the checkout with .gpu/ to the GPU machine
and run ``make gpu`` there. Only packing images needs awnet, to read them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".gpu"
LIMIT_MIB = 64
# what an image with PyTorch usually lacks of pyproject.toml's dependencies and of theirs
WHEELS = ("tyro", "typeguard", "docstring_parser", "pooch", "platformdirs", "pyautoattack")
SIDE, GRID = 32, 50  # pixels of an image; images along each side of a mosaic
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def sources_key(root: Path = ROOT) -> str:
    """A hash of everything that the native module is compiled from."""
    digest = hashlib.sha256()
    for path in [root / "setup.py", *sorted(p for p in (root / "csrc").rglob("*") if p.is_file())]:
        if path.suffix in (".cpp", ".h", ".inl", ".cu", ".py"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _about(python: str) -> dict[str, str]:
    """The version of torch and the suffix of extension modules of an interpreter."""
    code = (
        "import json, sysconfig, torch; print(json.dumps({'torch': str(torch.__version__), "
        "'suffix': sysconfig.get_config_var('EXT_SUFFIX')}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{python} cannot import torch: {done.stderr.strip().splitlines()[-1]}")
    info: dict[str, str] = json.loads(done.stdout)
    return info


# --- pack


def pack(options: argparse.Namespace) -> None:
    """Fills .gpu/ and prints its size."""
    FOLDER.mkdir(exist_ok=True)
    _commit(options.commit)
    _wheels(options.python_version)
    if options.python:
        _native(options.python)
    else:
        shutil.rmtree(FOLDER / "native", ignore_errors=True)
        print("no native module: it is compiled on the GPU machine, in the background of the first steps")
        print("  (--python PYTHON, with the GPU machine's versions of Python and torch, compiles it here)")
    if options.cifar:
        compress(options.cifar, FOLDER / "cifar10.npz", options.quality)
    elif not (FOLDER / "cifar10.npz").exists():
        print("no images: --cifar FOLDER packs the CIFAR-10 of that folder")
    sizes = {path: path.stat().st_size for path in sorted(FOLDER.rglob("*")) if path.is_file()}
    for path, size in sizes.items():
        print(f"{size / 2**20:7.2f} MiB  {path.relative_to(ROOT)}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:7.2f} MiB in {FOLDER.relative_to(ROOT)}/, the limit is {LIMIT_MIB}")
    if total > LIMIT_MIB:
        raise SystemExit(f".gpu/ is larger than {LIMIT_MIB} MiB: a lower --quality makes the images smaller")
    print("copy the checkout with .gpu/ to the GPU machine, then:")
    print("  benchmarks/on_gpu.sh --out DIR --call 1")
    print("  benchmarks/on_gpu.sh --out DIR --call 2")


def _commit(stated: str | None) -> None:
    if stated is None:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout.strip()
        stated = head.stdout.strip() + ("-dirty" if changed else "")
    (FOLDER / "commit").write_text(stated + "\n", encoding="utf-8")
    print(f"commit {stated}")


def _wheels(python_version: str) -> None:
    folder = FOLDER / "wheels"
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python_version, "--dest", str(folder)]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        pins[name.lower().replace("-", "_")] = version.strip()
    requirements = [f"{name}=={pins[name]}" if pins.get(name) else name for name in WHEELS]
    if subprocess.run([*command, *requirements]).returncode != 0:
        raise SystemExit("the wheels could not be downloaded")
    for path in folder.glob("*.whl"):
        without_examples(path)


def without_examples(wheel: Path) -> None:
    """Removes the folders ``examples`` from a wheel: pyautoattack's holds a network of 45 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if "/examples/" in entry.filename:
                continue
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if "/examples/" not in line).encode()
            new.writestr(entry, content)
    wheel.write_bytes(buffer.getvalue())


def _native(python: str) -> None:
    """Compiles the native module with the CUDA kernels for another interpreter, in build/gpu."""
    about, key = _about(python), sources_key()
    folder, build = FOLDER / "native", ROOT / "build" / "gpu"
    command = [python, "setup.py", "-q", "build_ext", "--build-lib", str(build)]
    command += ["--build-temp", f"{build}/objects"]
    print(f"compiling the native module for torch {about['torch']}, {about['suffix']}", flush=True)
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"AWNET_BUILD": "cuda"}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"the native module does not compile:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if sources_key() != key:
        raise SystemExit("the sources changed while they were compiled: pack again")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy2(build / "awnet" / f"_C{about['suffix']}", folder)
    (folder / "about.json").write_text(json.dumps(about | {"sources": key}), encoding="utf-8")


# --- native, on the GPU machine


def native(options: argparse.Namespace) -> None:
    """Copies the packed native module into the package; exits with 1 and the reason if it does not fit."""
    reason = _mismatch(FOLDER / "native")
    if reason is None:
        (module,) = (FOLDER / "native").glob("_C*")
        shutil.copy2(module, ROOT / "awnet")
        print(f"native module: {module.name} of .gpu/native")
    code = "import torch; from awnet import _C; raise SystemExit(_C.build_info()['cuda'] is None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["it was built without CUDA kernels"]
        raise SystemExit(f"{reason or 'the packed module does not load'}; awnet/ has no other: {last[0]}")
    if reason is not None:
        print(f"native module: the one in awnet/ ({reason})")


def _mismatch(folder: Path) -> str | None:
    """Why the packed module cannot be used here; None if it can."""
    if not (folder / "about.json").exists():
        return "no native module is packed"
    packed = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    here = _about(sys.executable) | {"sources": sources_key()}
    for name in ("torch", "suffix", "sources"):
        if packed[name] != here[name]:
            return f"the packed native module is of other {name}: {packed[name][:40]}, here {here[name][:40]}"
    return None


# --- images


def compress(source: Path, target: Path, quality: int) -> None:
    """Writes CIFAR-10 as JPEG mosaics. Lossy: for timings and first runs, not for reported accuracies.

    Args:
        source: folder with ``cifar-10-batches-py``, or that folder.
        target: the .npz file.
        quality: of the JPEG, 1 to 95.
    """
    import numpy as np
    from PIL import Image

    from awnet.data.pickles import read_pickle

    folder = source if source.name == "cifar-10-batches-py" else source / "cifar-10-batches-py"
    if not folder.is_dir():
        raise SystemExit(f"there is no cifar-10-batches-py in {source}")
    arrays: dict[str, Any] = {}
    for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        batches = [read_pickle(folder / name, "data", "labels") for name in names]
        images = np.concatenate([np.asarray(one["data"], np.uint8) for one in batches])
        images = images.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        arrays[f"{split}_labels"] = np.concatenate([np.asarray(one["labels"], np.uint8) for one in batches])
        files = []
        for start in range(0, len(images), GRID * GRID):
            tiles = np.zeros((GRID * GRID, SIDE, SIDE, 3), np.uint8)
            tiles[: len(images[start : start + GRID * GRID])] = images[start : start + GRID * GRID]
            mosaic = tiles.reshape(GRID, GRID, SIDE, SIDE, 3).swapaxes(1, 2).reshape(GRID * SIDE, -1, 3)
            file = io.BytesIO()
            # 4:4:4: no image's colors reach into its neighbors
            Image.fromarray(np.ascontiguousarray(mosaic)).save(
                file, "jpeg", quality=quality, subsampling=0, optimize=True
            )
            files.append(np.frombuffer(file.getvalue(), np.uint8))
        arrays[f"{split}_jpeg"] = np.concatenate(files)
        arrays[f"{split}_sizes"] = np.array([len(file) for file in files])
    np.savez(target, **arrays)


def unpack(source: Path, target: Path) -> None:
    """Writes the images of :func:`compress` as the folder ``target``/cifar-10-batches-py."""
    import numpy as np
    from PIL import Image

    folder = target / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(source) as packed:
        for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
            labels, whole = packed[f"{split}_labels"], packed[f"{split}_jpeg"]
            tiles = []
            for file in np.split(whole, np.cumsum(packed[f"{split}_sizes"])[:-1]):
                mosaic = np.asarray(Image.open(io.BytesIO(file.tobytes())).convert("RGB"))
                tiles.append(
                    mosaic.reshape(GRID, SIDE, GRID, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
                )
            images = np.concatenate(tiles)[: len(labels)].transpose(0, 3, 1, 2).reshape(len(labels), -1)
            for name, rows, kinds in zip(
                names, np.array_split(images, len(names)), np.array_split(labels, len(names)), strict=True
            ):
                batch = {"data": np.ascontiguousarray(rows), "labels": [int(kind) for kind in kinds]}
                (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
    meta = {"label_names": list(CLASSES), "num_cases_per_batch": 10000, "num_vis": 3 * SIDE * SIDE}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=4))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prepares .gpu/ for benchmarks/on_gpu.sh on a GPU machine.")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("pack", help="fill .gpu/: commit, wheels, native module, images")
    one.add_argument(
        "--python", help="interpreter with the GPU machine's Python and torch: compiles for it here"
    )
    one.add_argument("--python-version", default="3.12", help="Python of the GPU machine, for the wheels")
    one.add_argument("--cifar", type=Path, help="folder with cifar-10-batches-py")
    one.add_argument(
        "--quality", type=int, default=75, choices=range(1, 96), metavar="1..95", help="of the JPEG images"
    )
    one.add_argument("--commit", help="by default git's HEAD, with -dirty if files differ from it")
    one.set_defaults(run=pack)
    one = commands.add_parser("native", help="on the GPU machine: put the packed native module into awnet/")
    one.set_defaults(run=native)
    one = commands.add_parser(
        "unpack", help="on the GPU machine: write the packed images as CIFAR-10's folder"
    )
    one.add_argument("source", type=Path)
    one.add_argument("target", type=Path)
    one.set_defaults(run=lambda options: unpack(options.source, options.target))
    options = parser.parse_args(arguments)
    options.run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
