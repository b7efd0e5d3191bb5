"""Files like those of the published Tiny-ImageNet, made small."""

from PIL import Image

# ── Tiny-ImageNet ─────────────────────────────────────────────────────────────────────────────────────────

WNIDS = ["n02000000", "n01000000", "n03000000"]  # as the published wnids.txt, not in order


def plain_picture(value, mode="RGB"):
    colour = (value, 255 - value, 128) if mode == "RGB" else value
    return Image.new(mode, (64, 64), colour)


def write_tiny_imagenet(parent, present=WNIDS, per_class=12):
    folder = parent / "tiny-imagenet-200"
    for k, wnid in enumerate(present):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(per_class):
            picture = plain_picture(10 * i + k, "L" if i == 3 else "RGB")
            picture.save(images / f"{wnid}_{i}.JPEG", quality=100, subsampling=0)
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for i in range(9):
        wnid = WNIDS[i % 3]
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
        if wnid in present:
            plain_picture(20 * i).save(
                folder / "val" / "images" / f"val_{i}.JPEG", quality=100, subsampling=0
            )
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(present) + "\n")
    return folder
