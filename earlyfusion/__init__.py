"""Chameleon (arXiv 2405.09818): text and images in any order in, and in any order out."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon, Reply, Score
    from earlyfusion.content import Image, Message, Text
    from earlyfusion.errors import (
        CheckpointError,
        ContextError,
        DataError,
        EarlyFusionError,
        ImageError,
        OutOfMemoryError,
        PromptError,
        SettingError,
        WeightsError,
    )
    from earlyfusion.generation.request import (
        Event,
        Finished,
        ImageDone,
        ImagePreview,
        ImageProgress,
        ImageStarted,
        TextDelta,
        TokenDrawn,
        TokenLogprob,
        Usage,
    )
    from earlyfusion.generation.settings import SamplingParams
    from earlyfusion.hf import ChameleonConfig as ChameleonConfig
    from earlyfusion.hf import (
        ChameleonForConditionalGeneration as ChameleonForConditionalGeneration,
    )
    from earlyfusion.hf import ChameleonImageProcessor as ChameleonImageProcessor
    from earlyfusion.hf import ChameleonModel as ChameleonModel
    from earlyfusion.hf import ChameleonProcessor as ChameleonProcessor
    from earlyfusion.hf import ChameleonVQVAE as ChameleonVQVAE
    from earlyfusion.hf import ChameleonVQVAEConfig as ChameleonVQVAEConfig
    from earlyfusion.hf import register as register

__version__ = "0.1.0"

# Large tensors on huge pages, where Linux has them: products read weights up to a third faster
# (docs/engine.md, "Memory"). torch reads this at its first large tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_ERRORS, _EVENTS = "earlyfusion.errors", "earlyfusion.generation.request"
# Imported on first use, so that `import earlyfusion` does not wait for torch.
_HOME = {
    "Chameleon": "earlyfusion.api",
    "Reply": "earlyfusion.api",
    "Score": "earlyfusion.api",
    "Image": "earlyfusion.content",
    "Message": "earlyfusion.content",
    "Text": "earlyfusion.content",
    "SamplingParams": "earlyfusion.generation.settings",
    "TokenLogprob": _EVENTS,
    "Event": _EVENTS,
    "Finished": _EVENTS,
    "ImageDone": _EVENTS,
    "ImagePreview": _EVENTS,
    "ImageProgress": _EVENTS,
    "ImageStarted": _EVENTS,
    "TextDelta": _EVENTS,
    "TokenDrawn": _EVENTS,
    "Usage": _EVENTS,
    "CheckpointError": _ERRORS,
    "ContextError": _ERRORS,
    "DataError": _ERRORS,
    "EarlyFusionError": _ERRORS,
    "ImageError": _ERRORS,
    "PromptError": _ERRORS,
    "SettingError": _ERRORS,
    "OutOfMemoryError": _ERRORS,
    "WeightsError": _ERRORS,
    "ChameleonConfig": "earlyfusion.hf",
    "ChameleonForConditionalGeneration": "earlyfusion.hf",
    "ChameleonImageProcessor": "earlyfusion.hf",
    "ChameleonModel": "earlyfusion.hf",
    "ChameleonProcessor": "earlyfusion.hf",
    "ChameleonVQVAE": "earlyfusion.hf",
    "ChameleonVQVAEConfig": "earlyfusion.hf",
    "register": "earlyfusion.hf",
}
# The names of earlyfusion.hf are left out: `from earlyfusion import *` must not need transformers.
__all__ = [
    "Chameleon",
    "CheckpointError",
    "ContextError",
    "DataError",
    "EarlyFusionError",
    "Event",
    "Finished",
    "Image",
    "ImageDone",
    "ImageError",
    "ImagePreview",
    "ImageProgress",
    "ImageStarted",
    "Message",
    "OutOfMemoryError",
    "PromptError",
    "Reply",
    "SamplingParams",
    "Score",
    "SettingError",
    "Text",
    "TextDelta",
    "TokenDrawn",
    "TokenLogprob",
    "Usage",
    "WeightsError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'earlyfusion' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOME})
