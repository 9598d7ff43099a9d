"""Print the codes of an image, and save the image that they decode to: what the model sees.

python examples/codes_of_an_image.py cat.png decoded.png
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
