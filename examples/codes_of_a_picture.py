"""An image as the model sees it, and its codes.

python examples/codes_of_a_picture.py cat.png seen.png
"""

from __future__ import annotations

import sys

from earlyfusion import Chameleon, Image


def main(source: str, target: str) -> None:
    tokenizer = Chameleon.load("mini").image_tokenizer
    codes = tokenizer.encode([Image.open(source)], mode="fit")
    for row in codes[0].tolist():
        print(" ".join(f"{code:4}" for code in row))
    tokenizer.decode(codes)[0].save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
