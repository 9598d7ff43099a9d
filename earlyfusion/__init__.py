"""Chameleon (arXiv 2405.09818): text and images in any order in, and in any order out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon, Reply
    from earlyfusion.content import Image, Message, Text
    from earlyfusion.generation.settings import SamplingParams
    from earlyfusion.hf import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonImageProcessor,
        ChameleonModel,
        ChameleonProcessor,
        ChameleonVQVAE,
        ChameleonVQVAEConfig,
        register,
    )

__version__ = "0.1.0"

_HOME = {
    "Chameleon": "earlyfusion.api",
    "Reply": "earlyfusion.api",
    "Image": "earlyfusion.content",
    "Message": "earlyfusion.content",
    "Text": "earlyfusion.content",
    "SamplingParams": "earlyfusion.generation.settings",
    "ChameleonConfig": "earlyfusion.hf",
    "ChameleonForConditionalGeneration": "earlyfusion.hf",
    "ChameleonImageProcessor": "earlyfusion.hf",
    "ChameleonModel": "earlyfusion.hf",
    "ChameleonProcessor": "earlyfusion.hf",
    "ChameleonVQVAE": "earlyfusion.hf",
    "ChameleonVQVAEConfig": "earlyfusion.hf",
    "register": "earlyfusion.hf",
}
__all__ = [
    "Chameleon",
    "ChameleonConfig",
    "ChameleonForConditionalGeneration",
    "ChameleonImageProcessor",
    "ChameleonModel",
    "ChameleonProcessor",
    "ChameleonVQVAE",
    "ChameleonVQVAEConfig",
    "Image",
    "Message",
    "Reply",
    "SamplingParams",
    "Text",
    "__version__",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'earlyfusion' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
