"""transformers' pipeline "any-to-any" for these classes, without torchvision. transformers requires
torchvision for every model that reads images, since most of its image processors need it. The one
here does not."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY, AnyToAnyPipeline
from transformers.pipelines.base import Pipeline

from earlyfusion.hf.modeling import ChameleonForConditionalGeneration

TASK = "any-to-any"


class ChameleonPipeline(AnyToAnyPipeline):
    """Turns or texts with images in; text out, or an image with `generation_mode="image"`. Use
    it as `transformers.pipeline("any-to-any", …, pipeline_class=ChameleonPipeline)`, or without
    that argument after `register()`. Other models are served as by transformers' own class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        if not isinstance(model, ChameleonForConditionalGeneration):
            super().__init__(*args, **kwargs)
            return
        Pipeline.__init__(self, *args, **kwargs)
        self.check_model_type(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)

    def _forward(self, model_inputs: Any, generate_kwargs: Any = None) -> Any:
        settings = dict(generate_kwargs or {})
        ours = isinstance(self.model, ChameleonForConditionalGeneration)
        if ours and settings.get("generation_mode") == "image":
            # The pipeline's default of 256 new tokens may not be enough for an image.
            settings.setdefault("max_new_tokens", self.model.tokens_per_image)
        return super()._forward(model_inputs, settings)


def route_pipeline() -> None:
    """Let `transformers.pipeline("any-to-any")` make this class."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = ChameleonPipeline
