"""transformers' seven Chameleon classes, on transformers' base classes and this package's modules.
transformers' Auto classes only know them after `register()`."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError(
        "the transformers classes need transformers: pip install 'earlyfusion[transformers]'"
    )

import transformers
from transformers.models.auto import image_processing_auto, processing_auto

from earlyfusion.hf.configuration import ChameleonConfig, ChameleonVQVAEConfig
from earlyfusion.hf.image_processing import (
    IMAGE_PROCESSORS,
    ChameleonImageProcessor,
    ChameleonImageProcessorFast,
    ChameleonImageProcessorKwargs,
    ChameleonImageProcessorPil,
)
from earlyfusion.hf.modeling import (
    ChameleonForConditionalGeneration,
    ChameleonModel,
    ChameleonPreTrainedModel,
    ChameleonVQVAE,
    ChameleonVQVAEModelOutput,
)
from earlyfusion.hf.pipeline import ChameleonPipeline, route_pipeline
from earlyfusion.hf.processing import ChameleonProcessor, ChameleonProcessorKwargs

__all__ = [
    "ChameleonConfig",
    "ChameleonForConditionalGeneration",
    "ChameleonImageProcessor",
    "ChameleonImageProcessorFast",
    "ChameleonImageProcessorKwargs",
    "ChameleonImageProcessorPil",
    "ChameleonModel",
    "ChameleonPipeline",
    "ChameleonPreTrainedModel",
    "ChameleonProcessor",
    "ChameleonProcessorKwargs",
    "ChameleonVQVAE",
    "ChameleonVQVAEConfig",
    "ChameleonVQVAEModelOutput",
    "register",
]


def register() -> None:
    """Route transformers' Auto classes and pipelines to these classes, in this process only."""
    generative = (
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForCausalLM,
    )
    for config in (ChameleonConfig, ChameleonVQVAEConfig):
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(ChameleonConfig, ChameleonModel, exist_ok=True)
    transformers.AutoModel.register(ChameleonVQVAEConfig, ChameleonVQVAE, exist_ok=True)
    for auto in generative:
        auto.register(ChameleonConfig, ChameleonForConditionalGeneration, exist_ok=True)
    # Some releases export this class only with torchvision installed; the module always has it.
    image_processing_auto.AutoImageProcessor.register(
        ChameleonConfig,
        image_processor_classes=dict(IMAGE_PROCESSORS),
        exist_ok=True,
    )
    # transformers looks up a processor by name, first in its own table.
    processing_auto.PROCESSOR_MAPPING_NAMES.pop(ChameleonConfig.model_type, None)
    transformers.AutoProcessor.register(ChameleonConfig, ChameleonProcessor, exist_ok=True)
    route_pipeline()
