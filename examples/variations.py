"""Draw one thing with several seeds, side by side.

python examples/variations.py "Draw a cat." cats.png
"""

from __future__ import annotations

import sys

import PIL.Image

from earlyfusion import Chameleon


def main(prompt: str, path: str, count: str = "4") -> None:
    model = Chameleon.load("mini")
    replies = model.generate_batch([prompt] * int(count), output="image", seed=0)
    pictures = [reply.images[0] for reply in replies]
    side = pictures[0].width
    sheet = PIL.Image.new("RGB", (side * len(pictures), side))
    for column, picture in enumerate(pictures):
        sheet.paste(picture, (side * column, 0))
    sheet.save(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
