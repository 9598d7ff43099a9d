"""Ask a question about one or more images.

python examples/ask.py "What do these have in common?" a.png b.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from earlyfusion import Chameleon, SamplingParams


def main(question: str, *images: str) -> None:
    model = Chameleon.load("mini")
    prompt = [*map(Path, images), question]
    reply = model.generate(prompt, output="text", sampling=SamplingParams(temperature=0))
    print(reply.text)


if __name__ == "__main__":
    main(*sys.argv[1:])
