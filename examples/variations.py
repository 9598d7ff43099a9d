"""Generate an image for one prompt with several seeds, and save them side by side.

python examples/variations.py "Draw a cat." cats.png
"""

from __future__ import annotations

import sys

import PIL.Image

from earlyfusion import Chameleon


def main(prompt: str, path: str, count: str = "4") -> None:
    model = Chameleon.load("mini")
    replies = model.generate_batch([prompt] * int(count), output="image", seed=0)
    images = [reply.images[0] for reply in replies]
    side = images[0].width
    sheet = PIL.Image.new("RGB", (side * len(images), side))
    for column, image in enumerate(images):
        sheet.paste(image, (side * column, 0))
    sheet.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
