"""The transformers face: Chameleon's seven classes on transformers' base classes.

They run the same blocks and the same VQ-GAN as the rest of the package. Nothing is registered with
transformers' Auto classes until `register()` is called.
"""

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
    # Some releases hide the class behind torchvision; it is there all the same.
    image_processing_auto.AutoImageProcessor.register(
        ChameleonConfig,
        image_processor_classes=dict(IMAGE_PROCESSORS),
        exist_ok=True,
    )
    # A processor is looked up by its name, and there transformers' own table comes first.
    processing_auto.PROCESSOR_MAPPING_NAMES.pop(ChameleonConfig.model_type, None)
    transformers.AutoProcessor.register(ChameleonConfig, ChameleonProcessor, exist_ok=True)
    route_pipeline()
