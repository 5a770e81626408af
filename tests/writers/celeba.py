"""CelebA with 36 images."""

import numpy as np
from PIL import Image

COUNT = 36
PARTITION = [0, 0, 1, 0, 2, 0] * 6  # not in blocks, so that an index is not a row
NAMES = [f"{number:06d}.jpg" for number in range(1, COUNT + 1)]
ATTRIBUTES = (
    "5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair Blurry "
    "Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones Male "
    "Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks Sideburns "
    "Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace Wearing_Necktie Young"
)


def write_celeba(root, seed=0):
    """Write the files as CelebA's authors distribute them: aligned columns, spaces at the end of the line of names.

    Returns:
        Labels. Shape (36, 40).
    """
    generator = np.random.default_rng(seed)
    labels = generator.random((COUNT, 40)) < 0.4
    images = root / "Img" / "img_align_celeba"
    for folder in (root / "Anno", root / "Eval", images):
        folder.mkdir(parents=True)
    for name in NAMES:
        coarse = Image.fromarray(generator.integers(0, 256, (7, 6, 3), dtype=np.uint8))
        coarse.resize((178, 218), Image.Resampling.BICUBIC).save(images / name)
    rows = "".join(
        f"{name} {' '.join(f'{2 * int(label) - 1:2d}' for label in row)}\n" for name, row in zip(NAMES, labels, strict=True)
    )
    (root / "Anno" / "list_attr_celeba.txt").write_text(f"{COUNT}\n{ATTRIBUTES} \n{rows}")
    lines = "".join(f"{name} {part}\n" for name, part in zip(NAMES, PARTITION, strict=True))
    (root / "Eval" / "list_eval_partition.txt").write_text(lines)
    return labels
